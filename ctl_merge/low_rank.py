"""Low-rank changes, row by row of a stored matrix."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ctl_merge.deferred import Tensor, torch
from ctl_merge.header import TensorSpec

_KEPT = 4  # A and B of one module, and of the one that is read in turn with it: experts' matrices alternate


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a tensor (rows, columns), or (experts, rows, columns) where experts are stacked.

    a: tensor of the adapter, (experts · rank, inputs); b: (outputs, rank · experts). `transposed`: a row of the stored
    matrix is an input. `expert`: the tensor is this one's; None: all experts', one after the other. `row`: which row
    its first is. `magnitude`: DoRA's norm of each output (2402.09353). Kernels of convolutions are matrices (outputs,
    inputs · kernel).
    """

    a: str
    b: str
    scale: float
    rank: int
    transposed: bool = False
    experts: int = 1
    expert: int | None = None
    row: int = 0
    magnitude: str | None = None

    def rows(self, read: Callable[[str], Tensor], first: int, end: int, per_expert: int) -> Tensor:
        """Rows [first, end) of the stored tensor, float64; `per_expert`: how many there are of one expert."""
        if self.expert is not None or self.experts == 1:
            return self._product(read, self.expert or 0, self.row + first, self.row + end)
        found = []
        while first < end:
            expert, row = divmod(first, per_expert)
            count = min(end - first, per_expert - row)
            found.append(self._product(read, expert, row, row + count))
            first += count
        return torch.cat(found)

    def _product(self, read: Callable[[str], Tensor], expert: int, first: int, end: int) -> Tensor:
        a, b = read(self.a), read(self.b)
        a = a.reshape(self.experts, self.rank, -1)[expert]
        b = b.reshape(b.shape[0], self.rank, self.experts)[:, :, expert]
        left, right = (a[:, first:end].T, b.T) if self.transposed else (b[first:end], a)
        return (left.double() @ right.double()).mul_(self.scale)


class Recent:
    """Reads tensors and keeps the last few, for each thread: those of one module are asked for again and again."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read, self._kept = read, threading.local()

    @staticmethod
    def held_bytes(specs: Iterable[TensorSpec]) -> int:
        """What each thread keeps of such tensors, at most, and two of them in float64."""
        largest = sorted(specs, key=lambda spec: -spec.nbytes)[:_KEPT]
        return sum(spec.nbytes for spec in largest) + 8 * sum(spec.numel for spec in largest[:2])

    def __call__(self, name: str) -> Tensor:
        kept: OrderedDict[str, Tensor] = self._kept.__dict__.setdefault("tensors", OrderedDict())
        if name in kept:
            kept.move_to_end(name)
            return kept[name]
        while len(kept) >= _KEPT:
            kept.popitem(last=False)
        kept[name] = self._read(name)
        return kept[name]
