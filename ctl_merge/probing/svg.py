"""Shapes, scales and axes of a chart, as SVG.

Colours are CSS variables, so that a page sets them for light and for dark. Every mark has a `<title>`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from ctl_merge.probing.record import number

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


@dataclass
class Canvas:
    """Shapes, top to bottom; `height` is what they have used so far."""

    height: float = 0
    shapes: list[str] = field(default_factory=list)

    def add(self, tag: str, tip: str = "", **attributes: Any) -> None:
        """One element; numbers are rounded, `_` in a name is `-`, a colour's name becomes its variable."""
        written = " ".join(f'{k.replace("_", "-")}="{attribute(v)}"' for k, v in attributes.items() if v is not None)
        self.shapes.append(f"<{tag} {written}><title>{markup(tip)}</title></{tag}>" if tip else f"<{tag} {written}/>")

    def text(self, x: float, y: float, text: str, room: float = 999, **attributes: Any) -> None:
        """Text, shortened in its middle to fit `room` pixels."""
        size = attributes.setdefault("font_size", 12)
        wide = 0.7 if attributes.get("font_weight", 400) >= 600 else 0.6  # of a letter, in wide fonts
        fitted = shorten(text, int(room / (wide * size)))
        written = " ".join(f'{k.replace("_", "-")}="{attribute(v)}"' for k, v in ({"fill": "ink"} | attributes).items())
        tip = f"<title>{markup(text)}</title>" if fitted != text else ""
        self.shapes.append(f'<text x="{x:.1f}" y="{y:.1f}" {written}>{tip}{markup(fitted)}</text>')

    def mark(self, x: float, y: float, series: int, tip: str, hollow: bool = False, size: float = 1) -> None:
        """A point with a larger target for the pointer; its colour and shape together say its series."""
        points = {1: "M-4-4h8v8h-8z", 2: "M0-5.5L5 4H-5z", 3: "M0-5.5L5.5 0 0 5.5-5.5 0z", 4: "M-4.5-1.5h9v3h-9z"}
        shape = points.get((series + series // _SERIES) % _SERIES, "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z")
        colour = series_colour(series)
        look = {"fill": "paper" if hollow else colour, "stroke": colour, "stroke_width": 1.5}
        self.add("path", tip, d=shape, transform=f"translate({x:.1f} {y:.1f}) scale({size:.2f})", **look)
        self.add("circle", tip, cx=x, cy=y, r=9 * size, fill="transparent")

    def legend(self, entries: Sequence[tuple[str, dict[str, Any] | int]]) -> None:
        """Entries in a row that wraps: a series' mark with its line, or a line's attributes."""
        x, y = float(LEFT), self.height + 14
        for name, look in entries:
            width = 34 + 6.9 * min(len(name), 30)
            if x > LEFT and x + width > RIGHT:
                x, y = LEFT, y + 19
            line = {"stroke": series_colour(look), "stroke_width": 2} if isinstance(look, int) else look
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
            f'height="{self.height:.0f}" role="img" aria-label="{markup(label)}" font-family="{_FONT}" '
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
            self.canvas.text(LEFT - 8, y + 4, tick_text(tick), text_anchor="end", fill="soft")
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
        step = round_step(self.high - self.low)
        return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]

    def line(self, points: Iterable[Point | None], **look: Any) -> None:
        """A line through the points that exist; a gap where one does not."""
        path, pen = [], "M"
        for point in points:
            path.append(f"{pen}{point[0]:.1f} {self.y(point[1]):.1f}" if point else "")
            pen = "L" if point else "M"
        if any(path):
            self.canvas.add("path", d="".join(path), fill="none", **({"stroke_width": 2} | look))

    def whisker(self, x: float, found: Any, colour: str, cap: float = 3) -> None:
        """A 95 % interval."""
        low, high = number(found, "low"), number(found, "high")
        if low is not None and high is not None:
            across = f"{-cap:.1f} 0h{2 * cap:.1f}"
            d = f"M{x:.1f} {self.y(low):.1f}m{across}m{across[: across.index('h')]}V{self.y(high):.1f}m{across}"
            self.canvas.add("path", d=d, stroke=colour, stroke_width=1.5)


def shorten(text: str, length: int) -> str:
    """At most `length` characters, an ellipsis in the middle."""
    if len(text) <= length:
        return text
    half = max(length - 1, 2)
    return f"{text[: half - half // 2]}…{text[len(text) - half // 2 :]}"


def attribute(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return f"var(--{value})" if value in COLOURS else markup(str(value))


def markup(text: str) -> str:
    return escape(text)  # the data is prepared: no character is left that XML forbids


def series_colour(i: int) -> str:
    return f"s{i % _SERIES}"


def round_step(span: float) -> float:
    """A round distance between about five ticks."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= span / 5)


def tick_text(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def round_ends(values: Iterable[float | None], least: float = 0.05) -> tuple[float, float]:
    """Round ends of a scale that holds 0, `least` and all values."""
    known = [0.0, least, *(v for v in values if v is not None)]
    low, high = min(known), max(known)
    step = round_step(high - low)
    return step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)


def round_top(values: Iterable[float | None], least: float = 0.05) -> float:
    """A round end of a scale above all values."""
    return round_ends((v for v in values if v is None or v > 0), least)[1]
