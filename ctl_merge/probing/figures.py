"""The probe's figures, as SVG.

A figure names its colours by CSS variables, so a page sets them for light and for dark; `write_figures` writes files
that stand alone, with a white background. Every mark has a `<title>` with its exact numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ctl_merge.probing.verdict import (
    Data,
    costs_of,
    interval,
    main_merge,
    number,
    place,
    prepared,
    printable,
    rows,
    shown,
    sweep,
)

WIDTH, LEFT, RIGHT = 480, 62, 468
# Colours that remain apart in the common kinds of colour blindness: (light, dark), 3:1 against their background.
COLOURS = {
    "paper": ("#ffffff", "#16191d"), "ink": ("#1b1f24", "#e8eaed"), "soft": ("#59626d", "#a4adb8"),
    "grid": ("#e3e6ea", "#2f353c"), "s0": ("#0072b2", "#56b4e9"), "s1": ("#c44e00", "#ff9f4a"),
    "s2": ("#00845c", "#35c796"), "s3": ("#9b3f8a", "#e08fcc"), "s4": ("#806600", "#e5c548"),
}  # fmt: skip
_SERIES = 5
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
Point = tuple[float, float]


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
    made = [draw(data) for draw in (_depth, _cosines, _origins, _parts, _coefficients, _losses, _patches, _sweep)]
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


# Drawing


@dataclass
class Canvas:
    """Shapes, top to bottom; `height` is what they have used so far."""

    height: float = 0
    shapes: list[str] = field(default_factory=list)

    def add(self, tag: str, tip: str = "", **attributes: Any) -> None:
        """One element; numbers are rounded, `_` in a name is `-`, a colour's name becomes its variable."""
        written = " ".join(f'{k.replace("_", "-")}="{_value(v)}"' for k, v in attributes.items() if v is not None)
        self.shapes.append(f"<{tag} {written}><title>{_text(tip)}</title></{tag}>" if tip else f"<{tag} {written}/>")

    def text(self, x: float, y: float, text: str, room: float = 999, **attributes: Any) -> None:
        """Text, shortened in its middle to fit `room` pixels."""
        size = attributes.setdefault("font_size", 12)
        fitted = shorten(text, int(room / (0.6 * size)))
        written = " ".join(f'{k.replace("_", "-")}="{_value(v)}"' for k, v in ({"fill": "ink"} | attributes).items())
        tip = f"<title>{_text(text)}</title>" if fitted != text else ""
        self.shapes.append(f'<text x="{x:.1f}" y="{y:.1f}" {written}>{tip}{_text(fitted)}</text>')

    def mark(self, x: float, y: float, series: int, tip: str, hollow: bool = False, size: float = 1) -> None:
        """A point, whose shape says its series as its colour does, with a larger target for the pointer."""
        points = {1: "M-4-4h8v8h-8z", 2: "M0-5.5L5 4H-5z", 3: "M0-5.5L5.5 0 0 5.5-5.5 0z", 4: "M-4.5-1.5h9v3h-9z"}
        shape = points.get(series % _SERIES, "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z")
        colour = _series(series)
        self.add("path", tip, d=shape, transform=f"translate({x:.1f} {y:.1f}) scale({size:.2f})", fill="paper" if hollow else colour,
                 stroke=colour, stroke_width=1.5)  # fmt: skip
        self.add("circle", tip, cx=x, cy=y, r=9 * size, fill="transparent")

    def legend(self, entries: Sequence[tuple[str, dict[str, Any] | int]]) -> None:
        """Entries in a row that wraps: a series' mark with its line, or a line's attributes."""
        x, y = float(LEFT), self.height + 14
        for name, look in entries:
            width = 34 + 6.9 * min(len(name), 30)
            if x > LEFT and x + width > RIGHT:
                x, y = LEFT, y + 19
            line = {"stroke": _series(look), "stroke_width": 2} if isinstance(look, int) else look
            self.add("path", d=f"M{x:.1f} {y - 4:.1f}h20", fill="none", **line)
            if isinstance(look, int):
                self.mark(x + 10, y - 4, look, "")
            self.text(x + 26, y, name, room=30 * 6.72)
            x += width + 12
        self.height = y + 8

    def svg(self, label: str) -> str:
        """The whole element; `label` is what a screen reader says."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:.0f}" width="{WIDTH}" '
            f'height="{self.height:.0f}" role="img" aria-label="{_text(label)}" font-family="{_FONT}" '
            f'fill="none">{"".join(self.shapes)}</svg>'
        )


@dataclass
class Panel:
    """One plot with a vertical scale from `low` to `high`, beneath what the canvas holds already."""

    canvas: Canvas
    low: float
    high: float
    height: float = 190
    log: bool = False
    title: str = ""
    unit: str = "R"
    top: float = 0

    def __post_init__(self) -> None:
        self.top = self.canvas.height + (26 if self.title else 12)
        if self.title:
            self.canvas.text(LEFT, self.top - 10, self.title, room=RIGHT - LEFT, font_weight=600, font_size=13)
        for tick in self._ticks():
            y = self.y(tick)
            self.canvas.add("path", d=f"M{LEFT} {y:.1f}H{RIGHT}", stroke="soft" if tick == 0 else "grid")
            self.canvas.text(LEFT - 8, y + 4, _tick(tick), text_anchor="end", fill="soft")
        middle = self.top + self.height / 2
        turn = f"rotate(-90 12 {middle:.1f})"
        self.canvas.text(12, middle, self.unit, text_anchor="middle", fill="soft", transform=turn)
        self.canvas.height = self.top + self.height + 6

    def y(self, value: float) -> float:
        """The pixel of a value; values beyond the scale lie on its edge."""
        value = min(max(value, self.low), self.high)
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.top + self.height * (high - value) / (high - low)

    def _ticks(self) -> list[float]:
        if self.log:
            powers = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            return [10.0**p for p in powers][:: math.ceil(len(powers) / 7)]
        step = _step(self.high - self.low)
        return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]

    def line(self, points: Iterable[Point | None], **look: Any) -> None:
        """A line through the points that exist; a gap where one does not."""
        path, pen = [], "M"
        for point in points:
            path.append(f"{pen}{point[0]:.1f} {self.y(point[1]):.1f}" if point else "")
            pen = "L" if point else "M"
        if any(path):
            self.canvas.add("path", d="".join(path), fill="none", **({"stroke_width": 2} | look))

    def whisker(self, x: float, found: Any, series: int) -> None:
        """A 95 % interval."""
        low, high = number(found, "low"), number(found, "high")
        if low is not None and high is not None:
            d = f"M{x - 3:.1f} {self.y(low):.1f}h6m-3 0V{self.y(high):.1f}m-3 0h6"
            self.canvas.add("path", d=d, stroke=_series(series), stroke_width=1.5)


@dataclass(frozen=True)
class Depth:
    """Where the blocks lie on the horizontal axis; several stacks follow each other."""

    labels: list[str]
    stacks: list[str]
    left: float = LEFT

    @property
    def step(self) -> float:
        return (RIGHT - self.left) / len(self.labels)

    @property
    def size(self) -> float:
        """Of marks, so that neighbours do not touch."""
        return min(1.0, max(0.35, self.step / 14))

    def x(self, i: float) -> float:
        return self.left + (i + 0.5) * self.step

    def axis(self, canvas: Canvas, top: float) -> None:
        """Numbers of the blocks (not all, where there is no room), a rule and a name for each of several stacks."""
        y = canvas.height + 11
        starts = [i for i, stack in enumerate(self.stacks) if i == 0 or stack != self.stacks[i - 1]]
        stride = next(n for n in (1, 2, 4, 5, 10, 20, 50, 10**6) if n * self.step >= 22)
        for i, label in enumerate(self.labels):
            number_ = label.rpartition(" ")[2]
            if not number_.isdigit() and self.step >= 22:
                canvas.text(self.x(i), y, "in", text_anchor="middle", fill="soft")
            elif number_.isdigit() and int(number_) % stride == 0:
                canvas.text(self.x(i), y, number_, text_anchor="middle", fill="soft")
        for i in starts[1:]:
            x = self.x(i - 0.5)
            canvas.add("path", d=f"M{x:.1f} {top:.1f}V{y - 17:.1f}", stroke="soft", stroke_dasharray="2 3")
        for i, end in zip(starts, [*starts[1:], len(self.labels)], strict=True):
            text = "block" if len(starts) == 1 else f"{self.labels[i].partition(' ')[0]} block"
            room = (end - i) * self.step
            canvas.text((self.x(i) + self.x(end - 1)) / 2, y + 17, text, room=room, text_anchor="middle", fill="soft")
        canvas.height = y + 25


def shorten(text: str, length: int) -> str:
    """At most `length` characters, an ellipsis in the middle."""
    if len(text) <= length:
        return text
    half = max(length - 1, 2)
    return f"{text[: half - half // 2]}…{text[len(text) - half // 2 :]}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return f"var(--{value})" if value in COLOURS else _text(str(value))


def _text(text: str) -> str:
    return escape(printable(text))


def _series(i: int) -> str:
    return f"s{i % _SERIES}"


def _step(span: float) -> float:
    """A round distance between about five ticks."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= span / 5)


