"""The suite computes on tiny tensors: more than one torch thread only makes it wait for the others."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

from typing import Any

import pytest
import torch
from definitions_evidence import MADE_UP, MadeUp

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
