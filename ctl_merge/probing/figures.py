"""The probe's figures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctl_merge.probing.svg import (
    COLOURS,
    LEFT,
    RIGHT,
    Canvas,
    Depth,
    Panel,
    Point,
    round_step,
    round_top,
    series_colour,
    tick_text,
)
from ctl_merge.probing.verdict import Data, costs_of, interval, main_merge, number, place, prepared, rows, shown, sweep


@dataclass(frozen=True)
class Figure:
    """One figure: `name` is its file's, `caption` says how to read it, `svg` is one `<svg>` element."""

    name: str
    title: str
    caption: str
    svg: str


def figures(data: Data) -> list[Figure]:
    """The figures that the data can fill."""
    data = prepared(data)
    made = [draw(data) for draw in (_depth, _cosines, _origins, _parts, _coefficients, _patches, _losses, _sweep)]
    return [figure for figure in made if figure]


def write_figures(data: Data, folder: Path) -> list[Path]:
    """Write each figure as an .svg that stands alone; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures(data):
        svg = re.sub(r'"var\(--(\w+)\)"', lambda found: f'"{COLOURS[found[1]][0]}"', figure.svg)
        svg = svg.replace(">", f'><rect width="100%" height="100%" fill="{COLOURS["paper"][0]}"/>', 1)
        paths.append(folder / f"{figure.name}.svg")
        paths[-1].write_text(svg + "\n", "utf-8")
    return paths


def _sites(data: Data, parts: Sequence[str] = ("block",)) -> tuple[dict[str, dict[str, Data]], Depth]:
    """For each data set its rows by place, and the places by depth."""
    found: dict[str, dict[str, Data]] = {
        name: {place(row): row for row in rows(data, name, parts=parts)} for name in data["sets"]
    }
    stacks = {place(row): row["stack"] for name in data["sets"] for row in rows(data, name, parts=parts)}
    return {name: by for name, by in found.items() if by}, Depth(list(stacks), list(stacks.values()))


def _values(by: Mapping[str, Data], depth: Depth, *keys: str) -> list[float | None]:
    return [number(by.get(label), *keys) for label in depth.labels]


def _points(values: Sequence[float | None], depth: Depth) -> list[Point | None]:
    """Points of a line, with a gap between stacks."""
    points: list[Point | None] = []
    for i, value in enumerate(values):
        if i and depth.stacks[i] != depth.stacks[i - 1]:
            points.append(None)
        points.append((depth.x(i), value) if value is not None else None)
    return points


def _where(label: str) -> str:
    return label if label.endswith("input") else f"block {label}"


def _depth(data: Data) -> Figure | None:
    sets, depth = _sites(data, ("input", "block"))
    keys = ("nonlinearity", "nonlinearity_high", "nonlinearity_null", "floor")
    every = [v for by in sets.values() for key in keys for v in _values(by, depth, key)]
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
            panel.line(_points(_values(by, depth, key), depth), stroke=series_colour(i), **look)
        panel.line(_points(_values(by, depth, "nonlinearity"), depth), stroke=series_colour(i))
    for i, (name, by) in enumerate(sets.items()):
        for place_, row in by.items():
            if (value := number(row, "nonlinearity")) is not None:
                tip = "\n".join([f"{name}, {_where(place_)}", f"R = {_bounded(row)}", *_beside(row)])
                panel.canvas.mark(depth.x(depth.labels.index(place_)), panel.y(value), i, tip, size=depth.size)
    depth.axis(panel.canvas, panel.top)
    names = {"nonlinearity_null": "random task vector", "floor": "rounding alone"}
    have = [key for key in looks if any(v is not None for by in sets.values() for v in _values(by, depth, key))]
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


def _band(panel: Panel, depth: Depth, by: Mapping[str, Data], i: int) -> None:
    lows, highs = (_values(by, depth, f"nonlinearity_{end}") for end in ("low", "high"))
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


def _bounded(row: Data) -> str:
    bounds = {"low": row.get("nonlinearity_low"), "high": row.get("nonlinearity_high")}
    return interval({"value": row.get("nonlinearity"), **bounds})


def _beside(row: Data) -> list[str]:
    names = {
        "nonlinearity_robust": "without massive dimensions", "nonlinearity_written": "as written",
        "nonlinearity_null": "random task vector", "floor": "rounding alone", "cos": "cos",
    }  # fmt: skip
    return [f"{text}: {shown(value)}" for key, text in names.items() if (value := number(row, key)) is not None]


def _cosines(data: Data) -> Figure | None:
    sets, depth = _sites(data, ("input", "block"))
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
            panel.line(_points(values, depth), stroke=series_colour(i), **look)
            for n, value in enumerate(values):
                if value is not None:
                    tip = f"{name}, {_where(depth.labels[n])}\n1 − {_KEYS[key]} = {value:.3g}"
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


def _bars(panel: Panel, depth: Depth, columns: Sequence[tuple[str, Sequence[float | None]]], name: str) -> None:
    """Bars side by side at each block, one look for each column."""
    width = min(0.8 * depth.step / len(columns), 22)
    for k, (label, values) in enumerate(columns):
        for n, value in enumerate(values):
            if value is not None:
                x = depth.x(n) + (k - len(columns) / 2) * width
                tip = f"{name}, {_where(depth.labels[n])}\n{label}: {shown(value)}"
                y, drawn = panel.y(value), width - 1 if width > 4 else width
                panel.canvas.add("rect", tip, x=x, y=y, width=drawn, height=panel.y(0) - y, fill=series_colour(k + 3))


def _origins(data: Data) -> Figure | None:
    sets, depth = _sites(data)
    keys = {"local": "created in the block", "propagated": "passed on"}
    sets = {n: by for n, by in sets.items() if any(number(r, "local") is not None for r in by.values())}
    if not sets:
        return None
    high = round_top(v for by in sets.values() for key in (*keys, "nonlinearity") for v in _values(by, depth, key))
    canvas = Canvas()
    for name, by in sets.items():
        panel = Panel(canvas, 0, high, height=150, title=name)
        _bars(panel, depth, [(text, _values(by, depth, key)) for key, text in keys.items()], name)
        panel.line(_points(_values(by, depth, "nonlinearity"), depth), stroke="ink", stroke_width=1.5)
        depth.axis(panel.canvas, panel.top)
    canvas.legend([(text, {"stroke": series_colour(i + 3), "stroke_width": 9}) for i, text in enumerate(keys.values())]
                  + [("R", {"stroke": "ink", "stroke_width": 1.5})])  # fmt: skip
    return Figure(
        "origin", "Where the deviation arises",
        "What each block adds to the deviation when its input is exactly linear, and what it passes on from the "
        "blocks before it, both on the scale of R. The two are vectors: their squares need not add up to R².",
        canvas.svg("Bar chart of the local and the propagated part of the deviation by block"),
    )  # fmt: skip


def _parts(data: Data) -> Figure | None:
    found = dict.fromkeys(r["part"] for f in data["sets"].values() for r in f["blocks"] if r["index"] is not None)
    parts = [part for part in found if part != "block"] + ["block"]
    if len(parts) < 2:
        return None
    by_part = {part: _sites(data, (part,))[0] for part in parts}
    _, depth = _sites(data)
    known = [number(r, "nonlinearity") for sets in by_part.values() for by in sets.values() for r in by.values()]
    if not any(v is not None for v in known) or not depth.labels:
        return None
    canvas, high = Canvas(), round_top(known)
    for name in data["sets"]:
        panel = Panel(canvas, 0, high, height=150, title=name)
        for i, part in enumerate(parts):
            values = _values(by_part[part].get(name, {}), depth, "nonlinearity")
            panel.line(_points(values, depth), stroke=series_colour(i + 2))
            for n, value in enumerate(values):
                if value is not None:
                    tip = f"{name}, {_where(depth.labels[n])}, {part}\nR = {shown(value)}"
                    canvas.mark(depth.x(n), panel.y(value), i + 2, tip, size=depth.size)
        depth.axis(panel.canvas, panel.top)
    canvas.legend([("after the block" if part == "block" else part, i + 2) for i, part in enumerate(parts)])
    return Figure(
        "parts", "R inside the blocks",
        "R at the outputs of a block's parts, before they are added to the residual stream, beside R after the block. "
        "A part stands out above its neighbours where it, rather than what it reads, is bent.",
        canvas.svg("Line chart of R at the parts of each block"),
    )  # fmt: skip


def _coefficients(data: Data) -> Figure | None:
    sets, depth = _sites(data)
    lines: list[tuple[str, str, list[float | None], list[float | None]]] = []
    for parent in data["parents"]:
        for i, (name, by) in enumerate(sets.items()):
            weights = _values(by, depth, "effective_weight", parent)
            if i == 0:
                lines.append((parent, "in weights", weights, weights))
            lines.append((parent, f"on {name}", _values(by, depth, "effective_feature", parent), weights))
    if not any(value is not None for _, _, values, _ in lines for value in values):
        return None
    canvas, depth = Canvas(height=4), Depth(depth.labels, depth.stacks, left=116)
    apart = [
        abs(v - w) for _, _, vs, ws in lines for v, w in zip(vs, ws, strict=True) if v is not None and w is not None
    ]
    for i, (parent, label, values, weights) in enumerate(lines):
        if i == 0 or lines[i - 1][0] != parent:
            canvas.height += 8 if i else 0
            canvas.text(8, canvas.height + 16, parent, room=RIGHT - 8, font_weight=600, font_size=13)
            canvas.height += 24
        canvas.text(depth.left - 8, canvas.height + 16, label, room=depth.left - 12, text_anchor="end", fill="soft")
        _cells(canvas, depth, f"{parent} {label}", values, weights, max([0.1, *apart]))
    depth.axis(canvas, canvas.height)
    return Figure(
        "coefficients", "Which parent each block follows",
        "Effective coefficient of each parent: in weights, how much of it the merge's weights hold; on each data set, "
        "how much of it the merge's features show. Under linearity they agree. Orange: the features show less of the "
        "parent than the weights hold; blue: more.",
        canvas.svg("Heat map of effective coefficients by parent and block"),
    )  # fmt: skip


def _cells(
    canvas: Canvas, depth: Depth, label: str, values: Sequence[float | None],
    weights: Sequence[float | None], most: float,
) -> None:  # fmt: skip
    """One row of numbers, coloured by how far they are from the weights."""
    for n, (value, weight) in enumerate(zip(values, weights, strict=True)):
        if value is None:
            continue
        x, apart = depth.x(n - 0.5), 0 if weight is None else value - weight
        colour = "soft" if abs(apart) < 1e-9 else "s0" if apart > 0 else "s1"
        opacity = 0.1 if colour == "soft" else 0.06 + 0.54 * abs(apart) / most
        tip = f"{label}, {_where(depth.labels[n])}: {shown(value, digits=4)}"
        look = {"fill": colour, "fill_opacity": f"{opacity:.3f}"}
        canvas.add("rect", tip, x=x, y=canvas.height, width=depth.step - (depth.step > 4), height=24, **look)
        if depth.step >= 27:
            canvas.text(depth.x(n), canvas.height + 16, shown(value, digits=2), text_anchor="middle", font_size=11,
                        pointer_events="none")  # fmt: skip
    canvas.height += 26


def _losses(data: Data) -> Figure | None:
    canvas, name = Canvas(), main_merge(data)["name"]
    for text in data["sets"]:
        costs = costs_of(data, text)
        if costs is None:
            continue
        nll = data["sets"][text]["losses"]["nll"]
        models = [("base", nll.get("base"), "soft"), *((p, nll.get(p), "soft") for p in data["parents"])]
        _waterfall(canvas, text, models, costs, (name, nll.get(name)))
    if not canvas.shapes:
        return None
    return Figure(
        "losses", "What the merge costs",
        "Loss in nats per token, with 95 % intervals: lower (further left) is better. From the best parent, the "
        "dilution cost leads to the ensemble (the linear mix of the parents' logits, what perfect linearity would "
        "give), and the non-linearity cost from there to the merge. Orange raises the loss, blue lowers it.",
        canvas.svg("Chart of losses of base, parents, ensemble and merge with the two costs between them"),
    )  # fmt: skip


def _waterfall(
    canvas: Canvas, title: str, models: Sequence[tuple[str, Any, str]], costs: Data, merged: tuple[str, Any]
) -> None:
    """Dots for models, bars for the costs that lead from one to the next; one line each."""
    lines: list[tuple[str, Any]] = [(n, found) for n, found, _ in models if number(found, "value") is not None]
    lines += [("ensemble", costs["ensemble"]), merged]
    values = [v for _, found in lines for key in ("value", "low", "high") if (v := number(found, key)) is not None]
    low, high, left, right = min(values), max(values), 132, RIGHT - 168
    if high <= low:
        low, high = low - 0.5, high + 0.5
    x: Callable[[float], float] = lambda v: left + (right - left) * (v - low) / (high - low)  # noqa: E731
    canvas.text(8, canvas.height + 20, title, room=RIGHT - 130, font_weight=600, font_size=13)
    canvas.text(right + 10, canvas.height + 20, "nats per token", fill="soft")
    canvas.height += 32
    ensemble = number(costs["ensemble"], "value")
    ends = {
        "ensemble": ("dilution", costs["loss"], ensemble, costs["dilution"]),
        merged[0]: ("non-linearity", ensemble, costs["merged"], costs["nonlinearity"]),
    }
    for label, found in lines:
        strong = label == merged[0]
        if label in ends:
            _step_bar(canvas, x, *ends[label])
        value = number(found, "value")
        canvas.add("path", d=f"M{left} {canvas.height + 10:.1f}H{right}", stroke="grid")
        note = " (best)" if label == costs["parent"] else ""
        canvas.text(left - 10, canvas.height + 14, label + note, room=left - 14, text_anchor="end",
                    font_weight=600 if strong else 400)  # fmt: skip
        if value is not None:
            lo, hi = number(found, "low"), number(found, "high")
            if lo is not None and hi is not None:
                canvas.add(
                    "path", d=f"M{x(lo):.1f} {canvas.height + 10:.1f}H{x(hi):.1f}", stroke="soft", stroke_width=3
                )
            canvas.add("circle", f"{label}: {interval(found)}", cx=x(value), cy=canvas.height + 10, r=5.5,
                       fill="ink" if strong or label == costs["parent"] else "soft")  # fmt: skip
        canvas.text(right + 10, canvas.height + 14, shown(value), font_weight=600 if strong else 400)
        canvas.height += 22
    step = round_step(high - low)
    step *= 1 if x(low + step) - left > 34 else 2
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        canvas.text(x(i * step), canvas.height + 12, tick_text(i * step), text_anchor="middle", fill="soft")
    canvas.height += 24


def _step_bar(
    canvas: Canvas, x: Callable[[float], float], label: str, start: float | None, end: float | None, found: Any
) -> None:
    if start is None or end is None:
        return
    colour = "s1" if end > start else "s0"
    canvas.add("rect", f"{label}: {interval(found, signed=True)}", x=min(x(start), x(end)), y=canvas.height + 4,
               width=max(abs(x(end) - x(start)), 1), height=12, fill=colour)  # fmt: skip
    canvas.text(122, canvas.height + 14, label, text_anchor="end", fill=colour)
    canvas.text(RIGHT - 158, canvas.height + 14, interval(found, signed=True), fill=colour)
    canvas.height += 22


def _patches(data: Data) -> Figure | None:
    sets, depth = _sites(data)
    gains = {name: (costs_of(data, name) or {}).get("patch", {}) for name in sets}
    known = [
        v
        for patch in gains.values()
        for g in patch.values()
        for k in ("value", "low", "high")
        if (v := number(g, k)) is not None
    ]
    if not known:
        return None
    low, canvas = -round_top([-v for v in known], 0.0) if min(known) < 0 else 0.0, Canvas()
    panel = Panel(canvas, low, round_top(known, 1e-3), height=220, unit="nats per token")
    width = min(0.7 * depth.step / len(gains), 20)
    for i, (name, patch) in enumerate(gains.items()):
        for label, row in sets[name].items():
            gain = patch.get(row["block"])
            if (value := number(gain, "value")) is None:
                continue
            x = depth.x(depth.labels.index(label)) + (i - (len(gains) - 1) / 2) * width
            panel.whisker(x, gain, i, cap=3 * depth.size - 1 if depth.size < 1 else 3)
            doubtful = (number(gain, "low") or 0) <= 0 <= (number(gain, "high") or 0)
            tip = f"{name}, {_where(label)}\nloss recovered: {interval(gain)} nats per token"
            canvas.mark(x, panel.y(value), i, tip, hollow=doubtful, size=depth.size)
    depth.axis(panel.canvas, panel.top)
    canvas.legend([(name, i) for i, name in enumerate(gains)])
    return Figure(
        "patch", "Loss recovered by making a block's output linear",
        "Nats per token that the merge would gain if its features after a block were replaced by the linear mix of the "
        "parents'. A patch also undoes what earlier blocks bent, so later blocks tend to gain more. Hollow: the 95 % "
        "interval includes 0.",
        canvas.svg("Chart of loss recovered by patching each block, with intervals"),
    )  # fmt: skip


def _sweep(data: Data) -> Figure | None:
    merges, main = sweep(data), main_merge(data)["name"]
    if not merges:
        return None
    alphas = [float(merge["alpha"]) for merge in merges]
    low, high = min(0.0, *alphas), max(1.0, *alphas)
    x = {m["name"]: LEFT + (RIGHT - LEFT) * (m["alpha"] - low) / (high - low) for m in merges}

    def mean(name: str, merge: str) -> float | None:
        known = [v for row in rows(data, name, merge) if (v := number(row, "nonlinearity")) is not None]
        return sum(known) / len(known) if known else None

    def loss(name: str, merge: str) -> float | None:
        return number((data["sets"][name].get("losses") or {}).get("nll"), merge, "value")

    canvas = Canvas()
    for title, unit, of in (("R, mean over blocks", "R", mean), ("Loss of the merge", "nats per token", loss)):
        known = {(n, m): v for n in data["sets"] for m in x if (v := of(n, m)) is not None}
        if not known:
            continue
        step = round_step(max(known.values()) - min(known.values()) or 1)
        bottom = 0.0 if of is mean else step * math.floor(min(known.values()) / step)
        top = round_top(known.values()) if of is mean else step * math.ceil(max(known.values()) / step + 0.2)
        panel = Panel(canvas, bottom, top, height=170, title=title, unit=unit)
        for i, name in enumerate(data["sets"]):
            panel.line([(x[m], known[name, m]) if (name, m) in known else None for m in x], stroke=series_colour(i))
            for merge in merges:
                if (value := known.get((name, merge["name"]))) is not None:
                    tip = f"{name}, α = {merge['alpha']:g} ({merge['name']})\n{title}: {shown(value)}"
                    canvas.mark(x[merge["name"]], panel.y(value), i, tip, hollow=merge["name"] != main)
        last = -99.0
        for merge in merges:
            text = f"{merge['alpha']:g}"
            if x[merge["name"]] - last >= 9 + 7 * len(text):
                last = x[merge["name"]]
                canvas.text(last, canvas.height + 11, text, text_anchor="middle", fill="soft")
        canvas.text((LEFT + RIGHT) / 2, canvas.height + 28, "α", text_anchor="middle", fill="soft")
        canvas.height += 34
    if not canvas.shapes:
        return None
    canvas.legend([(name, i) for i, name in enumerate(data["sets"])])
    return Figure(
        "sweep", "R and loss against α",
        "The same parents merged with other coefficients. Filled: the merge that this report is about.",
        canvas.svg("Line charts of R and of loss against alpha"),
    )  # fmt: skip
