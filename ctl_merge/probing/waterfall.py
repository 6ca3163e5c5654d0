"""The figure of what a merge costs in loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ctl_merge.probing.record import Data, costs_of, main_merge, number
from ctl_merge.probing.svg import RIGHT, Canvas, Figure, round_step, tick_text
from ctl_merge.probing.wording import interval, shown


def loss_figure(data: Data) -> Figure | None:
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
    canvas.text(8, canvas.height + 20, title, room=right - 8, font_weight=600, font_size=13)
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
