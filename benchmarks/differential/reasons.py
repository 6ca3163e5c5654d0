"""Where mergekit and the definition differ for a reason that has a name: the entries, found from the inputs alone.

An entry that differs and that no reason covers is a failure. `rounding` is the relative error of the arithmetic that
is judged: 2⁻²¹ for mergekit in float32, 2⁻⁴⁵ for ours in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from differential.reference import Wanted

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


def _at_the_cut(tensor: Wanted, rounding: float) -> Mask:
    """Where a model's magnitude equals the k-th, and others do too, so that exactly k is a choice among equals."""
    found = _nowhere(tensor)
    for delta, density in zip(tensor.deltas, tensor.job.own["density"], strict=True):
        if 0 < density < 1:
            magnitude = np.abs(delta).astype(np.float32)
            k = max(1, int(density * magnitude.size))
            cut = np.sort(magnitude, axis=None)[-k]
            if (magnitude >= cut).sum() > k:
                found |= magnitude == cut
    return found


def _at_an_edge(tensor: Wanted, rounding: float) -> Mask:
    """As `_at_the_cut`, for both ends of a band of magnitudes; with `rescale` a choice there scales all entries."""
    found = _nowhere(tensor)
    for delta, density, gamma in zip(tensor.deltas, *(tensor.job.own[k] for k in ("density", "gamma")), strict=True):
        magnitude = np.abs(delta).astype(np.float32)
        kept = int(density * magnitude.size)
        dropped = min(int(gamma * magnitude.size), magnitude.size - kept)
        inside = np.sort(magnitude, axis=None)[::-1][dropped : dropped + kept]
        if 0 < density < 1 and kept:
            for edge in {inside[0], inside[-1]}:
                if (magnitude == edge).sum() > (inside == edge).sum():
                    found |= magnitude == edge
    return np.full_like(found, found.any()) if tensor.job.shared["rescale"] else found


def _vote_cancels(tensor: Wanted, rounding: float) -> Mask:
    """Where weighted entries of some of the models sum to nothing but rounding, so that rounding elects the sign."""
    weights = tensor.job.own.get("weight", (1.0,) * len(tensor.models))
    if tensor.job.shared.get("rescale") is True:
        weights = tuple(w / max(p, 1e-300) for w, p in zip(weights, tensor.job.own["density"], strict=True))
    ballots = np.stack([w * d for w, d in zip(weights, tensor.deltas, strict=True)])
    found = _nowhere(tensor)
    for count in range(2, len(ballots) + 1):
        for chosen in combinations(ballots, count):
            mass = np.abs(chosen).sum(0)
            found |= (np.abs(np.sum(chosen, axis=0)) <= rounding * mass) & (mass > 0)
    return found


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
        "equal magnitudes at the cut: we keep all of them, mergekit as many as fit", frozenset({"ties"}), _at_the_cut
    ),
    Reason(
        "votes that cancel: rounding elects the sign",
        frozenset({"ties", "breadcrumbs_ties", "dare_ties", "della", "sce"}),
        _vote_cancels,
        both=True,
    ),
    Reason(
        "equal magnitudes at the edges of the band: we keep all of them, mergekit as many as fit",
        frozenset({"breadcrumbs", "breadcrumbs_ties"}),
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
