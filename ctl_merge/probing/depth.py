"""The axis of blocks, and lines along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ctl_merge.probing.record import Data, number, place, rows
from ctl_merge.probing.svg import LEFT, RIGHT, Canvas, Panel, Point, round_ends, series_colour

HEAD = "logits"  # what comes after the last block, as probe.json names it


@dataclass(frozen=True)
class Line:
    """A line of a panel: at each place its value and tooltip, and whether the mark is hollow."""

    name: str
    series: int
    values: Sequence[float | None]
    tips: Sequence[str]
    hollow: Sequence[bool] = ()


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
        end = self.x(len(self.labels) - 1) - 34 if self.labels[-1] == HEAD else RIGHT
        for i, label in enumerate(self.labels):
            number_ = label.rpartition(" ")[2]
            if label == HEAD:
                canvas.text(min(self.x(i), RIGHT - 8), y, "head", text_anchor="middle", fill="soft")
            elif not number_.isdigit() and self.step >= 22:
                canvas.text(self.x(i), y, "in", text_anchor="middle", fill="soft")
            elif number_.isdigit() and int(number_) % stride == 0 and (self.step >= 34 or self.x(i) <= end):
                canvas.text(self.x(i), y, number_, text_anchor="middle", fill="soft")
        for i in starts[1:] if top < canvas.height - 6 else ():
            x = self.x(i - 0.5)
            canvas.add("path", d=f"M{x:.1f} {top:.1f}V{y - 17:.1f}", stroke="soft", stroke_dasharray="2 3")
        for i, end in zip(starts, [*starts[1:], len(self.labels)], strict=True):
            text = "block" if len(starts) == 1 else f"{self.labels[i].partition(' ')[0]} block"
            room = (end - i) * self.step
            canvas.text((self.x(i) + self.x(end - 1)) / 2, y + 17, text, room=room, text_anchor="middle", fill="soft")
        canvas.height = y + 25


def sites(data: Data, parts: Sequence[str] = ("block",)) -> tuple[dict[str, dict[str, Data]], Depth]:
    """For each data set its rows by place, and the places by depth."""
    found: dict[str, dict[str, Data]] = {
        name: {place(row): row for row in rows(data, name, parts=parts)} for name in data["sets"]
    }
    stacks = {place(row): row["stack"] for name in data["sets"] for row in rows(data, name, parts=parts)}
    return {name: by for name, by in found.items() if by}, Depth(list(stacks), list(stacks.values()))


def along(by: Mapping[str, Data], depth: Depth, *keys: str) -> list[float | None]:
    """A number at each place."""
    return [number(by.get(label), *keys) for label in depth.labels]


def points(values: Sequence[float | None], depth: Depth) -> list[Point | None]:
    """Points of a line, with a gap between stacks."""
    points: list[Point | None] = []
    for i, value in enumerate(values):
        if i and depth.stacks[i] != depth.stacks[i - 1]:
            points.append(None)
        points.append((depth.x(i), value) if value is not None else None)
    return points


def where(label: str) -> str:
    """A place as tooltips name it."""
    return "norm and head" if label == HEAD else label if label.endswith("input") else f"block {label}"


def panel_height(count: int) -> int:
    """Of panels beneath each other, so that many of them remain one figure."""
    return 150 if count <= 3 else 100


def line_panels(
    panels: Mapping[str, Sequence[Line]], depth: Depth, unit: str = "R", expected: float | None = None
) -> Canvas:
    """A panel for each data set, all on one scale, and a legend of the lines; a rule where a value is `expected`."""
    low, high = round_ends([v for lines in panels.values() for line in lines for v in line.values], expected or 0.05)
    canvas = Canvas()
    for name, lines in panels.items():
        panel = Panel(canvas, low, high, height=panel_height(len(panels)), title=name, unit=unit)
        if expected is not None:
            panel.line([(depth.left, expected), (RIGHT, expected)], stroke="soft", stroke_dasharray="2 3")
        for line in lines:
            panel.line(points(line.values, depth), stroke=series_colour(line.series))
            for n, value in enumerate(line.values):
                if value is not None:
                    hollow = bool(line.hollow) and line.hollow[n]
                    tip = f"{name}, {where(depth.labels[n])}\n{line.tips[n]}"
                    canvas.mark(depth.x(n), panel.y(value), line.series, tip, hollow=hollow, size=depth.size)
        depth.axis(canvas, panel.top)
    canvas.legend(list({line.name: line.series for lines in panels.values() for line in lines}.items()))
    return canvas
