"""Adapters merged into one adapter: what PEFT makes of it is the merge of the same recipe, written as a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import KINDS, Trained, train
from safetensors.torch import load_file
from torch import Tensor

import ctl_merge
from ctl_merge.checkpoint import Checkpoint
from ctl_merge.errors import CtlMergeError
from ctl_merge.merging import Merge

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match any targeted module.*:RuntimeWarning"),
]
WEIGHTS = "adapter_model.safetensors"
FAMILY = Path(__file__).parents[2] / "shared" / "models"


def recipe(
    models: list[tuple[Any, Mapping[str, Any]]], base: Path | None, method: str = "task_arithmetic",
    output: Any = None, **keys: Any,
) -> ctl_merge.Recipe:  # fmt: skip
    listed = [{"model": str(model), "parameters": dict(own)} for model, own in models]
    text: dict[str, Any] = {"merge_method": method, "models": listed, "dtype": "float64", **keys}
    if base:
        text["base_model"] = str(base)
    if output is not None:
        text["output"] = output
    return ctl_merge.parse_recipe(json.dumps(text))


def whole(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.read(name).double() for name in checkpoint}


def by_peft(one: Trained, adapter: Path, folder: Path) -> dict[str, Tensor]:
    """The base with the adapter, merged by PEFT in float64."""
    return {n: t.double() for n, t in Trained(one.name, one.base, adapter, {}).merged(folder).items()}


def pair(kind: str, tmp_path: Path) -> tuple[Trained, Trained]:
    one = train(tmp_path, *KINDS[kind])
    return one, train(tmp_path, *KINDS[kind], base=one.base, seed=1)


def agrees(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Equal, relative to the change, and changed at all."""
    changed = 0
    for name, tensor in wanted.items():
        own = found[name] if name in found else found[next(n for n in found if n.endswith(name))]
        before = base.get(name, torch.zeros(()))
        size = float((tensor - before).abs().max()) if name in base else float(tensor.abs().max())
        assert float((own - tensor).abs().max()) <= 1e-9 * max(size, 1e-3), name
        changed += size > 0
    assert changed


# Those of which a merge takes another way each; the others differ in how they are read only.
DIFFERENT = [
    kind for kind in KINDS
    if kind not in ("rslora", "patterns of rslora", "head", "embedding by dora", "square experts",
                    "square stacked experts", "conv1d", "kernels by dora", "experts of qwen3_moe", "tokens")
]  # fmt: skip


@pytest.mark.parametrize("kind", DIFFERENT)
def test_a_merge_of_two_adapters_of_every_kind(kind: str, tmp_path: Path) -> None:
    one, other = pair(kind, tmp_path)
    models: list[tuple[Any, Mapping[str, Any]]] = [(one.both, {"weight": 0.6}), (other.both, {"weight": -0.7})]
    result = ctl_merge.merge(recipe(models, one.base, output="lora"), tmp_path / "merged")
    full = whole(ctl_merge.open_merge(recipe(models, one.base)))
    base = {n: t.double() for n, t in load_file(one.base / "model.safetensors").items()}
    agrees(by_peft(one, result.folder, tmp_path / "whole"), full, base)


@pytest.mark.parametrize("kind", ["patterns", "conv1d", "experts"])
def test_one_adapter_at_weight_1_is_itself(kind: str, tmp_path: Path) -> None:
    """Its very factors, bit for bit, and its scales."""
    one = train(tmp_path, *KINDS[kind])
    result = ctl_merge.merge(recipe([(one.both, {"weight": 1})], one.base, output="lora", dtype=None), tmp_path / "out")
    before, after = load_file(one.adapter / WEIGHTS), load_file(result.folder / WEIGHTS)
    factors = {name: tensor for name, tensor in before.items() if "lora_" in name}
    assert set(after) == set(factors)
    assert all(torch.equal(after[name], tensor) for name, tensor in factors.items())
    assert result.manifest["adapter"]["summary"]["error"] < 1e-15


def test_factors_side_by_side_where_they_fit(tmp_path: Path) -> None:
    """[c B, c' B'] [A; A'], both adapters' scale kept."""
    one, other = pair("lora", tmp_path)
    models: list[tuple[Any, Mapping[str, Any]]] = [(one.both, {"weight": 0.5}), (other.both, {"weight": 2})]
    result = ctl_merge.merge(recipe(models, one.base, output={"lora": {"rank": 8}}), tmp_path / "out")
    first, second, both = (load_file(f / WEIGHTS) for f in (one.adapter, other.adapter, result.folder))
    a = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    b = a.replace("lora_A", "lora_B")
    assert torch.equal(both[a], torch.cat([first[a], second[a]]).double())
    assert torch.equal(both[b], torch.cat([0.5 * first[b].double(), 2 * second[b].double()], dim=1))
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 12)  # 6 / 4, as in both
    assert config["base_model_name_or_path"] == "base" and str(tmp_path) not in json.dumps(config)


@pytest.mark.parametrize(("method", "own", "shared"), [
    ("ties", {"weight": 1, "density": 0.4}, {}), ("ties", {"weight": 1, "density": 0.4}, {"trim": "model"}),
    ("dare_linear", {"weight": 1, "density": 0.5}, {}), ("metagpt", {}, {}), ("knots", {"weight": 0.5}, {}),
    ("linear", {"weight": 0.5}, {}), ("model_stock", {}, {}),
])  # fmt: skip
def test_every_method_works_on_the_products(
    method: str, own: dict[str, Any], shared: dict[str, Any], tmp_path: Path
) -> None:
    """The merged change is that of the merge written as a model, whole-model statistics included."""
    one, other = pair("lora", tmp_path)
    base = None if method == "linear" else one.base
    models: list[tuple[Any, Mapping[str, Any]]] = [(one.both, own), (other.both, own)]
    result = ctl_merge.merge(recipe(models, base, method, "lora", parameters=shared), tmp_path / "merged")
    full = whole(ctl_merge.open_merge(recipe(models, base, method, parameters=shared)))
    before = {n: t.double() for n, t in load_file(one.base / "model.safetensors").items()}
    agrees(by_peft(one, result.folder, tmp_path / "whole"), full, before)


