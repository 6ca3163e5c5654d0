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


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_two_adapters_of_every_kind(kind: str, tmp_path: Path) -> None:
    one, other = pair(kind, tmp_path)
    models: list[tuple[Any, Mapping[str, Any]]] = [(one.both, {"weight": 0.6}), (other.both, {"weight": -0.7})]
    result = ctl_merge.merge(recipe(models, one.base, output="lora"), tmp_path / "merged")
    full = whole(ctl_merge.open_merge(recipe(models, one.base)))
    base = {n: t.double() for n, t in load_file(one.base / "model.safetensors").items()}
    agrees(by_peft(one, result.folder, tmp_path / "whole"), full, base)
