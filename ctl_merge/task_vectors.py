"""Differences from a base; those of adapters without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ctl_merge.adapter import AdaptedCheckpoint
from ctl_merge.checkpoint import Checkpoint, FileCheckpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.header import TensorSpec
from ctl_merge.reference import ModelRef


class Difference(Checkpoint):
    """What a checkpoint adds to a base that has the same tensors, in float64."""

    def __init__(self, checkpoint: Checkpoint, base: Checkpoint) -> None:
        self.name, self.checkpoint, self.base = checkpoint.name, checkpoint, base
        self.tensors, self.config = checkpoint.tensors, checkpoint.config

    def block(self, tensor: str) -> int:
        return self.checkpoint.block(tensor)

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        exact = out if out.dtype == torch.float64 else torch.empty_like(out, dtype=torch.float64)
        before = torch.empty_like(exact)
        self.checkpoint.read_into(tensor, exact, start)
        self.base.read_into(tensor, before, start)
        exact -= before
        if exact is not out:
            out.copy_(exact)


class AdapterChange(FileCheckpoint):
    """What an adapter adds to its base, as a model would be whose base is zero; `adapted` None: nothing, the base.

    A merge of task vectors over these is the merged task vector. The base is read only where the adapter's change
    depends on it: DoRA, replaced rows, and whole modules.
    """

    def __init__(self, checkpoint: FileCheckpoint, adapted: AdaptedCheckpoint | None) -> None:
        self.ref, self.name, self.adapted = checkpoint.ref, checkpoint.name, adapted
        self.tensors: Mapping[str, TensorSpec] = checkpoint.tensors
        self.config, self.folder = checkpoint.config, checkpoint.folder
        self.snapshot, self.file_sizes = None, {}

    def alters(self, tensor: str) -> bool:
        """Whether the tensor differs from the base's."""
        change = self.adapted and self.adapted.changes.get(tensor)
        return bool(change and change.alters)

    @property
    def needs_base(self) -> bool:
        changes = self.adapted.changes.values() if self.adapted else ()
        return any(change.alters and not change.is_sum for change in changes)

    def fetch(self) -> None:
        if self.adapted:
            (self.adapted if self.needs_base else self.adapted.adapter).fetch()

    def sources(self) -> dict[ModelRef, FileCheckpoint]:
        return {self.adapted.adapter.ref: self.adapted.adapter} if self.adapted else {}

    def read_bytes(self, tensor: str) -> int:
        if not self.adapted or not self.alters(tensor):
            return 0
        change = self.adapted.changes[tensor]
        unread = self.adapted.base.read_bytes(change.own) if change.is_sum and change.own else 0
        return self.adapted.read_bytes(tensor) - unread

    def working_bytes(self) -> int:
        return self.adapted.working_bytes() if self.adapted else 0

    def block(self, tensor: str) -> int:
        return self.adapted.block(tensor) if self.adapted else super().block(tensor)

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        if self.adapted:
            self.adapted.read_change_into(tensor, out, start)
        else:
            out.zero_()


class BaseView(Checkpoint):
    """A base under the names that a merge of its adapters has for its tensors: a head may be tied in the base alone."""

    def __init__(self, merged: Checkpoint, base: FileCheckpoint, adapted: Sequence[AdaptedCheckpoint]) -> None:
        self.name, self.base = base.name, base
        self.tensors, self.config = merged.tensors, base.config
        origins = {n: change.own for each in adapted for n, change in each.changes.items() if change.own}
        self._own = {name: name if name in base.tensors else origins.get(name, name) for name in merged.tensors}

    def block(self, tensor: str) -> int:
        return self.base.block(self._own[tensor])

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        self.base.read_into(self._own[tensor], out, start)
