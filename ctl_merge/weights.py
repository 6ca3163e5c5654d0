"""A merge and its parents in weight space: inner products of task vectors, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ctl_merge.checkpoint import CHUNK, Checkpoint
from ctl_merge.header import MERGEABLE


@dataclass(frozen=True)
class TaskGrams:
    """Per tensor, inner products of [τ_1 .. τ_k, θ_0, τ_m ..] in float64: (k + 1 + merges) squared."""

    parents: int
    grams: dict[str, np.ndarray]

    def total(self, names: Iterable[str] | None = None) -> np.ndarray:
        """The sum over some tensors, all by default."""
        chosen = list(self.grams if names is None else names)
        size = next(iter(self.grams.values())).shape
        return sum((self.grams[name] for name in chosen), np.zeros(size))

    def coefficients(self, gram: np.ndarray, merge: int) -> tuple[np.ndarray, float]:
        """ĉ_w = argmin ‖τ_m - Σ c_i τ_i‖² and the share R²_w of τ_m that is explained; merge counts from 0."""
        k, at = self.parents, self.parents + 1 + merge
        normal, right, whole = gram[:k, :k], gram[:k, at], gram[at, at]
        found = np.linalg.lstsq(normal, right, rcond=1e-10)[0]
        left = whole - 2 * found @ right + found @ normal @ found
        return found, float(np.clip(1 - left / whole, 0, 1)) if whole > 0 else float("nan")


def task_grams(
    base: Checkpoint, parents: Sequence[Checkpoint], merges: Sequence[Checkpoint],
    mapped: Callable[[Callable[[str], np.ndarray], Iterable[str]], Iterator[np.ndarray]] = map,  # type: ignore[assignment]
) -> TaskGrams:  # fmt: skip
    """Read every floating-point tensor of all checkpoints once, in chunks; `mapped` may work in parallel."""
    names = [name for name, spec in base.tensors.items() if spec.dtype in MERGEABLE and spec.numel]

    def of(name: str) -> np.ndarray:
        total = torch.zeros(len(parents) + 1 + len(merges), len(parents) + 1 + len(merges), dtype=torch.float64)
        numel, step = base.tensors[name].numel, max(base.block(name), *(m.block(name) for m in merges), CHUNK)
        for start in range(0, numel, step):
            rows = [_read(c, name, start, min(step, numel - start)) for c in (*parents, base, *merges)]
            stack = torch.stack(rows)
            own = stack[len(parents)].clone()
            stack -= own
            stack[len(parents)] = own
            total += stack @ stack.T
        return total.numpy()

    return TaskGrams(len(parents), dict(zip(names, mapped(of, names), strict=True)))


def _read(checkpoint: Checkpoint, name: str, start: int, count: int) -> Tensor:
    out = torch.empty(count, dtype=torch.float64)
    checkpoint.read_into(name, out, start)
    return out
