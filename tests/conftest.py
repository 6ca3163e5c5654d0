"""Fixtures of several files. The suite computes on tiny tensors: a second torch thread only makes it wait."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import pytest
import torch
from checkpoints import recipe_text
from hub_server import HubServer, use_hub

import ctl_merge
from ctl_merge.merging import MergeResult

torch.set_num_threads(1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path)
        yield server


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., MergeResult]:
    """Merge the experts with half of each one's task vector; the keywords are further keys of the recipe."""

    def run(base: Path, *experts: Path, output: str = "merged", machine: Any = None, **keys: Any) -> MergeResult:
        recipe = recipe_text("task_arithmetic", [(path, {"weight": 0.5}) for path in experts], base, **keys)
        return ctl_merge.merge(ctl_merge.parse_recipe(recipe), tmp_path / output, **(machine or {}))

    return run
