"""Where deviations grow with the square of the task vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctl_merge.deferred import torch
from ctl_merge.probing.blocks import bounded
from ctl_merge.probing.intervals import Draws
from ctl_merge.probing.metrics import cosine, disagreement, inner, interpolation, ratio, unit
from ctl_merge.probing.null import Combination
from ctl_merge.probing.observer import Observations, Subject
from ctl_merge.weights import TaskGrams

Array = np.ndarray
SCALES = (0.25, 0.5)  # and 1, the run itself
SLOPES = {"slope_deviation": 2, "slope_cos": 4, "slope_nonlinearity": 1}
TOLERANCE = 0.125  # a slope is the expected one if it is within this share of it
RESOLVED = 2e-6  # ‖dev‖ / ‖I‖ from which float32 features tell a deviation from their own rounding


def scaled(subject: Subject, merge: str, scale: float) -> Subject:
    """θ_0 + s τ in the place of every parent, and of the merge: what is probed of the same family, nearer the base."""
    base, place = subject.base, list(subject.merges).index(merge)
    parents = {name: Combination(base, [parent], [scale]) for name, parent in subject.parents.items()}
    merges = {merge: Combination(base, [subject.merges[merge]], [scale])}
    k = len(parents)
    chosen, factors = [*range(k + 1), k + 1 + place], np.array([*[scale] * k, 1.0, scale])
    outer = np.outer(factors, factors)
    grams = {name: gram[np.ix_(chosen, chosen)] * outer for name, gram in subject.weights.grams.items()}
    return Subject(base, parents, merges, TaskGrams(k, grams))


def slopes(
    by_scale: Mapping[float, Observations], site: str, merge: str, place: int, draws: Draws
) -> tuple[dict[str, Array], bool | None]:
    """Log-log slopes of ‖dev‖, 1 - cos and R against the scale, on every draw; whether the regime is quadratic.

    They are 2, 4 and 1 where features depend on the weights to first order and the deviation is of the second. What a
    merge has beside a combination of its parents (TIES, DARE) deviates to first order: slopes towards 1, 2 and 0. None
    where the deviation at the smallest scale is no larger than the features' rounding, or there is none.
    `place`: of the merge's coefficients among those of the whole run, at scale 1.
    """
    values: dict[str, list[Array]] = {name: [] for name in SLOPES}
    smallest = math.nan
    for scale, found in sorted(by_scale.items(), reverse=True):
        grams = found.grams.sites[site]
        gram = torch.stack(grams.gram).sum(1).numpy()
        c = found.coefficients[site][place if scale == 1 else 0]
        own = unit(grams.sources.index(merge), gram.shape[-1])
        centre = interpolation(c, gram.shape[-1])
        total, deviation = draws.sums(gram), own - centre
        square = inner(total, deviation, deviation)
        values["slope_deviation"].append(np.sqrt(np.maximum(square, 0)))
        values["slope_cos"].append(draws.means(1 - cosine(gram, own, centre)))
        values["slope_nonlinearity"].append(ratio(square, disagreement(total, c)))
        smallest = math.sqrt(max(square[0], 0) / inner(total[0], centre, centre))
    logs = np.log(sorted(by_scale, reverse=True))
    found_slopes = {name: _slope(logs, np.array(drawn)) for name, drawn in values.items()}
    if not smallest > RESOLVED or any(math.isnan(slope[0]) for slope in found_slopes.values()):
        return found_slopes, None
    near = (abs(found_slopes[name][0] - wanted) <= TOLERANCE * wanted for name, wanted in SLOPES.items())
    return found_slopes, all(near)


def _slope(logs: Array, values: Array) -> Array:
    """Least squares of log values (scales, draws) on logs (scales,) -> (draws,); NaN where a value is not positive."""
    logged = np.log(values, out=np.full_like(values, np.nan), where=values > 0)
    centred = logs - logs.mean()
    return centred @ logged / (centred @ centred)


def scaling_rows(
    rows: Sequence[dict[str, Any]], by_scale: Mapping[float, Observations], merge: str, place: int, draws: Draws
) -> None:
    """Put slopes and `quadratic` into the rows of the merge that was scaled."""
    for row in rows:
        if row["merge"] == merge and all(row["block"] in found.grams.sites for found in by_scale.values()):
            found, quadratic = slopes(by_scale, row["block"], merge, place, draws)
            row |= {**bounded(found, draws, ()), "quadratic": quadratic}
