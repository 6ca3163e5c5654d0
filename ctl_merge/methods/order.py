"""Order statistics of tensors and models, by counting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.parameters import Parameters
from ctl_merge.methods.registry import Measure, Scope

# Values are compared in float32, whatever the arithmetic: the order is then exact and the same everywhere.
# A float32 that is not negative orders like its bit pattern read as an integer, so the k-th largest value is found
# exactly by counting the upper 16 bits, then the lower 16 within the one bin that holds it: two passes, no sort.
_UPPER, _LOWER = 1 << 15, 1 << 16

Ranks = Sequence[Sequence[int]] | np.ndarray
Counts = Tensor | np.ndarray  # those of the plain definition, or of the compiled loops; on the CPU


def magnitudes(deltas: Tensor, **_: object) -> Tensor:
    return deltas.abs()


def order_statistics(
    name: str,
    values: Callable[..., Tensor],
    ranks: Callable[..., Ranks],
    scope: Callable[[Parameters], Scope | None],
    signed: bool = False,
    count: int = 1,
) -> dict[str, Measure]:
    """Two measures, the second of which gives the method under `name` the k-th largest values, float32: (rows, k).

    `values(tensors, **arguments)` maps a chunk to what is ordered, (rows, ...), not negative unless `signed`;
    `ranks(numel, **arguments)` says which are wanted of each row: (rows, k), or (1, k) for all rows alike; 1 is the
    largest, and rank 0 gives infinity. `count` is k.
    """

    def accumulate(tensors: Tensor, **arguments: object) -> Tensor:
        return count_upper(values(tensors, **arguments), signed)

    def choose(counts: Counts, numel: int, **arguments: object) -> np.ndarray:
        return locate(counts, ranks(numel, **arguments))

    compiled: Any = "count_upper" if values is magnitudes and not signed else None
    coarse = Measure(accumulate, choose, scope, (_UPPER << signed,), compiled)
    return {f"{name}_bin": coarse, name: refinement(name, values, scope, signed, count)}


def refinement(
    name: str,
    values: Callable[..., Tensor],
    scope: Callable[[Parameters], Scope | None],
    signed: bool = False,
    count: int = 1,
) -> Measure:
    """The second of the two measures: it needs what `locate` gave the first, under the name `{name}_bin`."""

    def accumulate(tensors: Tensor, **arguments: Any) -> Tensor:
        return count_lower(values(tensors, **arguments), arguments[f"{name}_bin"], signed)

    def conclude(counts: Counts, numel: int, **arguments: Any) -> np.ndarray:
        return value_at(counts, arguments[f"{name}_bin"], signed)

    compiled: Any = "count_lower" if values is magnitudes and not signed else None
    return Measure(accumulate, conclude, scope, (count, _LOWER), compiled)


def kth_largest(values: Tensor, ranks: Ranks) -> Tensor:
    """The plain definition: values (rows, ...), ranks (rows, k) or (1, k) -> (rows, k) float32."""
    flat, wanted = values.flatten(1).float(), np.asarray(ranks)
    found = [
        [torch.inf if rank == 0 else float(row.kthvalue(row.numel() - rank + 1).values) for rank in own]
        for row, own in zip(flat, np.broadcast_to(wanted, (len(flat), wanted.shape[1])).tolist(), strict=True)
    ]
    return torch.tensor(found, dtype=torch.float32)


def count_upper(values: Tensor, signed: bool = False) -> Tensor:
    """How often each upper half of the bit patterns occurs: (rows, ...) -> (rows, 32768), (rows, 65536) if signed."""
    halves = (_keys(values, signed) >> 16) + signed * _UPPER
    return torch.stack([torch.bincount(row, minlength=_UPPER << signed) for row in halves])


def count_lower(values: Tensor, bins: Tensor, signed: bool = False) -> Tensor:
    """Within each chosen bin, how often each lower half occurs: (rows, ...), bins (rows, k, 2) -> (rows, k, 65536)."""
    found = []
    for row, chosen in zip(_keys(values, signed), bins[..., 0].tolist(), strict=True):
        halves = row >> 16
        inside = [row[halves == upper - signed * _UPPER] & (_LOWER - 1) for upper in chosen]
        found.append(torch.stack([torch.bincount(lower, minlength=_LOWER) for lower in inside]))
    return torch.stack(found)


def locate(counts: Counts, ranks: Ranks) -> np.ndarray:
    """The bin in which the rank-th value from above lies, and its rank within the bin.

    counts (rows, bins), ranks (rows, k) or (1, k) -> (rows, k, 2) int64.
    """
    from_above = np.asarray(counts)[:, ::-1].cumsum(1)
    wanted = np.asarray(ranks)
    wanted = np.broadcast_to(wanted, (len(from_above), wanted.shape[1]))
    position = np.stack([np.searchsorted(row, own) for row, own in zip(from_above, wanted, strict=True)])
    before = np.where(position > 0, np.take_along_axis(from_above, np.maximum(position - 1, 0), 1), 0)
    return np.stack([from_above.shape[1] - 1 - position, wanted - before], axis=2)


def value_at(counts: Counts, bins: Counts, signed: bool = False) -> np.ndarray:
    """The values in question, from the counts of lower halves (rows, k, 65536): (rows, k) float32."""
    lower, bins = np.asarray(counts), np.asarray(bins)
    ranks = bins[..., 1]
    lower = locate(lower.reshape(-1, lower.shape[-1]), ranks.reshape(-1, 1))[:, 0, 0].reshape(ranks.shape)
    keys = (((bins[..., 0] - signed * _UPPER) << 16) | lower).astype(np.int32)
    values = (_flip_negative(keys) if signed else keys).view(np.float32)
    return np.where(ranks == 0, np.float32(np.inf), values)


def _keys(values: Tensor, signed: bool) -> Tensor:
    """Integers that order like the values: (rows, ...) -> (rows, n) int32."""
    flat = values.flatten(1).float()
    if signed:
        return _flip_negative((flat + 0.0).view(torch.int32))  # + 0.0: no -0.0
    return flat.view(torch.int32) & 0x7FFFFFFF  # NaN may have a sign


def _flip_negative(bits: Any) -> Any:
    """Bit patterns of negative numbers order the wrong way round; flipped twice they are themselves again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