def _tick(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def _top(values: Iterable[float | None], least: float = 0.05) -> float:
    """A round end of a scale above all values."""
    most = max([least, *(v for v in values if v is not None)]) * 1.04
    step = _step(most)
    return step * math.ceil(most / step - 1e-9)


# The figures


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
    panel = Panel(Canvas(), 0, _top(every), height=250)
    looks: dict[str, dict[str, Any]] = {
        "nonlinearity_null": {"stroke_dasharray": "7 4", "stroke_width": 1.5},
        "floor": {"stroke_dasharray": "1.5 3", "stroke_width": 1.5},
    }
    for i, (_, by) in enumerate(sets.items()):
        _band(panel, depth, by, i)
        for key, look in looks.items():
            panel.line(_points(_values(by, depth, key), depth), stroke=_series(i), **look)
        panel.line(_points(_values(by, depth, "nonlinearity"), depth), stroke=_series(i))
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
    for stack in dict.fromkeys(depth.stacks):
        known = [
            (depth.x(n), low, high)
            for n, (low, high) in enumerate(zip(lows, highs, strict=True))
            if low is not None and high is not None and depth.stacks[n] == stack
        ]
        edge = [f"{x:.1f} {panel.y(high):.1f}" for x, _, high in known]
        edge += [f"{x:.1f} {panel.y(low):.1f}" for x, low, _ in reversed(known)]
        if edge:
            panel.canvas.add("path", d=f"M{'L'.join(edge)}z", fill=_series(i), fill_opacity="0.22")


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
    panel = Panel(Canvas(), low, high if high > low else 10 * low, log=True, unit="1 − cos")
    for i, (name, by) in enumerate(sets.items()):
        for key, look in (("cos_parents", {"stroke_dasharray": "7 4", "stroke_width": 1.5}), ("cos", {})):
            values = [distance(by[label], key) if label in by else None for label in depth.labels]
            panel.line(_points(values, depth), stroke=_series(i), **look)
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
                panel.canvas.add(
                    "rect", tip, x=x, y=panel.y(value), width=width - (1 if width > 4 else 0), height=panel.y(0) - panel.y(value),
                    fill=_series(k + 3),
                )  # fmt: skip


def _origins(data: Data) -> Figure | None:
    sets, depth = _sites(data)
    keys = {"local": "created in the block", "propagated": "inherited and amplified"}
    sets = {n: by for n, by in sets.items() if any(number(r, "local") is not None for r in by.values())}
    if not sets:
        return None
    high = _top(v for by in sets.values() for key in (*keys, "nonlinearity") for v in _values(by, depth, key))
    canvas = Canvas()
    for name, by in sets.items():
        panel = Panel(canvas, 0, high, height=150, title=name)
        _bars(panel, depth, [(text, _values(by, depth, key)) for key, text in keys.items()], name)
        panel.line(_points(_values(by, depth, "nonlinearity"), depth), stroke="ink", stroke_width=1.5)
        depth.axis(panel.canvas, panel.top)
    canvas.legend([(text, {"stroke": _series(i + 3), "stroke_width": 9}) for i, text in enumerate(keys.values())]
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
    canvas, high = Canvas(), _top(known)
    for name in data["sets"]:
        panel = Panel(canvas, 0, high, height=150, title=name)
        for i, part in enumerate(parts):
            values = _values(by_part[part].get(name, {}), depth, "nonlinearity")
            panel.line(_points(values, depth), stroke=_series(i + 2))
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
    depth.axis(canvas, 0)
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
        canvas.add("rect", tip, x=x, y=canvas.height, width=depth.step - (1 if depth.step > 4 else 0), height=24, fill=colour,
                   fill_opacity=f"{opacity:.3f}")  # fmt: skip
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
    step = _step(high - low)
    step *= 1 if x(low + step) - left > 34 else 2
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        canvas.text(x(i * step), canvas.height + 12, _tick(i * step), text_anchor="middle", fill="soft")
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
    low, canvas = -_top([-v for v in known], 0.0) if min(known) < 0 else 0.0, Canvas()
    panel = Panel(canvas, low, _top(known, 1e-3), height=220, unit="nats per token")
    width = min(0.7 * depth.step / len(gains), 20)
    for i, (name, patch) in enumerate(gains.items()):
        for label, row in sets[name].items():
            gain = patch.get(row["block"])
            if (value := number(gain, "value")) is None:
                continue
            x = depth.x(depth.labels.index(label)) + (i - (len(gains) - 1) / 2) * width
            panel.whisker(x, gain, i)
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
        step = _step(max(known.values()) - min(known.values()) or 1)
        bottom = 0.0 if of is mean else step * math.floor(min(known.values()) / step)
        top = _top(known.values()) if of is mean else step * math.ceil(max(known.values()) / step + 0.2)
        panel = Panel(canvas, bottom, top, height=170, title=title, unit=unit)
        for i, name in enumerate(data["sets"]):
            panel.line([(x[m], known[name, m]) if (name, m) in known else None for m in x], stroke=_series(i))
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
