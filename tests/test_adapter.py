"""Adapters read lazily are what PEFT merges: every kind, in pieces, rounded once, and through a merge."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import KINDS, TIED, UNTIED, Trained, change_config, change_tensors, train
from checkpoints import recipe_text
from safetensors.torch import load_file, save_file
from tiny_architectures import auto_class
from torch import Tensor

import ctl_merge
from ctl_merge.checkpoint import Checkpoint
from ctl_merge.merging import Merge
from ctl_merge.reference import ModelRef
from ctl_merge.stored import open_checkpoint

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
FAMILY = Path(__file__).parents[2] / "shared" / "models"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match any targeted module.*:RuntimeWarning"),
]


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("kind"), *KINDS[request.param])


def exact(checkpoint: Checkpoint, name: str, start: int = 0, count: int | None = None) -> Tensor:
    """Entries of a tensor in float64, flat."""
    count = checkpoint.tensors[name].numel if count is None else count
    out = torch.full((count,), float("nan"), dtype=torch.float64)
    checkpoint.read_into(name, out, start)
    return out


def opened(trained: Trained) -> Checkpoint:
    return open_checkpoint(ModelRef.parse(trained.both))


def close(one: Tensor, other: Tensor) -> bool:
    """Equal up to the order in which a sum of float64 products may be taken."""
    return torch.allclose(one.view(-1), other.view(-1).double(), rtol=1e-13, atol=1e-15)


def test_every_tensor_is_what_peft_merges(trained: Trained, tmp_path: Path) -> None:
    checkpoint, expected = opened(trained), trained.merged(tmp_path)
    stored = load_file(trained.base / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert close(exact(checkpoint, name), tensor), name
    changed = [name for name in expected if not torch.equal(expected[name].float(), stored[name])]
    assert changed, "an adapter that does nothing tests nothing"


def test_any_piece_is_that_of_the_whole(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = opened(trained)
    whole = {name: exact(checkpoint, name) for name in checkpoint.tensors}
    monkeypatch.setattr("ctl_merge.checkpoint.CHUNK", 100)  # no multiple of any row
    again = opened(trained)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in whole.items():
        assert close(exact(again, name), tensor), name
        for _ in range(3):
            start, end = sorted(torch.randint(0, tensor.numel() + 1, (2,), generator=generator).tolist())
            assert close(exact(again, name, start, end - start), tensor[start:end]), (name, start, end)


def test_a_tensor_is_rounded_once_to_its_own_dtype(tmp_path: Path) -> None:
    """PEFT rounds B A, then the sum: the two may differ by what these roundings and ours can make of them."""
    trained = train(tmp_path, *KINDS["lora"], dtype=torch.bfloat16)
    change_tensors(trained.adapter, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    checkpoint, base = opened(trained), open_checkpoint(ModelRef.parse(str(trained.base)))
    theirs = trained.merged(tmp_path / "whole", torch.bfloat16)
    unit, differing = 2.0**-8, 0  # half a unit in the last place, of 1
    for name, tensor in theirs.items():
        unrounded, found = exact(checkpoint, name), checkpoint.read(name)
        assert found.dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(found, unrounded.bfloat16().view(found.shape)), name
        added = unrounded - exact(base, name)
        bound = 1.01 * unit * (added.abs() + 2 * unrounded.abs())
        assert ((found.double() - tensor.double()).view(-1).abs() <= bound).all(), name
        differing += int((found != tensor).sum())
    assert differing, "PEFT's rounding would be ours"


@pytest.mark.parametrize("kind", ["lora", "dora", "experts"])
def test_threads_read_the_same(kind: str, tmp_path: Path) -> None:
    checkpoint = opened(train(tmp_path, *KINDS[kind]))
    names = sorted(checkpoint.tensors) * 2
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: exact(checkpoint, name), names))
    assert all(torch.equal(tensor, exact(checkpoint, name)) for name, tensor in zip(names, found, strict=True))


# ---- tied embeddings: what the model computed that the adapter was trained in

ON_ONE_SIDE: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 5]}},
    "tokens of both": {
        "target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 5], "embed_tokens": [1]}
    },
}  # fmt: skip
ON_BOTH: dict[str, dict[str, Any]] = {
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "whole embedding": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True
    },
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}  # fmt: skip


def written(trained: Trained, folder: Path) -> Any:
    """The adapted model, written by a merge and loaded as users do, beside PEFT's: logits of both, and the config."""
    recipe = ctl_merge.parse_recipe(f"merge_method: passthrough\nmodels: [{{model: '{trained.both}'}}]\n")
    result = ctl_merge.merge(recipe, folder)
    model, report = auto_class(trained.name).from_pretrained(result.folder, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.arange(1, 41).view(1, -1)
    with torch.inference_mode():
        return model(ids).logits, trained.load(torch.float32)(ids).logits, model.config.tie_word_embeddings


@pytest.mark.parametrize("arguments", ON_ONE_SIDE.values(), ids=ON_ONE_SIDE)
def test_what_changes_one_side_of_a_tie_unties_it(arguments: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs, tied = written(train(tmp_path, "llama", TIED, arguments), tmp_path / "merged")
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not tied


@pytest.mark.parametrize("arguments", ON_BOTH.values(), ids=ON_BOTH)
def test_what_changes_both_sides_alike_leaves_them_tied(arguments: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs, tied = written(train(tmp_path, "llama", TIED, arguments), tmp_path / "merged")
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert tied
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_new_rows_go_to_a_head_that_is_stored_although_it_is_tied(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", TIED, ON_BOTH["tokens"])
    path = trained.base / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    ours, theirs, tied = written(trained, tmp_path / "merged")
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert tied


# ---- through a merge


def folders(tmp_path: Path) -> tuple[Trained, Trained]:
    """Two adapters of different kinds on one base."""
    one = train(tmp_path, *KINDS["lora"])
    return one, train(tmp_path, *KINDS["dora"], base=one.base, seed=1)


def task_arithmetic(base: Path, models: list[Any]) -> ctl_merge.Recipe:
    return ctl_merge.parse_recipe(
        recipe_text("task_arithmetic", [(model, {"weight": 0.4 + 0.2 * i}) for i, model in enumerate(models)], base)
    )


def test_a_merge_of_adapted_models_is_that_of_the_models_that_peft_makes(tmp_path: Path) -> None:
    one, other = folders(tmp_path)
    whole = [tmp_path / "one", tmp_path / "other"]
    for trained, folder in zip((one, other), whole, strict=True):
        trained.merged(folder)
    ours = ctl_merge.open_merge(task_arithmetic(one.base, [one.both, other.both]))
    theirs = ctl_merge.open_merge(task_arithmetic(one.base, whole))
    for name in theirs:
        assert close(exact(ours, name), exact(theirs, name)), name


def test_layers_of_adapted_models_can_be_stacked(tmp_path: Path) -> None:
    one, other = folders(tmp_path)
    text = f"""
merge_method: passthrough
slices:
  - sources: [{{model: '{one.both}', layer_range: [0, 2]}}]
  - sources: [{{model: {{model: '{other.base}', lora: '{other.adapter}'}}, layer_range: [1, 3]}}]
"""
    merged = ctl_merge.open_merge(ctl_merge.parse_recipe(text))
    name = "model.layers.{}.mlp.up_proj.weight".format
    for place, (trained, layer) in enumerate([(one, 0), (one, 1), (other, 1), (other, 2)]):
        assert torch.equal(exact(merged, name(place)), exact(opened(trained), name(layer)))


def test_an_adapter_on_a_merge_of_the_same_file(tmp_path: Path) -> None:
    one = train(tmp_path, *KINDS["lora"])
    text = f"""
name: first
merge_method: linear
models:
  - {{model: '{one.base}', parameters: {{weight: 0.5}}}}
  - {{model: '{one.both}', parameters: {{weight: 0.5}}}}
---
merge_method: passthrough
models: [{{model: 'first+{one.adapter}'}}]
"""
    merge = Merge(ctl_merge.parse_recipe(text))
    assert [ref.text for ref in merge.sources] == [str(one.base), str(one.adapter)]
    assert len(merge.merges) == 2
    merge.fetch()
    base, adapted = open_checkpoint(ModelRef.parse(str(one.base))), opened(one)
    for name in base:
        # half of the adapter's change, then all of it
        expected = 1.5 * exact(adapted, name) - 0.5 * exact(base, name)
        assert torch.allclose(exact(merge.merged, name), expected, rtol=1e-12, atol=1e-14), name


def test_the_first_adapter_of_a_pair_is_another_model_than_the_second(tmp_path: Path) -> None:
    one, other = folders(tmp_path)
    merge = Merge(task_arithmetic(one.base, [one.both, other.both]))
    assert list(merge.checkpoints) == [ModelRef.parse(m) for m in (str(one.base), one.both, other.both)]
    assert [ref.text for ref in merge.sources] == [str(one.base), str(one.adapter), str(other.adapter)]


def test_the_plan_counts_what_an_adapter_takes(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", "llama", UNTIED, {"target_modules": "all-linear"})
    wide = train(tmp_path / "wide", "llama", UNTIED, {"target_modules": "all-linear", "r": 512})
    bytes_ = [Merge(task_arithmetic(t.base, [t.both]), num_workers=2).summary()["bytes"] for t in (plain, wide)]
    sizes = [(t.adapter / "adapter_model.safetensors").stat().st_size for t in (plain, wide)]
    assert bytes_[1]["read"] - bytes_[0]["read"] == pytest.approx(sizes[1] - sizes[0], rel=0.01)
    assert bytes_[1]["memory"] - bytes_[0]["memory"] > 2 * 2 * (512 - 4) * (64 + 96) * 8


def test_a_changed_scale_is_no_work_to_resume(tmp_path: Path) -> None:
    trained = train(tmp_path, *KINDS["lora"])
    recipe = task_arithmetic(trained.base, [trained.both])
    before = Merge(recipe).fingerprint()
    assert Merge(recipe).fingerprint() == before
    change_config(trained.adapter, lora_alpha=60)
    assert Merge(recipe).fingerprint() != before


# ---- adapters that were really trained


@pytest.mark.parametrize("written_as", ["base+adapter", "adapter alone"])
def test_the_adapter_of_the_quickstart(written_as: str, tmp_path: Path) -> None:
    trained = Trained("llama", QUICKSTART / "base", QUICKSTART / "cycle-lora", {})
    text = trained.both if written_as == "base+adapter" else str(trained.adapter)
    checkpoint, expected = open_checkpoint(ModelRef.parse(text)), trained.merged(tmp_path)
    assert set(checkpoint.tensors) == set(expected)
    assert all(close(exact(checkpoint, name), tensor) for name, tensor in expected.items())
    assert checkpoint.warnings == ()
    config = json.loads((checkpoint.folder / "config.json").read_text())
    assert config == json.loads((trained.base / "config.json").read_text()) == checkpoint.config


@pytest.mark.real
@pytest.mark.skipif(not FAMILY.is_dir(), reason="the real model family is not beside the project")
@pytest.mark.parametrize("adapter", ["math-lora", "code-lora"])
def test_adapters_of_a_pretrained_model(adapter: str, tmp_path: Path) -> None:
    trained = Trained("llama", FAMILY / "stories260K", FAMILY / adapter, {})
    checkpoint, expected = open_checkpoint(ModelRef.parse(str(trained.adapter))), trained.merged(tmp_path)
    assert set(checkpoint.tensors) == set(expected)
    assert all(close(exact(checkpoint, name), tensor) for name, tensor in expected.items())
