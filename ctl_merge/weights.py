"""Inner products of task vectors, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ctl_merge.checkpoint import CHUNK, Checkpoint, chunks, torch_dtype
from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import NonFiniteError
from ctl_merge.header import MERGEABLE
from ctl_merge.methods.order import count_upper, locate
from ctl_merge.methods.sparsify import kept_ranks


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


def _require_finite(gram: Tensor, name: str, rows: Sequence[Checkpoint]) -> None:
    bad = [c.name for c, square in zip(rows, gram.diagonal(), strict=True) if not torch.isfinite(square)]
    if bad:
        raise NonFiniteError(
            f"{name} holds NaN, infinity or numbers too large to be squared, in {' or '.join(bad)} or its base: there "
            "is nothing linear to measure. Use intact models; `ctl-merge compare` counts such entries."
        )


def task_grams(
    base: Checkpoint, parents: Sequence[Checkpoint], merges: Sequence[Checkpoint],
    mapped: Callable[[Callable[[str], np.ndarray], Iterable[str]], Iterator[np.ndarray]] = map,  # type: ignore[assignment]
) -> TaskGrams:  # fmt: skip
    """Read every floating-point tensor of all checkpoints once, in chunks; `mapped` may work in parallel.

    Raises NonFiniteError for NaN, infinity, and values whose squares have no sum in float64.
    """
    everyone = (*parents, base, *merges)
    names = [name for name, spec in base.tensors.items() if spec.dtype in MERGEABLE and spec.numel]

    def of(name: str) -> np.ndarray:
        total = torch.zeros(len(parents) + 1 + len(merges), len(parents) + 1 + len(merges), dtype=torch.float64)
        numel, step = base.tensors[name].numel, max(base.block(name), *(m.block(name) for m in merges), CHUNK)
        for start in range(0, numel, step):
            stack = torch.stack([_read(c, name, start, min(step, numel - start)) for c in everyone])
            own = stack[len(parents)].clone()
            stack -= own
            stack[len(parents)] = own
            total += stack @ stack.T
        _require_finite(total, name, everyone)
        return total.numpy()

    return TaskGrams(len(parents), dict(zip(names, mapped(of, names), strict=True)))


def _read(checkpoint: Checkpoint, name: str, start: int, count: int) -> Tensor:
    out = torch.empty(count, dtype=torch.float64)
    checkpoint.read_into(name, out, start)
    return out


@dataclass(frozen=True)
class TensorStatistics:
    """What a tensor, or the sum over several, says of a merge of k parents. All are sums over entries.

    Entries where any of the models, or the merge, is not finite are counted in `nonfinite` and left out of the rest.
    """

    gram: np.ndarray  # inner products of [τ_1 .. τ_k, θ_0, τ_m], float64: (k + 2, k + 2)
    voters: np.ndarray  # entries in which so many task vectors take part: (densities, k + 1)
    conflicts: np.ndarray  # those in which two of them have opposite signs: (densities,)
    rounding: float  # ‖round(θ_m) - θ_m‖², rounded to the dtype of the output
    nonfinite: np.ndarray  # of the parents, the base, the merge, the rounded merge where the merge was finite: (k + 3,)
    numel: int
    tensors: int = 1

    def __add__(self, other: TensorStatistics) -> TensorStatistics:
        return TensorStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def tensor_statistics(
    name: str, base: Checkpoint, parents: Sequence[Checkpoint], merged: Checkpoint, densities: Sequence[float]
) -> TensorStatistics:
    """Read one tensor of all models, in chunks, the parents twice if a density is below 1.

    A task vector takes part in an entry at density d if its entry is not zero and among the ⌊d N⌋ largest magnitudes
    of its tensor, N entries. The cut is the ⌊d N⌋-th largest magnitude, rounded down to a bfloat16: what lies within
    1 % of it takes part too, so that one pass over magnitudes finds all cuts.
    """
    k, numel = len(parents), merged.tensors[name].numel
    dtype = torch_dtype(merged.tensors[name].dtype)
    cuts = _cuts(name, base, parents, numel, densities)
    gram, rounding = torch.zeros(k + 2, k + 2, dtype=torch.float64), 0.0
    voters, conflicts = np.zeros((len(densities), k + 1), np.int64), np.zeros(len(densities), np.int64)
    nonfinite = np.zeros(k + 3, np.int64)
    for stack in _stacks(name, base, parents, numel, merged):
        rounded = stack[-1].to(dtype).double()
        if not math.isfinite(float(stack.sum())) or not math.isfinite(float(rounded.sum())):
            nonfinite += _drop_nonfinite(stack, rounded)
        rounding += float((rounded - stack[-1]).square().sum())
        stack[:k] -= stack[k]
        stack[-1] -= stack[k]
        gram += stack @ stack.T
        deltas = stack[:k].float().numpy()
        for at, cut in enumerate(cuts):
            counts, opposed = _count_signs(deltas, cut)
            voters[at] += counts
            conflicts[at] += opposed
    return TensorStatistics(gram.numpy(), voters, conflicts, rounding, nonfinite, numel)


def _stacks(
    name: str, base: Checkpoint, parents: Sequence[Checkpoint], numel: int, merged: Checkpoint | None = None
) -> Iterator[Tensor]:
    """Chunks of [θ_1 .. θ_k, θ_0, θ_m] in float64, one buffer: (k + 1 or k + 2, n), overwritten by the next."""
    sources = (*parents, base)
    buffer = torch.empty(len(sources) + (merged is not None), min(CHUNK, numel), dtype=torch.float64)
    step = merged.block(name) if merged else numel
    for first in range(0, numel, step):
        count = min(step, numel - first)
        if merged and step > CHUNK:
            block = torch.empty(count, dtype=torch.float64)
            merged.read_into(name, block, first)
        for begin, end in chunks(count):
            stack = buffer[:, : end - begin]
            for row, source in zip(stack, sources, strict=False):
                source.read_into(name, row, first + begin)
            if merged and step > CHUNK:
                stack[-1] = block[begin:end]
            elif merged:
                merged.read_into(name, stack[-1], first + begin)
            yield stack


def _cuts(
    name: str, base: Checkpoint, parents: Sequence[Checkpoint], numel: int, densities: Sequence[float]
) -> np.ndarray:
    """The least magnitude that takes part, by density and parent: (densities, k) float32."""
    found = np.zeros((len(densities), len(parents)), np.float32)
    if all(density == 1.0 for density in densities):
        return found
    counts = torch.zeros(len(parents), 1 << 15, dtype=torch.int64)
    for stack in _stacks(name, base, parents, numel):
        counts += count_upper(torch.nan_to_num(stack[:-1].sub_(stack[-1]), 0.0, 0.0, 0.0).abs_())
    for at, density in enumerate(densities):
        if density < 1.0:
            ranks = kept_ranks(numel, density=np.full(len(parents), density))
            bins = locate(counts, ranks)[:, 0, 0]
            found[at] = (bins << 16).astype(np.int32).view(np.float32)
    return found


def _count_signs(deltas: np.ndarray, cut: np.ndarray) -> tuple[np.ndarray, int]:
    """How many entries have 0 .. k task vectors take part, and in how many signs are opposed; (k, n) and (k,).

    In numpy, whose comparisons are vectorised; those of torch are not.
    """
    least = np.maximum(cut, np.nextafter(np.float32(0), np.float32(1)))[:, None]
    above = (deltas >= least).view(np.int8).sum(0, dtype=np.int16)
    below = (deltas <= -least).view(np.int8).sum(0, dtype=np.int16)
    both = above + below
    counts = np.array([np.count_nonzero(both == n) for n in range(len(deltas) + 1)])
    return counts, int(np.count_nonzero((above > 0) & (below > 0)))


def _drop_nonfinite(stack: Tensor, rounded: Tensor) -> np.ndarray:
    """Set entries to zero in which any row is not finite; returns how many there were in each row, as `nonfinite`."""
    bad = ~torch.isfinite(stack)
    lost = ~torch.isfinite(rounded) & ~bad[-1]
    counts = torch.cat([bad.sum(1), lost.sum().view(1)])
    anywhere = bad.any(0) | lost
    stack[:, anywhere] = 0.0
    rounded[anywhere] = 0.0
    return counts.numpy()
