"""Where mergekit and the definition differ for a reason that has a name: the entries, found from the inputs alone.

An entry that differs and that no reason covers is a failure. `rounding` is the relative error of the arithmetic that
is judged: 2⁻²¹ for mergekit in float32, 2⁻⁴⁵ for ours in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from differential.reference import Array, Wanted

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Reason:
    """`where(tensor, rounding)` gives the entries (*shape). `both`: it may set ours apart from the definition too."""

    text: str
    methods: frozenset[str]
    where: Callable[[Wanted, float], Mask]
    both: bool = False


def _nowhere(tensor: Wanted) -> Mask:
    return np.zeros(tensor.models.shape[1:], dtype=bool)


def _bands(tensor: Wanted) -> Iterator[tuple[Array, Array]]:
    """Each model's magnitudes in float32, and those of them that are kept, largest first: a trim has no outliers."""
    own = tensor.job.own
    outliers = own.get("gamma", (0.0,) * len(tensor.models))
    for delta, density, gamma in zip(tensor.deltas, own["density"], outliers, strict=True):
        magnitude = np.abs(delta).astype(np.float32)
        kept = int(density * magnitude.size)
        kept = kept if "gamma" in own or density == 0 else max(1, kept)
        dropped = min(int(gamma * magnitude.size), magnitude.size - kept) if density < 1 else 0
        yield magnitude, np.sort(magnitude, axis=None)[::-1][dropped : dropped + kept]


def _at_an_edge(tensor: Wanted, rounding: float) -> Mask:
    """Where a magnitude equals the least that is kept, or the largest, and others do too: which are kept is a choice.

    With `rescale` the choice scales all entries.
    """
    found = _nowhere(tensor)
    for magnitude, kept in _bands(tensor):
        for edge in {kept[0], kept[-1]} if 0 < kept.size < magnitude.size else ():
            if edge > 0 and (magnitude == edge).sum() > (kept == edge).sum():
                found |= magnitude == edge
    return np.full_like(found, found.any()) if tensor.job.shared.get("rescale") else found


def _vote_cancels(tensor: Wanted, rounding: float) -> Mask:
    """Where weighted entries of some of the models sum to nothing but rounding, so that rounding elects the sign."""
    return _cancels(tensor, rounding, _l1_factors(tensor) if tensor.job.shared.get("rescale") else None)


def _drawn_vote_cancels(tensor: Wanted, rounding: float) -> Mask:
    """The same where `rescale` divides what is kept by its probability."""
    densities = np.maximum(tensor.job.own["density"], 1e-300)
    return _cancels(tensor, rounding, 1 / densities if tensor.job.shared["rescale"] is True else None)


def _cancels(tensor: Wanted, rounding: float, factors: Array | None) -> Mask:
    weights = np.array(tensor.job.own.get("weight", (1.0,) * len(tensor.models)))
    weights = weights if factors is None else weights * factors
    ballots = weights.reshape(-1, *[1] * (tensor.deltas.ndim - 1)) * tensor.deltas
    found = _nowhere(tensor)
    for count in range(2, len(ballots) + 1):
        for chosen in combinations(ballots, count):
            mass = np.abs(chosen).sum(0)
            found |= (np.abs(np.sum(chosen, axis=0)) <= rounding * mass) & (mass > 0)
    return found


def _l1_factors(tensor: Wanted) -> Array:
    """By what restoring the L1 norm multiplies each trimmed task vector, where equal magnitudes are kept together."""
    found = []
    for magnitude, kept in _bands(tensor):
        inside = (magnitude <= kept[0]) & (magnitude >= kept[-1]) if kept.size else np.zeros(magnitude.shape, bool)
        after = magnitude[inside].sum(dtype=np.float64)
        found.append(magnitude.sum(dtype=np.float64) / after if after else 1.0)
    return np.array(found)


def _short_rows(tensor: Wanted, rounding: float) -> Mask:
    """Where mergekit takes two task vectors for longer than they are: a product of norms is at least 1e-6 there."""
    axes = -1 if tensor.job.shared["filter_wise"] else tuple(range(1, tensor.deltas.ndim))
    norms = np.sqrt((tensor.deltas**2).sum(axis=axes, keepdims=True))
    products = np.stack([first * second for first, second in combinations(norms, 2)])
    return np.broadcast_to(((products > 0) & (products < 1.01e-6)).any(0), tensor.models.shape[1:])


