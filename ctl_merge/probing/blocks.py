"""A report's rows: one for each site and merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctl_merge.deferred import torch
from ctl_merge.probing.grams import SiteGrams
from ctl_merge.probing.intervals import Draws
from ctl_merge.probing.metrics import Site, Sources, disagreement, inner, interpolation, ratio, unit
from ctl_merge.probing.observer import INPUT, Observations

Array = np.ndarray
_ALWAYS = ("local", "propagated")  # null where there was no ghost


def site_rows(
    found: Observations, site: str, merges: Sequence[str], parents: Sequence[str], draws: Draws
) -> list[dict[str, Any]]:
    """The numbers of every merge at one site.

    A number `x` with a 95 % interval has `x_low` and `x_high` beside it. Of every merge but the first,
    `nonlinearity_against_first` is how much larger its R is than the first's.
    """
    grams = found.grams.sites[site]
    gram, of_robust = (torch.stack(part).numpy() for part in (grams.gram, grams.robust))  # (N, S, M, M)
    here = Site(gram.sum(1), of_robust.sum((0, 1)), len(parents), draws)
    cosines = torch.stack(grams.cosines).sum((0, 1)) / torch.stack(grams.tokens).sum()
    stack, block, part = _address(site)
    first: Array | None = None
    rows = []
    for place, name in enumerate(merges):
        at, c = Sources.of(name, grams.sources), found.coefficients[site][place]
        drawn, plain = here.drawn_numbers(c, at), here.plain_numbers(c, at)
        if first is not None:
            drawn["nonlinearity_against_first"] = drawn["nonlinearity"] - first
        first = drawn["nonlinearity"] if first is None else first
        rows.append(
            {
                "block": site, "stack": stack, "index": block, "part": part, "merge": name,
                **dict.fromkeys(f"{key}{end}" for key in _ALWAYS for end in ("", "_low", "_high")),
                **bounded(drawn, draws, parents), **plain, "cos_token": float(cosines[place]),
                "cos_to_parents": dict(zip(parents, plain["cos_to_parents"], strict=True)),  # type: ignore[arg-type]
                "effective_weight": dict(zip(parents, c.tolist(), strict=True)),
                "explained_weight": found.explained[site][place] if site in found.explained else math.nan,
                "by_stratum": _by_stratum(grams, gram, c, at.merged, found), "massive": grams.massive,
            }
        )  # fmt: skip
    return rows


def bounded(drawn: Mapping[str, Array], draws: Draws, parents: Sequence[str]) -> dict[str, Any]:
    """Flat keys for numbers and the ends of their intervals; those of each parent as a mapping."""
    columns = np.column_stack([values.reshape(len(values), -1) for values in drawn.values()])
    ends = {"": columns[0], **dict(zip(("_low", "_high"), draws.bounds(columns), strict=True))}
    found: dict[str, Any] = {}
    start = 0
    for name, values in drawn.items():
        width = 1 if values.ndim == 1 else values.shape[1]
        for end, numbers in ends.items():
            own = numbers[start : start + width].tolist()
            found[name + end] = own[0] if values.ndim == 1 else dict(zip(parents, own, strict=True))
        start += width
    return found


def _address(site: str) -> tuple[str, int | None, str]:
    """`model.layers.3.mlp` -> its stack, index and part."""
    stack, _, last = site.rpartition(".")
    if last == INPUT:
        return stack, None, INPUT
    if last.isdigit():
        return stack, int(last), "block"
    stack, _, index = stack.rpartition(".")
    return stack, int(index), last


def _by_stratum(grams: SiteGrams, gram: Array, c: Array, merged: int, found: Observations) -> dict[str, float]:
    """R of each stratum that the data set has."""
    size = gram.shape[-1]
    deviation = unit(merged, size) - interpolation(c, size)
    totals = {name: gram[:, i].sum(0) for i, name in enumerate(found.grams.strata) if name in found.grams.present()}
    return {n: float(ratio(inner(g, deviation, deviation), disagreement(g, c))) for n, g in totals.items()}
