"""The figure of the parents that each block follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ctl_merge.probing.depth import Depth, along, sites, where
from ctl_merge.probing.record import Data, bounded
from ctl_merge.probing.svg import RIGHT, Canvas, Figure
from ctl_merge.probing.wording import interval, shown

Bounded = dict[str, float | None]


@dataclass(frozen=True)
class _Row:
    """Coefficients of a parent at each place, beside those in the weights."""

    parent: str
    label: str
    found: Sequence[Bounded]
    weights: Sequence[float | None]

    def apart(self, n: int) -> float | None:
        value, weight = self.found[n]["value"], self.weights[n]
        return None if value is None or weight is None else value - weight


def coefficient_figure(data: Data) -> Figure | None:
    _, depth = sites(data)
    lines = list(_rows(data, depth))
    if not any(found["value"] is not None for line in lines for found in line.found):
        return None
    canvas, depth = Canvas(height=4), Depth(depth.labels, depth.stacks, left=116)
    most = max([0.1, *(abs(a) for line in lines for n in range(len(line.found)) if (a := line.apart(n)) is not None)])
    for i, line in enumerate(lines):
        if i == 0 or lines[i - 1].parent != line.parent:
            canvas.height += 8 if i else 0
            canvas.text(8, canvas.height + 16, line.parent, room=RIGHT - 8, font_weight=600, font_size=13)
            canvas.height += 24
        canvas.text(
            depth.left - 8, canvas.height + 16, line.label, room=depth.left - 12, text_anchor="end", fill="soft"
        )
        _cells(canvas, depth, line, most)
    depth.axis(canvas, canvas.height)
    up_to = f"by up to {shown(most, digits=2)}"
    looks = {f"less, {up_to}": "s1", f"more, {up_to}": "s0"}
    canvas.legend([(n, {"stroke": c, "stroke_opacity": 0.6, "stroke_width": 9}) for n, c in looks.items()])
    return Figure(
        "coefficients", "Which parent each block follows",
        "Effective coefficient of each parent: in weights, how much of it the merge's weights hold; on each data set, "
        "how much of it the merge's features show. Under linearity they agree. Orange: the features show less of the "
        "parent than the weights hold; blue: more.",
        canvas.svg("Heat map of effective coefficients by parent and block"),
    )  # fmt: skip


def _rows(data: Data, depth: Depth) -> Iterator[_Row]:
    sets, _ = sites(data)
    for parent in data["parents"]:
        for i, (name, by) in enumerate(sets.items()):
            weights = along(by, depth, "effective_weight", parent)
            if i == 0:
                own = [bounded(by.get(label, {}), "effective_weight", parent) for label in depth.labels]
                yield _Row(parent, "in weights", own, weights)
            found = [bounded(by.get(label, {}), "effective_feature", parent) for label in depth.labels]
            yield _Row(parent, f"on {name}", found, weights)


def _cells(canvas: Canvas, depth: Depth, line: _Row, most: float) -> None:
    """One row of numbers, coloured by how far they are from the weights."""
    for n, found in enumerate(line.found):
        if found["value"] is None:
            continue
        x, apart = depth.x(n - 0.5), line.apart(n) or 0.0
        colour = "soft" if abs(apart) < 1e-9 else "s0" if apart > 0 else "s1"
        opacity = 0.1 if colour == "soft" else 0.06 + 0.54 * abs(apart) / most
        tip = f"{line.parent} {line.label}, {where(depth.labels[n])}: {interval(found)}"
        look = {"fill": colour, "fill_opacity": f"{opacity:.3f}"}
        canvas.add("rect", tip, x=x, y=canvas.height, width=depth.step - (depth.step > 4), height=24, **look)
        if depth.step >= 27:
            canvas.text(depth.x(n), canvas.height + 16, shown(found["value"], digits=2), text_anchor="middle",
                        font_size=11, pointer_events="none")  # fmt: skip
    canvas.height += 26
