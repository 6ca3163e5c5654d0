"""What to try after a probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctl_merge.probing.record import (
    Data,
    against_main,
    below_floor,
    costs_of,
    focus,
    main_merge,
    named,
    number,
    place,
    quadratic,
    recipes,
    rows,
    sweep,
)
from ctl_merge.probing.wording import listed


def advice(data: Data) -> str:
    """Changes of the recipe that the numbers speak for; empty where there are none."""
    names = focus(data)
    costs = {name: found for name in names if (found := costs_of(data, name))}
    paying = [name for name, found in costs.items() if (number(found["nonlinearity"], "low") or 0) > 0]
    bent = [name for name in names if (number(rows(data, name)[-1], "nonlinearity") or 0) >= 0.3]
    tips = []
    if paying or (bent and not costs):
        tips.append(_smaller(data, paying or bent))
    elif costs:
        tips.append("leave linearity alone: its cost is not above 0 beyond doubt")
    diluted = [
        n for n, f in costs.items() if (number(f["dilution"], "low") or 0) > 0 and (f["merged"] or 0) > f["loss"]
    ]
    for parent in dict.fromkeys(costs[n]["parent"] for n in diluted):
        own = " or ".join(n for n in diluted if costs[n]["parent"] == parent)
        tips.append(f"more weight on {parent} if {own} matters most")
    if any(below_floor(row) for name in names for row in rows(data, name)):
        tips.append("writing the merge in float32, since rounding is as large as what is measured")
    for merge in recipes(data)[1:]:
        better = [n for n in names if (number(against_main(data, n, merge["name"]), "high") or 0) < 0]
        if better:
            tips.append(f"{named(merge)}, whose loss is lower on {listed(better)} beyond doubt")
    tips += [
        f"α = {alpha:g}, the best of the sweep on {n}" for n in costs if (alpha := _best_alpha(data, n)) is not None
    ]
    return f"To try: {'; '.join(tips)}." if tips else ""


def _smaller(data: Data, names: Sequence[str]) -> str:
    """Smaller coefficients, where, and how much they help as far as that was measured."""
    blamed = [row for name in names for row in _to_blame(data, name)]
    labels = list(dict.fromkeys(map(place, blamed)))
    where = f", or smaller ones only in block{'s' if len(labels) > 1 else ''} {listed(labels)}" if labels else ""
    text = f"smaller coefficients on the base's task vectors{where}"
    known = [row for name in names for row in rows(data, name) if quadratic(row) is not None]
    slow = [slope for row in known if not quadratic(row) and (slope := number(row, "slope_deviation")) is not None]
    if slow:
        ends = dict.fromkeys(f"{100 * 2**-slope:.0f}" for slope in (max(slow), min(slow)))
        return f"{text}: halved, they leave {' to '.join(ends)} % of the deviation here, not a quarter"
    return f"{text}: the deviation shrinks with their square where linearity holds"


def _to_blame(data: Data, name: str) -> list[dict[str, Any]]:
    """The block that the non-linearity cost mostly comes from, if that was measured, else that of most deviation."""
    blame = (costs_of(data, name) or {}).get("blame") or {}
    sure = {site: own["value"] for site, own in blame.items() if (number(own, "low") or 0) > 0}
    known = [row for row in rows(data, name) if (number(row, "local") or 0) > 0]
    if sure:
        known = [row for row in rows(data, name) if row["block"] in sure]
    return [max(known, key=lambda row: sure.get(row["block"]) or row["local"])] if known else []


def _best_alpha(data: Data, name: str) -> float | None:
    """The α of lowest loss, where it is not the main merge's."""
    nll = data["sets"][name]["losses"]["nll"]
    known = [(loss, m) for m in sweep(data) if (loss := number(nll.get(m["name"]), "value")) is not None]
    best = min(known, key=lambda pair: pair[0])[1] if known else None
    return best["alpha"] if best and best["name"] != main_merge(data)["name"] else None
