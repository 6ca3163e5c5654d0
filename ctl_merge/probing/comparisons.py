"""Figures that compare lines: parts, kinds of tokens, recipes, scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ctl_merge.probing.depth import Depth, Line, along, line_panels, sites
from ctl_merge.probing.record import Data, bounded, place, quadratic, recipes, rows
from ctl_merge.probing.svg import Figure
from ctl_merge.probing.wording import interval, shown

SLOPES = {"slope_deviation": ("size", 2), "slope_cos": ("1 − cos", 4), "slope_nonlinearity": ("R", 1)}


def parts_figure(data: Data) -> Figure | None:
    found = dict.fromkeys(r["part"] for f in data["sets"].values() for r in f["blocks"] if r["index"] is not None)
    parts = [part for part in found if part != "block"] + ["block"]
    if len(parts) < 2:
        return None
    _, depth = sites(data)
    by_part = {part: sites(data, (part,))[0] for part in parts}
    panels = {
        name: [
            _line("after the block" if part == "block" else part, i + 2, by_part[part].get(name, {}), depth)
            for i, part in enumerate(parts)
        ]
        for name in data["sets"]
    }
    if not depth.labels or not _any_value(panels):
        return None
    return Figure(
        "parts", "R inside the blocks",
        "R at the outputs of a block's parts, before they are added to the residual stream, beside R after the block. "
        "A part stands out above its neighbours where it, rather than what it reads, is bent.",
        line_panels(panels, depth).svg("Line chart of R at the parts of each block"),
    )  # fmt: skip


def strata_figure(data: Data) -> Figure | None:
    """R over the tokens of each stratum, for data sets that have two or more of them."""
    sets, depth = sites(data)
    strata = list(dict.fromkeys(s for found in data["sets"].values() for s in found.get("strata") or ()))
    panels: dict[str, list[Line]] = {}
    for name, by in sets.items():
        columns = {s: along(by, depth, "by_stratum", s) for s in strata}
        panels[name] = [
            Line(s, i, values, [f"{s}: R = {shown(value)}" for value in values])
            for i, (s, values) in enumerate(columns.items())
            if any(value is not None for value in values)
        ]
    panels = {name: lines for name, lines in panels.items() if len(lines) > 1}
    if not panels:
        return None
    return Figure(
        "strata", "R by kind of token",
        "R over tokens of one kind: the first of a sequence, line breaks and punctuation, and the others, or prompt "
        "and response where the data has them. A kind that lies above the others is where linearity breaks first.",
        line_panels(panels, depth).svg("Line chart of R by kind of token against depth"),
    )  # fmt: skip


def recipe_figure(data: Data) -> Figure | None:
    """R of several recipes over the same models."""
    merges, (sets, depth) = recipes(data), sites(data)
    if not merges or not sets:
        return None
    main = merges[0]["name"]
    panels: dict[str, list[Line]] = {name: [] for name in sets}
    for name, lines in panels.items():
        for i, merge in enumerate(merges):
            by = {place(row): row for row in rows(data, name, merge["name"])}
            apart = [bounded(by.get(label, {}), "nonlinearity_against_first") for label in depth.labels]
            more = [f"\nminus {main}: {interval(a, signed=True)}" if a["value"] is not None else "" for a in apart]
            doubtful = [(a["low"] or 0) <= 0 <= (a["high"] or 0) for a in apart]
            lines.append(_line(merge["name"], i, by, depth, more, doubtful if i else ()))
    if not _any_value(panels):
        return None
    return Figure(
        "recipes", "R of each recipe",
        f"The recipes on the same sequences. Hollow: no difference from {main} beyond doubt (paired 95 % interval).",
        line_panels(panels, depth).svg("Line chart of R of several recipes against depth"),
    )  # fmt: skip


def scaling_figure(data: Data) -> Figure | None:
    """How the deviation grows with the task vectors, against the square that is expected where CTL holds."""
    sets, depth = sites(data)
    panels: dict[str, list[Line]] = {}
    for name, by in sets.items():
        hollow = [quadratic(by.get(label, {})) is not True for label in depth.labels]
        lines = []
        for i, (key, (text, expected)) in enumerate(SLOPES.items()):
            values = [None if v is None else v / expected for v in along(by, depth, key)]
            tips = [
                f"slope of {text}: {interval(bounded(by.get(s, {}), key))}, expected {expected}" for s in depth.labels
            ]
            lines.append(Line(f"{text} / {expected}", i + 2, values, tips, hollow))
        panels[name] = lines
    panels = {name: lines for name, lines in panels.items() if _any_value({name: lines})}
    if not panels:
        return None
    return Figure(
        "scaling", "Does the deviation shrink as the square?",
        "Slopes of log deviation (its size, 1 − cos, R) when all task vectors are scaled by ¼, ½ and 1, each divided "
        "by 2, 4 and 1, which are expected where features bend to second order: at 1 they agree. Hollow: one is off "
        "by more than an eighth, or too small to tell. There a smaller coefficient helps less than its square.",
        line_panels(panels, depth, unit="slope / expected", expected=1).svg("Line chart of scaling slopes by depth"),
    )  # fmt: skip


def _line(
    label: str, series: int, by: Mapping[str, Data], depth: Depth, more: Sequence[str] = (),
    hollow: Sequence[bool] = (),
) -> Line:  # fmt: skip
    """A line of R."""
    bounds = [bounded(by.get(place_, {}), "nonlinearity") for place_ in depth.labels]
    tips = [f"{label}: R = {interval(b)}{extra}" for b, extra in zip(bounds, more or [""] * len(bounds), strict=True)]
    return Line(label, series, [b["value"] for b in bounds], tips, hollow)


def _any_value(panels: Mapping[str, list[Line]]) -> bool:
    return any(v is not None for lines in panels.values() for line in lines for v in line.values)
