"""Vocabularies that differ: whose tokens the output has, and which rows of which models they get."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import recipe_text
from safetensors.torch import load_file
from torch import Tensor

import ctl_merge
from ctl_merge.merging import MergeResult

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Merged = Callable[..., MergeResult]


@pytest.fixture
def merged(tmp_path: Path) -> Merged:
    """Merge the experts with half of each one's task vector; the keywords are further keys of the recipe."""

    def run(base: Path, *experts: Path, output: str = "merged", machine: Any = None, **keys: Any) -> MergeResult:
        recipe = recipe_text("task_arithmetic", [(path, {"weight": 0.5}) for path in experts], base, **keys)
        return ctl_merge.merge(ctl_merge.parse_recipe(recipe), tmp_path / output, **(machine or {}))

    return run


def state(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def configure(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**read_json(folder / "config.json"), **changes}))
