"""Which entries of a task vector are kept by magnitude."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.fused import Fused
from ctl_merge.methods.order import kth_largest, magnitudes, order_statistics
from ctl_merge.methods.parameters import Parameters
from ctl_merge.methods.registry import Scope


def kept_count(density: float, numel: int) -> int:
    """How many of `numel` entries a density keeps at least: max(1, ⌊density · numel⌋)."""
    return max(1, int(density * numel))


def kept_ranks(numel: int, *, density: Tensor | np.ndarray, **_: object) -> list[list[int]]:
    """The rank of the least magnitude that each model keeps: (models, 1)."""
    return [[kept_count(share, numel)] for share in density.flatten().tolist()]


def trim_scope(parameters: Parameters) -> Scope | None:
    """Over what the cut of a trim runs; None where every density is 1 and nothing is trimmed."""
    return None if all(density == 1.0 for density in parameters["density"]) else parameters["trim"]


MAGNITUDE_CUT = order_statistics("cut", magnitudes, kept_ranks, trim_scope)


def magnitude_cut(deltas: Tensor, density: Tensor) -> Tensor:
    """The plain definition of the cut: the k-th largest |d| of each model, k = max(1, ⌊density · N⌋).

    deltas (models, *shape), density (models, 1, ...) -> (models, 1). Entries with |d| >= cut are kept: at least k of
    them, all where magnitudes are equal, so that nothing depends on the order of a sort.
    """
    return kth_largest(deltas.abs(), kept_ranks(deltas[0].numel(), density=density))


def trim(deltas: Tensor, density: Tensor, cut: Tensor | None) -> Tensor:
    """Task vectors with the entries below the cut set to zero; a density of 1 keeps all, one of 0 none."""
    densities = density.flatten().tolist()
    if all(d == 1.0 for d in densities) or deltas[0].numel() == 0:
        return deltas
    cuts = (magnitude_cut(deltas, density) if cut is None else cut).flatten().tolist()
    kept = [
        above(d, 0.0 if p == 1.0 else math.inf if p == 0.0 else c)
        for d, p, c in zip(deltas, densities, cuts, strict=True)
    ]
    return torch.stack(kept)


def above(delta: Tensor, cut: float) -> Tensor:
    """Entries with |d| >= cut, the others zero."""
    if cut == 0.0:
        return delta
    # hardshrink keeps what is strictly above; it is vectorised, and torch.where is not: thirty times faster.
    return torch.nn.functional.hardshrink(delta, _just_below(cut, delta.dtype == torch.float32))


def _just_below(cut: float, narrow: bool = False) -> float:
    """The largest magnitude, float32 if `narrow`, that is below the cut once it is rounded to float32."""
    at = np.float32(cut)
    below = float(np.nextafter(at, np.float32(0)))
    if narrow or not math.isfinite(cut):
        return below
    # What lies halfway is rounded to the even neighbour, the one whose last bit is zero.
    middle = (below + cut) / 2
    return middle if int(at.view(np.int32)) & 1 else math.nextafter(middle, 0.0)


def fused_trim(
    merge: Fused | None, density: Tensor, least: Tensor | np.ndarray | None, largest: np.ndarray | None = None
) -> Fused | None:
    """`merge` of the entries with magnitudes from `least` (models,) to `largest`; a density of 1 keeps all."""
    if merge is None or least is None:
        return merge
    shares, cuts = density.flatten().tolist(), least.flatten().tolist()
    ends = [math.inf] * len(cuts) if largest is None else largest.flatten().tolist()
    kept = [0.0 if share == 1.0 else math.inf if share == 0.0 else cut for share, cut in zip(shares, cuts, strict=True)]
    above = [-1.0 if cut == 0.0 else _just_below(cut) for cut in kept]
    upto = [
        math.inf if share == 1.0 or end == math.inf else _just_below(end)
        for share, end in zip(shares, ends, strict=True)
    ]
    return replace(merge, above=above, upto=upto)
