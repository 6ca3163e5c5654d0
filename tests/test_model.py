"""A checkpoint as a transformers model: what `from_pretrained` gives, in memory or streamed."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from probe_references import Family, inputs_of, load, one_thread_a_model, open_merge, stacks, write_family  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny_architectures import ARCHITECTURES, VOCABULARY, build
from torch import Tensor, nn

from ctl_merge.architecture import empty_model
from ctl_merge.checkpoint import Checkpoint
from ctl_merge.dispatch import Placement
from ctl_merge.errors import CheckpointError
from ctl_merge.model import load_weights
from ctl_merge.reference import ModelRef
from ctl_merge.stacks import every_block, find_blocks
from ctl_merge.stored import open_checkpoint

NO_TEXT = ("whisper", "vit", "swin", "clip")
TIED = ("gemma2", "falcon", "gpt2", "opt", "mamba", "bert", "distilbert", "t5", "bart", "gemma3")

DISK = Placement(stays={"": "disk"})

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda name: write_family(folder / name, name, prepare=fill_buffers))


def fill_buffers(model: nn.Module) -> None:
    """Buffers that belong to the state get values that no fresh model has."""
    for name, buffer in model.named_buffers():
        if name in model.state_dict() and buffer.is_floating_point():
            buffer += torch.linspace(-0.5, 0.5, buffer.numel()).view_as(buffer)


def stored(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelRef.parse(str(folder)))


def same_state(one: nn.Module, other: nn.Module) -> None:
    """Parameter by parameter and buffer by buffer, those that are in no file too."""
    for kind in ("named_parameters", "named_buffers"):
        a, b = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (one, other))
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, VOCABULARY - 30, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(**inputs_of(model, ids), use_cache=False).logits


# ---- every architecture


@every_architecture
def test_a_checkpoint_is_the_model_that_from_pretrained_gives(name: str, family: Callable[[str], Family]) -> None:
    folder = family(name).parents["1"]
    wanted, found = load(name, folder), load_weights(stored(folder))
    assert type(found) is type(wanted) and not found.training
    same_state(found, wanted)
    if name not in NO_TEXT:
        streamed = load_weights(stored(folder), DISK)
        assert torch.equal(logits(found), logits(wanted))
        assert torch.equal(logits(streamed), logits(wanted))
        assert all(parameter.is_meta for parameter in streamed.parameters())


# ---- merges


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "deepseek_v3", "gemma2", "t5", "bert", "jamba"])
@pytest.mark.parametrize("streamed", [False, True], ids=["in_memory", "streamed"])
def test_a_lazy_merge_is_the_model_loaded_from_the_written_one(
    name: str, streamed: bool, family: Callable[[str], Family], tmp_path: Path
) -> None:
    merge = open_merge(family(name), (0.7, 0.4))
    merge.write(tmp_path / "written")
    found = load_weights(merge.merged, DISK if streamed else None)
    assert torch.equal(logits(found), logits(load(name, tmp_path / "written")))


def test_a_merge_in_bfloat16_runs_unrounded_or_as_written(family: Callable[[str], Family], tmp_path: Path) -> None:
    merge = open_merge(family("llama"), (0.7, 0.4), dtype="bfloat16")
    merge.write(tmp_path / "written")
    whole = open_merge(family("llama"), (0.7, 0.4))
    whole.fetch()
    same_state(load_weights(merge.merged, as_written=True), load("llama", tmp_path / "written"))
    same_state(load_weights(merge.merged), load_weights(whole.merged))


# ---- ties, buffers


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_are_one_parameter(name: str, family: Callable[[str], Family]) -> None:
    wanted = load(name, family(name).base)
    found = load_weights(stored(family(name).base))
    names = [n for n, _ in wanted.named_parameters(remove_duplicate=False)]
    assert {n for n, _ in found.named_parameters()} == {n for n, _ in wanted.named_parameters()} != set(names)
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in wanted.parameters())


@pytest.mark.parametrize("name", TIED)
def test_a_head_of_its_own_is_used(name: str, tmp_path: Path) -> None:
    model = build(name, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    found, wanted = load_weights(stored(tmp_path)), load(name, tmp_path)
    same_state(found, wanted)
    assert torch.equal(logits(found), logits(wanted))
    assert torch.equal(logits(load_weights(stored(tmp_path), DISK)), logits(wanted))


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "opt"])
def test_a_stored_head_wins_over_a_config_that_ties(name: str, family: Callable[[str], Family], tmp_path: Path) -> None:
    """As in from_pretrained: a merge of models of which one was untied is such a checkpoint."""
    base = family(name).base
    tensors = load_file(base / "model.safetensors")
    head = build(name).get_output_embeddings().weight.detach()
    tensors["lm_head.weight"] = torch.randn(head.shape, generator=torch.Generator().manual_seed(1))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    found = load_weights(stored(tmp_path))
    assert torch.equal(found.get_output_embeddings().weight, tensors["lm_head.weight"])
    assert torch.equal(logits(found), logits(load(name, tmp_path)))


@pytest.mark.parametrize("streamed", [False, True], ids=["in_memory", "streamed"])
def test_buffers_that_are_stored_are_read(streamed: bool, family: Callable[[str], Family]) -> None:
    """The router of DeepSeek-V3 chooses experts by a bias that is a buffer."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    found = load_weights(stored(family("deepseek_v3").base), DISK if streamed else None).state_dict()[name]
    assert torch.equal(found, torch.linspace(-0.5, 0.5, 4))


