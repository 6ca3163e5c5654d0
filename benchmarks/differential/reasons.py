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


REASONS: tuple[Reason, ...] = (
    Reason(
        "equal magnitudes at the cut: we keep all of them, mergekit as many as fit", frozenset({"ties"}), _at_the_cut
    ),
    Reason(
        "votes that cancel: rounding elects the sign",
        frozenset({"ties", "breadcrumbs_ties", "dare_ties", "della"}),
        _vote_cancels,
        both=True,
    ),
)


def explained(method: str, tensor: Wanted, rounding: float, ours: bool = False) -> Mapping[str, Mask]:
    """Each reason that holds for the method, with the entries of this tensor that it covers."""
    return {
        reason.text: reason.where(tensor, rounding)
        for reason in REASONS
        if method in reason.methods and (reason.both or not ours)
    }
