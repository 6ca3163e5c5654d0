"""The figure of the parents that each block follows."""

from __future__ import annotations

from collections.abc import Sequence

from ctl_merge.probing.depth import Depth, along, sites, where
from ctl_merge.probing.record import Data
from ctl_merge.probing.svg import RIGHT, Canvas, Figure
from ctl_merge.probing.wording import shown


def coefficient_figure(data: Data) -> Figure | None:
    sets, depth = sites(data)
    lines: list[tuple[str, str, list[float | None], list[float | None]]] = []
    for parent in data["parents"]:
        for i, (name, by) in enumerate(sets.items()):
            weights = along(by, depth, "effective_weight", parent)
            if i == 0:
                lines.append((parent, "in weights", weights, weights))
            lines.append((parent, f"on {name}", along(by, depth, "effective_feature", parent), weights))
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
        tip = f"{label}, {where(depth.labels[n])}: {shown(value, digits=4)}"
        look = {"fill": colour, "fill_opacity": f"{opacity:.3f}"}
        canvas.add("rect", tip, x=x, y=canvas.height, width=depth.step - (depth.step > 4), height=24, **look)
        if depth.step >= 27:
            canvas.text(depth.x(n), canvas.height + 16, shown(value, digits=2), text_anchor="middle", font_size=11,
                        pointer_events="none")  # fmt: skip
    canvas.height += 26