# ---- memory


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "mamba", "jamba", "t5", "llama4_text"])
def test_streaming_holds_the_weights_of_one_block_at_most(name: str, family: Callable[[str], Family]) -> None:
    model = load_weights(stored(family(name).base), DISK)
    blocks = every_block(find_blocks(model))
    seen: list[tuple[list[str], list[str]]] = []

    def look(*_: object) -> None:
        held = [n for n, p in model.named_parameters() if not p.is_meta]
        of_blocks = {site for site in blocks for n in held if n.startswith(f"{site}.")}
        seen.append((sorted(of_blocks), [n for n in held if not any(n.startswith(f"{site}.") for site in blocks)]))

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    logits(model)
    assert any(inside for inside, _ in seen)
    assert all(len(inside) + bool(outside) <= 1 and len(outside) <= 2 for inside, outside in seen), seen
    assert all(parameter.is_meta for parameter in model.parameters())


# ---- what cannot be run


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((folder / "config.json").read_text()), **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["FancyForCausalLM"]}, "transformers has no 'FancyForCausalLM'"),
        ({"model_type": "fancy"}, "transformers has no model_type 'fancy'"),
        ({"architectures": None}, "config.json has no `architectures`"),
    ],
    ids=["class", "type", "none"],
)
def test_an_architecture_that_transformers_lacks_is_named(
    changes: dict[str, Any], message: str, family: Callable[[str], Family]
) -> None:
    with pytest.raises(CheckpointError, match=f"^org/name: {message}"):
        empty_model(config_of(family("llama").base, **changes), "org/name")


def test_code_that_comes_with_a_model_is_not_run(family: Callable[[str], Family], tmp_path: Path) -> None:
    changes = {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling.OwnForCausalLM"}}
    folder = write_checkpoint(tmp_path, {"w": torch.ones(2)}, config_of(family("llama").base, **changes))
    (folder / "modeling.py").write_text("raise SystemExit('run')")
    with pytest.raises(CheckpointError, match="brings code of its own"):
        load_weights(stored(folder))


def test_weights_that_are_missing_are_named(family: Callable[[str], Family], tmp_path: Path) -> None:
    base = family("llama").base
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    folder = write_checkpoint(tmp_path, tensors, config_of(base))
    with pytest.raises(CheckpointError, match=r"no weights for 1 parameters, such as model.layers.1.mlp.up_proj"):
        load_weights(stored(folder))
