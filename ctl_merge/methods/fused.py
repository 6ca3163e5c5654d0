"""A merge as numbers: what a compiled loop must know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctl_merge.deferred import Tensor

Values = Tensor | np.ndarray


@dataclass(frozen=True)
class Fused:
    """What a method does with each entry, for methods that go entry by entry or row by row.

    Of each model's entry d (its task vector's, or the weight itself) it keeps those with `above` < |d| <= `upto`, and
    of these each with a `chance`; divides by `divisors`; adds up over the models, times `factors`; or, with `elect`,
    merges what agrees as `ctl_merge.methods.agreement` has it; multiplies by `scale`. None: that step is left out.
    With a `spread` the chance is `chance` + `spread` times the entry's place by magnitude in its row, 0 to 1, and
    `by_chance` divides by that. With an `anchor` the sum is that of `anchored_sum`, `total` being Σ of the factors;
    there is a loop for that where nothing is subtracted, kept or divided before.
    """

    factors: Sequence[float]
    anchor: int | None = None
    total: float = 1.0
    above: Sequence[float] | None = None
    upto: Sequence[float] | None = None
    chance: Sequence[float] | None = None
    spread: Sequence[float] | None = None
    by_chance: bool = False
    divisors: Sequence[float] | None = None
    elect: str | None = None
    divide: str = "weights"
    scale: float = 1.0


def summed(factors: Values) -> Fused:
    """What `weighted_sum` computes."""
    return Fused(factors.flatten().tolist())


def anchored(factors: Values, total: float) -> Fused:
    """What `anchored_sum` computes."""
    found = factors.flatten().tolist()
    return Fused(found, anchor=max(range(len(found)), key=lambda index: abs(found[index])), total=total)


def agreeing(
    weight: Values, elect: str = "weighted", divide: str = "weights", majority: Values | None = None, scale: float = 1.0
) -> Fused | None:
    """What `merge_agreeing` computes, where it has a fast way: for positive weights."""
    if not bool((weight > 0).all()) or (majority is not None and float(majority) <= 0):
        return None
    return Fused(weight.flatten().tolist(), elect=elect, divide=divide, scale=scale)
