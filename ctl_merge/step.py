"""A merge within a merge: read, never written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.deferred import Tensor
from ctl_merge.header import TensorSpec
from ctl_merge.reference import ModelRef

if TYPE_CHECKING:
    from ctl_merge.merging import Merge


class StepCheckpoint(FileCheckpoint):
    """An earlier merge of the same recipe file, as a model of a later one.

    Its weights are merged when they are read, and are not rounded to its dtype in between. Only the small files
    (config, tokenizer) lie in a folder, for as long as this lives.
    """

    def __init__(self, ref: ModelRef, opened: Merge) -> None:
        self.ref, self.name, self.opened = ref, str(ref), opened
        self.snapshot, self.file_sizes = None, {}
        self.tensors: Mapping[str, TensorSpec] = opened.plan.specs
        self.config = opened.merged.config
        self._tied = dict(opened.plan.tied)
        self.held_bytes = sum(checkpoint.held_bytes for checkpoint in opened.checkpoints.values())

    @cached_property
    def folder(self) -> Path:  # type: ignore[override]
        """Config and tokenizer, as the merge would write them."""
        self._held = tempfile.TemporaryDirectory(prefix="ctl-merge-step-")
        self.opened.write_companions(Path(self._held.name))
        return Path(self._held.name)

    def fetch(self) -> None:
        self.opened.fetch()

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        merged = self.opened.merged
        # A head that turned out to be tied when the weights were there is its embedding.
        merged.read_into(tensor if tensor in merged.tensors else self._tied[tensor], out, start)

    def block(self, tensor: str) -> int:
        merged = self.opened.merged
        return merged.block(tensor if tensor in merged.tensors else self._tied[tensor])

    def sources(self) -> dict[ModelRef, FileCheckpoint]:
        return self.opened.sources

    def read_bytes(self, tensor: str) -> int:
        plan = self.opened.plan.tensors.get(tensor) or self.opened.plan.tensors[self._tied[tensor]]
        return sum(self.opened.checkpoints[part.model].read_bytes(part.tensor) for part in plan.everyone)
