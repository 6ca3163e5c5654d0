"""Figures of R and cosines along the blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ctl_merge.probing.depth import Depth, along, panel_height, points, sites, where
from ctl_merge.probing.record import Data, bounded, number
from ctl_merge.probing.svg import Canvas, Figure, Panel, round_top, series_colour
from ctl_merge.probing.wording import interval


def nonlinearity_figure(data: Data) -> Figure | None:
    sets, depth = sites(data, ("input", "block"))
    keys = ("nonlinearity", "nonlinearity_high", "nonlinearity_null", "floor")
    every = [v for by in sets.values() for key in keys for v in along(by, depth, key)]
    if not any(number(row, "nonlinearity") is not None for by in sets.values() for row in by.values()):
        return None
    panel = Panel(Canvas(), 0, round_top(every), height=250)
    looks: dict[str, dict[str, Any]] = {
        "nonlinearity_null": {"stroke_dasharray": "7 4", "stroke_width": 1.5},
        "floor": {"stroke_dasharray": "1.5 3", "stroke_width": 1.5},
    }
    for i, (_, by) in enumerate(sets.items()):
        _band(panel, depth, by, i)
        for key, look in looks.items():
            panel.line(points(along(by, depth, key), depth), stroke=series_colour(i), **look)
        panel.line(points(along(by, depth, "nonlinearity"), depth), stroke=series_colour(i))
    for i, (name, by) in enumerate(sets.items()):
        for place_, row in by.items():
            if (value := number(row, "nonlinearity")) is not None:
                tip = "\n".join(
                    [f"{name}, {where(place_)}", f"R = {interval(bounded(row, 'nonlinearity'))}", *_beside(row)]
                )
                panel.canvas.mark(depth.x(depth.labels.index(place_)), panel.y(value), i, tip, size=depth.size)
    depth.axis(panel.canvas, panel.top)
    names = {"nonlinearity_null": "random task vector", "floor": "rounding alone"}
    have = [key for key in looks if any(v is not None for by in sets.values() for v in along(by, depth, key))]
    panel.canvas.legend(
        [*((name, i) for i, name in enumerate(sets)), *((names[key], {"stroke": "soft"} | looks[key]) for key in have)]
    )
    lines = {
        "nonlinearity_null": " Dashed: R of a merge with a random task vector of the same size.",
        "floor": " Dotted: what rounding alone would give; R below three times that cannot be told from rounding.",
    }
    return Figure(
        "nonlinearity", "R against depth",
        "R² is the share of the parents' disagreement that linear mixing does not explain: 0 is exact Cross-Task "
        "Linearity, at 1 linear mixing explains nothing. Bands: 95 % over sequences."
        + "".join(lines[key] for key in have),
        panel.canvas.svg("Line chart of the nonlinearity ratio R against depth"),
    )  # fmt: skip


def _beside(row: Data) -> list[str]:
    names = {
        "nonlinearity_robust": "without massive dimensions", "nonlinearity_written": "as written",
        "nonlinearity_null": "random task vector", "floor": "rounding alone", "cos": "cos",
    }  # fmt: skip
    return [f"{text}: {interval(bounded(row, key))}" for key, text in names.items() if number(row, key) is not None]


def cosine_figure(data: Data) -> Figure | None:
    sets, depth = sites(data, ("input", "block"))
    least = 1e-8  # of float32 features nothing below this is known

    def distance(row: Data, key: str) -> float | None:
        value = number(row, key)
        return 1 - value if value is not None and 1 - value >= least else None

    keys = ("cos", "cos_parents")
    known = [d for by in sets.values() for row in by.values() for key in keys if (d := distance(row, key)) is not None]
    if not known:
        return None
    low, high = (10.0 ** f(math.log10(v)) for f, v in ((math.floor, min(known)), (math.ceil, max(known))))
    panel = Panel(Canvas(), low, high if high > low else 10 * low, height=250, log=True, unit="1 − cos")
    for i, (name, by) in enumerate(sets.items()):
        for key, look in (("cos_parents", {"stroke_dasharray": "7 4", "stroke_width": 1.5}), ("cos", {})):
            values = [distance(by[label], key) if label in by else None for label in depth.labels]
            panel.line(points(values, depth), stroke=series_colour(i), **look)
            for n, value in enumerate(values):
                if value is not None:
                    tip = f"{name}, {where(depth.labels[n])}\n1 − {_KEYS[key]} = {value:.3g}"
                    panel.canvas.mark(depth.x(n), panel.y(value), i, tip, hollow=key == "cos_parents", size=depth.size)
    depth.axis(panel.canvas, panel.top)
    panel.canvas.legend(
        [
            *((name, i) for i, name in enumerate(sets)),
            ("parents with each other", {"stroke": "soft", "stroke_dasharray": "7 4"}),
        ]
    )
    return Figure(
        "cosine", "1 − cos of merge and linear mix",
        "The paper's measure, on a logarithmic axis: solid, how far the merge's features point from the linear mix of "
        "the parents'; dashed, how far the parents point from each other. Linearity holds where solid lies far below "
        "dashed. Shared directions make cosines look better than R.",
        panel.canvas.svg("Line chart of one minus cosine against depth, logarithmic"),
    )  # fmt: skip


_KEYS = {"cos": "cos(merge, mix)", "cos_parents": "cos(parents)"}


def origin_figure(data: Data) -> Figure | None:
    sets, depth = sites(data)
    keys = {"local": "created in the block", "propagated": "passed on"}
    sets = {n: by for n, by in sets.items() if any(number(r, "local") is not None for r in by.values())}
    if not sets:
        return None
    drawn = (*keys, *(f"{key}_high" for key in keys), "nonlinearity")
    high = round_top(v for by in sets.values() for key in drawn for v in along(by, depth, key))
    canvas = Canvas()
    for name, by in sets.items():
        panel = Panel(canvas, 0, high, height=panel_height(len(sets)), title=name)
        _bars(panel, depth, by, keys, name)
        panel.line(points(along(by, depth, "nonlinearity"), depth), stroke="ink", stroke_width=1.5)
        depth.axis(panel.canvas, panel.top)
    canvas.legend([(text, {"stroke": series_colour(i + 3), "stroke_width": 9}) for i, text in enumerate(keys.values())]
                  + [("R", {"stroke": "ink", "stroke_width": 1.5})])  # fmt: skip
    return Figure(
        "origin", "Where the deviation arises",
        "What each block adds to the deviation when its input is exactly linear, and what it passes on from the "
        "blocks before it, both on the scale of R. The two are vectors: their squares need not add up to R².",
        canvas.svg("Bar chart of the local and the propagated part of the deviation by block"),
    )  # fmt: skip


def _band(panel: Panel, depth: Depth, by: Mapping[str, Data], i: int) -> None:
    lows, highs = (along(by, depth, f"nonlinearity_{end}") for end in ("low", "high"))
    runs: list[list[tuple[float, float, float]]] = [[]]
    for n, (low, high) in enumerate(zip(lows, highs, strict=True)):
        if low is None or high is None or (n and depth.stacks[n] != depth.stacks[n - 1]):
            runs.append([])
        if low is not None and high is not None:
            runs[-1].append((depth.x(n), low, high))
    for run in filter(None, runs):
        edge = [f"{x:.1f} {panel.y(high):.1f}" for x, _, high in run]
        edge += [f"{x:.1f} {panel.y(low):.1f}" for x, low, _ in reversed(run)]
        panel.canvas.add("path", d=f"M{'L'.join(edge)}z", fill=series_colour(i), fill_opacity="0.22")


def _bars(panel: Panel, depth: Depth, by: Mapping[str, Data], keys: Mapping[str, str], name: str) -> None:
    """Bars side by side at each block, one look for each key, with their intervals where there is room."""
    width = min(0.8 * depth.step / len(keys), 22)
    for k, (key, label) in enumerate(keys.items()):
        for n, place_ in enumerate(depth.labels):
            found = bounded(by.get(place_, {}), key)
            if found["value"] is None:
                continue
            x, y = depth.x(n) + (k - len(keys) / 2) * width, panel.y(found["value"])
            tip, drawn = f"{name}, {where(place_)}\n{label}: {interval(found)}", width - 1 if width > 4 else width
            panel.canvas.add("rect", tip, x=x, y=y, width=drawn, height=panel.y(0) - y, fill=series_colour(k + 3))
            if width > 6:
                panel.whisker(x + drawn / 2, found, "ink", cap=2)
