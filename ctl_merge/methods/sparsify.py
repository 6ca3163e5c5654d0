"""Which entries of a task vector are kept by magnitude."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctl_merge.methods.parameters import Parameters
from ctl_merge.methods.registry import Measure, Scope

# Magnitudes are compared in float32, whatever the arithmetic: the order is then exact and the same everywhere.
# A float32 that is not negative orders like its bit pattern read as an integer, so the k-th largest magnitude is found
# exactly by counting the upper 16 bits, then the lower 16 within the one bin that holds it: two passes, no sort.
_UPPER, _LOWER = 1 << 15, 1 << 16


def _bits(deltas: Tensor) -> Tensor:
    return deltas.flatten(1).abs().float().view(torch.int32)


def kept_count(density: float, numel: int) -> int:
    """How many of `numel` entries a density keeps at least: max(1, ⌊density · numel⌋)."""
    return max(1, int(density * numel))


def count_upper(deltas: Tensor, **_: object) -> Tensor:
    """How often each upper half of |d| occurs: (models, n) -> (models, 32768)."""
    return torch.stack([torch.bincount(row, minlength=_UPPER) for row in _bits(deltas) >> 16])


def choose_bin(counts: Tensor, numel: int, *, density: Tensor, **_: object) -> Tensor:
    """The bin of the k-th largest magnitude and its rank within it, from above: (models, 2)."""
    return _locate(counts, torch.tensor([kept_count(d, numel) for d in density.flatten().tolist()]))


def count_lower(deltas: Tensor, *, bin: Tensor, **_: object) -> Tensor:
    """Within the chosen bin, how often each lower half of |d| occurs: (models, n) -> (models, 65536)."""
    rows = []
    for row, upper in zip(_bits(deltas), bin[:, 0].tolist(), strict=True):
        inside = row[(row >> 16) == upper]
        rows.append(torch.bincount(inside & (_LOWER - 1), minlength=_LOWER))
    return torch.stack(rows)


def choose_cut(counts: Tensor, numel: int, *, bin: Tensor, **_: object) -> Tensor:
    """The k-th largest magnitude of each model, float32: (models, 1)."""
    lower = _locate(counts, bin[:, 1])[:, 0]
    return ((bin[:, 0] << 16) | lower).to(torch.int32).view(torch.float32).unsqueeze(1)


def _locate(counts: Tensor, rank: Tensor) -> Tensor:
    """The bin in which the `rank`-th entry from above lies, and its rank within that bin: (models, 2) int64."""
    from_above = counts.cpu().flip(1).cumsum(1)
    position = torch.searchsorted(from_above, rank.cpu().contiguous().unsqueeze(1)).squeeze(1)
    before = torch.where(position > 0, from_above.gather(1, (position - 1).clamp_min(0).unsqueeze(1)).squeeze(1), 0)
    return torch.stack([counts.shape[1] - 1 - position, rank.cpu() - before], dim=1)


def trim_scope(parameters: Parameters) -> Scope | None:
    """Over what the cut of a trim runs; None where every density is 1 and nothing is trimmed."""
    return None if all(density == 1.0 for density in parameters["density"]) else parameters["trim"]


MAGNITUDE_CUT = {
    "bin": Measure(count_upper, choose_bin, trim_scope),
    "cut": Measure(count_lower, choose_cut, trim_scope),
}


def magnitude_cut(deltas: Tensor, density: Tensor) -> Tensor:
    """The plain definition of the cut: the k-th largest |d| of each model, k = max(1, ⌊density · N⌋).

    deltas (models, *shape), density (models, 1, ...) -> (models, 1). Entries with |d| >= cut are kept: at least k of
    them, all where magnitudes are equal, so that nothing depends on the order of a sort.
    """
    magnitudes = deltas.flatten(1).abs().float()
    numel = magnitudes.shape[1]
    ranks = [numel - kept_count(d, numel) + 1 for d in density.flatten().tolist()]
    return torch.stack([row.kthvalue(rank).values for row, rank in zip(magnitudes, ranks, strict=True)]).unsqueeze(1)


def trim(deltas: Tensor, density: Tensor, cut: Tensor | None) -> Tensor:
    """Task vectors with the entries below the cut set to zero; a density of 1 keeps all, one of 0 none."""
    densities = density.flatten().tolist()
    if all(d == 1.0 for d in densities) or deltas[0].numel() == 0:
        return deltas
    cuts = (magnitude_cut(deltas, density) if cut is None else cut).flatten().tolist()
    kept = [
        _above(d, 0.0 if p == 1.0 else math.inf if p == 0.0 else c)
        for d, p, c in zip(deltas, densities, cuts, strict=True)
    ]
    return torch.stack(kept)


def _above(delta: Tensor, cut: float) -> Tensor:
    """Entries with |d| >= cut, the others zero."""
    if cut == 0.0:
        return delta
    # hardshrink keeps what is strictly above; it is vectorised, and torch.where is not: thirty times faster.
    return torch.nn.functional.hardshrink(delta, _just_below(cut, delta.dtype))


def _just_below(cut: float, dtype: torch.dtype) -> float:
    """The largest magnitude of that dtype that is below the cut once it is rounded to float32."""
    at = torch.tensor(cut, dtype=torch.float32)
    below = float(torch.nextafter(at, torch.tensor(0.0)))
    if dtype == torch.float32 or not math.isfinite(cut):
        return below
    # What lies halfway is rounded to the even neighbour, the one whose last bit is zero.
    middle = (below + cut) / 2
    return middle if int(at.view(torch.int32)) & 1 else math.nextafter(middle, 0.0)
