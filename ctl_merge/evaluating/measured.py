"""Rows of an evaluation: values, intervals, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ctl_merge.evaluating.metrics import Kind, Measured, kind_of, wilson
from ctl_merge.probing.intervals import Draws

Array = np.ndarray
Table = Mapping[str, Mapping[str, Mapping[str, Measured]]]  # model -> data set -> metric


def rows_of(table: Table) -> list[dict[str, object]]:
    """One row for each model, data set and metric, with 95 % intervals and the paired difference to the first model.

    Where a metric was taken on several data sets, `mean` and `worst` over them follow.
    """
    sets = list(dict.fromkeys(data for own in table.values() for data in own))
    draws: dict[tuple[str, int], Draws] = {}
    drawn: dict[tuple[str, str, str], Array] = {}
    rows: list[dict[str, object]] = []
    first = next(iter(table))
    for model, own in table.items():
        for data, metrics in own.items():
            for metric, measured in metrics.items():
                kind, count = kind_of(metric), len(measured.denominator)
                made = draws.setdefault((data, count), Draws(count, seed=sets.index(data)))
                values = drawn[model, data, metric] = _drawn(measured, kind, made)
                found = made.interval(values)
                if kind.share and measured.each_right_or_wrong:
                    found["low"], found["high"] = wilson(float(values[0]), count)
                reference = table[first].get(data, {}).get(metric)
                paired = model != first and reference is not None and len(reference.denominator) == count
                difference = made.interval(values - drawn[first, data, metric]) if paired else None
                rows.append(_row(model, data, metric, count, found, difference))
    return rows + _over_sets(list(table), sets, drawn, rows)


def _drawn(measured: Measured, kind: Kind, draws: Draws) -> Array:
    """The metric on every draw: (1 + DRAWS,), the value itself first."""
    return kind.value(draws.sums(measured.numerator), draws.sums(measured.denominator))


def _over_sets(
    models: Sequence[str], sets: Sequence[str], drawn: Mapping[tuple[str, str, str], Array], rows: list[dict]
) -> list[dict[str, object]]:
    """Mean and worst over the data sets on which all models were measured."""
    more = []
    for metric in dict.fromkeys(metric for _, _, metric in drawn):
        kind = kind_of(metric)
        common = [data for data in sets if all((model, data, metric) in drawn for model in models)]
        if len(common) < 2 or not kind.summed:
            continue
        several = {model: np.stack([drawn[model, data, metric] for data in common]) for model in models}
        worst = np.min if kind.higher else np.max
        for name, over in (("mean", np.mean), ("worst", worst)):
            values = {model: over(each, axis=0) for model, each in several.items()}
            for model, own in values.items():
                paired = interval(own - values[models[0]]) if model != models[0] else None
                more.append(_row(model, name, metric, len(common), interval(own), paired))
    return more


def interval(drawn: Array) -> dict[str, float]:
    """A value with its 95 % interval, on draws of several data sets: (1 + DRAWS,)."""
    low, high = np.nanquantile(drawn[1:], [0.025, 0.975]) if np.isfinite(drawn[1:]).any() else (np.nan, np.nan)
    return {"value": float(drawn[0]), "low": float(low), "high": float(high)}


def _row(
    model: str, data: str, metric: str, count: int, found: Mapping[str, float], difference: Mapping[str, float] | None
) -> dict[str, object]:
    against = difference or dict.fromkeys(("value", "low", "high"))
    return {
        "model": model, "data": data, "metric": metric, "count": count, **found,
        "difference": against["value"], "difference_low": against["low"], "difference_high": against["high"],
    }  # fmt: skip