def _equal_spread(tensor: Wanted, rounding: float) -> Mask:
    """All of a tensor where entries around the cut have the same variance up to rounding: weights depend on the choice.

    In float32 the variance of equal numbers need not be zero, and then more entries count as differing.
    """
    spread, share = tensor.deltas.var(0), tensor.job.shared["select_topk"]
    if share >= 1:
        return _nowhere(tensor)
    error = rounding * (tensor.deltas**2).max(0)
    ordered = np.sort(spread, axis=None)[::-1]
    counts = [int(share * int(np.count_nonzero(some))) for some in (spread > error, np.any(tensor.deltas != 0, axis=0))]
    cuts = [ordered[count - 1] if count else np.inf for count in counts]
    near = (spread <= cuts[0] + error) & (spread >= cuts[1] - error)
    return np.full_like(near, near.sum() > 1)


def _little_energy(tensor: Wanted, rounding: float) -> Mask:
    """All of a tensor whose selected task vectors have a mean square below 1e-6, or weights so small."""
    deltas, share = tensor.deltas, tensor.job.shared["select_topk"]
    spread = deltas.var(0)
    count = int(share * np.count_nonzero(spread))
    if share < 1:
        deltas = deltas * (spread >= np.sort(spread, axis=None)[-count]) if count else 0 * deltas
    energy = (deltas**2).reshape(len(deltas), -1).mean(1)
    little = 0 < energy.sum() < 1.01e-6 or (energy < 1.01e-6 * energy.sum()).any()
    return np.full(deltas.shape[1:], little)


def _divergence_is_noise(tensor: Wanted, rounding: float) -> Mask:
    """Where the importance is as near to the threshold as rounding in the divergence of the rows can move either.

    A divergence is a sum of terms of either sign that are far larger than itself where the rows are nearly equal.
    """
    rows = [x.reshape(-1, x.shape[-1]) for x in (tensor.models[0], tensor.base)]
    powers = [np.exp(x - x.max(1, keepdims=True)) for x in rows]
    p, q = (e / e.sum(1, keepdims=True) + 1e-8 for e in powers)
    divergence, change = (p * np.log(p / q)).sum(1, keepdims=True), np.abs(rows[0] - rows[1])
    importance = change * divergence

    def threshold(values: NDArray[np.float64]) -> float:
        ordered = np.sort(values, axis=None)
        first, median, third = (ordered[int(part * (ordered.size - 1))] for part in (0.25, 0.5, 0.75))
        return float(median + 1.5 * (third - first))

    noise = change * rounding / 2
    low, high = threshold(importance - noise), threshold(importance + noise)
    cut = threshold(importance)
    margin = max(high - cut, cut - low, 1.5 * float(np.median(noise))) + 2.0**-22 * cut  # it is compared in float32
    return (np.abs(importance - cut) <= noise + margin).reshape(tensor.models.shape[1:])


REASONS: tuple[Reason, ...] = (
    Reason(
        "votes that cancel: rounding elects the sign",
        frozenset({"ties", "breadcrumbs_ties", "sce"}),
        _vote_cancels,
        both=True,
    ),
    Reason(
        "votes that cancel, in some draw: rounding elects the sign",
        frozenset({"dare_ties", "della"}),
        _drawn_vote_cancels,
        both=True,
    ),
    Reason(
        "equal magnitudes at the cut: we keep all of them, mergekit as many as fit",
        frozenset({"ties", "breadcrumbs", "breadcrumbs_ties"}),
        _at_an_edge,
    ),
    Reason(
        "equal variances at the cut: we select all of them, mergekit as many as fit",
        frozenset({"sce"}),
        _equal_spread,
    ),
    Reason(
        "little energy: below a mean square of 1e-6 mergekit weighs all models the same, and lets no weight fall below",
        frozenset({"sce"}),
        _little_energy,
    ),
    Reason(
        "divergences of rows that are nearly equal are rounding noise in float32",
        frozenset({"arcee_fusion"}),
        _divergence_is_noise,
        both=True,
    ),
    Reason(
        "short task vectors: mergekit divides by no product of norms below 1e-6",
        frozenset({"model_stock"}),
        _short_rows,
    ),
)


def explained(method: str, tensor: Wanted, rounding: float, ours: bool = False) -> Mapping[str, Mask]:
    """Each reason that holds for the method, with the entries of this tensor that it covers."""
    return {
        reason.text: reason.where(tensor, rounding)
        for reason in REASONS
        if method in reason.methods and (reason.both or not ours)
    }


# Masks or factors in float32 make the result so, whatever `dtype` says; `out_dtype` is heeded.
WRITES_FLOAT32 = frozenset({"ramplus_tl", "arcee_fusion"})