def test_too_small_a_rank_loses_what_is_told(tmp_path: Path) -> None:
    """The best approximation, its error measured: against numpy's singular values."""
    one, other = pair("lora", tmp_path)
    models: list[tuple[Any, Mapping[str, Any]]] = [(one.both, {"weight": 1}), (other.both, {"weight": 1})]
    result = ctl_merge.merge(recipe(models, one.base, output={"lora": {"rank": 3}}), tmp_path / "out")
    full = ctl_merge.open_merge(recipe(models, one.base))
    before = load_file(one.base / "model.safetensors")
    for own in result.manifest["adapter"]["parameters"]:
        delta = full.read(own["parameter"]).double() - before[own["parameter"]].double()
        values = torch.linalg.svdvals(delta).square()
        assert own["rank"] == 3
        assert own["energy"] == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-9)
        assert own["error"] == pytest.approx(float(values[3:].sum() / values.sum()) ** 0.5, rel=1e-6)
    card = (result.folder / "README.md").read_text()
    assert "library_name: peft" in card and "model.layers.0.self_attn.q_proj.weight | truncated SVD | 3 |" in card


def test_the_base_is_not_read(tmp_path: Path) -> None:
    """Of a base whose weights are nonsense, and gone after the plan, the adapter is the same."""
    one, other = pair("lora", tmp_path)
    models: list[tuple[Any, Mapping[str, Any]]] = [(one.both, {"weight": 1}), (other.both, {"weight": 1})]
    wanted = ctl_merge.merge(recipe(models, one.base, output="lora"), tmp_path / "wanted")
    merge = Merge(recipe(models, one.base, output="lora"))
    assert merge.lora and not merge.lora.needs_base
    sizes = sum((t.adapter / WEIGHTS).stat().st_size for t in (one, other))
    assert merge.summary()["bytes"]["read"] < sizes
    path = one.base / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"\xff" * 1000)
    found = merge.write(tmp_path / "found")
    assert (found.folder / WEIGHTS).read_bytes() == (wanted.folder / WEIGHTS).read_bytes()


def refused(message: str, made: ctl_merge.Recipe) -> None:
    with pytest.raises(CtlMergeError, match=message):
        Merge(made).write(Path("/nonexistent/never"))


def test_what_is_no_merge_of_adapters_is_refused(tmp_path: Path) -> None:
    one = train(tmp_path, *KINDS["lora"])
    far = train(tmp_path / "far", *KINDS["lora"])
    refused("is a whole model.*extract-lora", recipe([(one.both, {"weight": 1}), (far.base, {"weight": 1})], one.base,
                                                     output="lora"))  # fmt: skip
    refused("is on another base", recipe([(one.both, {"weight": 1}), (far.both, {"weight": 1})], one.base,
                                         output="lora"))  # fmt: skip
    merge = Merge(recipe([(one.both, {"scale": 0.5})], None, "passthrough", "lora"))
    with pytest.raises(CtlMergeError, match="which no adapter touches"):
        merge.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for text in ("{lora: {rank: 0}}", "{lora: {ranks: 3}}", "loras", "{}"):
        with pytest.raises(CtlMergeError, match="line 4"):
            ctl_merge.parse_recipe(
                f"merge_method: linear\nmodels:\n  - {{model: '{one.both}', parameters: {{weight: 1}}}}\noutput: {text}"
            )


def test_a_broken_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair("lora", tmp_path)
    made = recipe([(one.both, {"weight": 1}), (other.both, {"weight": 1})], one.base, output={"lora": {"rank": 2}})
    wanted = ctl_merge.merge(made, tmp_path / "wanted")
    from ctl_merge.adapter_fit import Fit

    fitted, calls = Fit.hold, []

    def failing(self: Fit, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return fitted(self, *arguments)

    monkeypatch.setattr(Fit, "hold", failing)
    with pytest.raises(KeyboardInterrupt):
        Merge(made, num_workers=1).write(tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "parts").is_dir()
    again = Merge(made, num_workers=1).write(tmp_path / "out", resume=True)
    assert len(calls) < 9 + 22 - 4
    assert {p.name for p in again.folder.iterdir()} == {p.name for p in wanted.folder.iterdir()}
    for file in (WEIGHTS, "adapter_config.json"):
        assert (again.folder / file).read_bytes() == (wanted.folder / file).read_bytes()


@pytest.mark.real
@pytest.mark.skipif(not FAMILY.is_dir(), reason="the real model family is not beside the project")
def test_the_adapters_of_a_pretrained_model(tmp_path: Path) -> None:
    math = Trained("llama", FAMILY / "stories260K", FAMILY / "math-lora", {})
    models: list[tuple[Any, Mapping[str, Any]]] = [
        (math.both, {"weight": 0.6}),
        (FAMILY / "code-lora", {"weight": 0.4}),
    ]
    result = ctl_merge.merge(recipe(models, math.base, output={"lora": {"rank": 16}}), tmp_path / "merged")
    full = whole(ctl_merge.open_merge(recipe(models, math.base)))
    base = {n: t.double() for n, t in load_file(math.base / "model.safetensors").items()}
    agrees(by_peft(math, result.folder, tmp_path / "whole"), full, base)
