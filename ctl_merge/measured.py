"""Results of measures, kept beside an unfinished output."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctl_merge.deferred import Tensor, torch
from ctl_merge.measures import Results
from ctl_merge.merged import MergedCheckpoint

MEASURED = "measured"


def keep(merges: Sequence[MergedCheckpoint], folder: Path, process: str = "") -> None:
    """Write down what the merges know of their whole models and, where they tell of them, of their tensors."""
    data = [
        {
            tensor: {name: _plain(value) for name, value in results.items()}
            for tensor, results in merged.measures.known().items()
            if results and (tensor == "" or merged.method.report)
        }
        for merged in merges
    ]
    if any(data):
        whole = folder / f"{MEASURED}{process}"
        part = folder / f"{MEASURED}{process}.{os.getpid()}.new"
        part.write_text(json.dumps(data), "utf-8")
        os.replace(part, whole)


def recall(merges: Sequence[MergedCheckpoint], folder: Path) -> None:
    """Give the merges what an interrupted run of the same merge, or another process of it, wrote down."""
    for path in sorted(folder.glob(f"{MEASURED}*")):
        if not path.name.endswith(".new"):
            for merged, known in zip(merges, json.loads(path.read_text("utf-8")), strict=True):
                merged.measures.recall({tensor: _results(found) for tensor, found in known.items()})


def _plain(value: Tensor) -> list[Any]:
    return [str(value.dtype).removeprefix("torch."), list(value.shape), value.flatten().tolist()]


def _results(found: dict[str, list[Any]]) -> Results:
    return {
        name: torch.tensor(values, dtype=getattr(torch, dtype)).view(shape)
        for name, (dtype, shape, values) in found.items()
    }
