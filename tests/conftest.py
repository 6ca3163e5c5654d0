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
from definitions_evidence import MADE_UP, MadeUp
from hub_server import TOKEN, HubServer, use_hub

import ctl_merge
from ctl_merge.merging import MergeResult

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def made_up_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes whose text is MADE_UP get made-up statistics: their models cannot run."""
    from ctl_merge import merging

    real = merging.TextEvidence

    def make(kind: Any, texts: Any, checkpoints: Any) -> Any:
        if all(spec.source != MADE_UP for specs in texts.specs.values() for spec in specs):
            return real(kind, texts, checkpoints)
        return MadeUp(kind, {name: spec.shape for c in checkpoints.values() for name, spec in c.tensors.items()})

    monkeypatch.setattr(merging, "TextEvidence", make)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path)
        yield server


@pytest.fixture
def hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub, with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., MergeResult]:
    """Merge the experts with half of each one's task vector; the keywords are further keys of the recipe."""

    def run(base: Path, *experts: Path, output: str = "merged", machine: Any = None, **keys: Any) -> MergeResult:
        recipe = recipe_text("task_arithmetic", [(path, {"weight": 0.5}) for path in experts], base, **keys)
        return ctl_merge.merge(ctl_merge.parse_recipe(recipe), tmp_path / output, **(machine or {}))

    return run
