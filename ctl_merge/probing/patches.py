"""Figures of loss recovered by mending blocks."""

from __future__ import annotations

from ctl_merge.probing.depth import HEAD, Depth, sites, where
from ctl_merge.probing.record import Data, costs_of, number
from ctl_merge.probing.svg import Canvas, Figure, Panel, round_ends, series_colour
from ctl_merge.probing.wording import interval


def blame_figure(data: Data) -> Figure | None:
    canvas = _gains(data, "blame", "share of the cost")
    if canvas is None:
        return None
    return Figure(
        "blame", "Which block the non-linearity cost comes from",
        "Nats per token that each block adds to the cost: how much more is recovered when its output is made linear, "
        "beside what the blocks before it had recovered. The head is all that comes after the last block. The shares "
        "of the last stack add up to the non-linearity cost. Hollow: the 95 % interval includes 0.",
        canvas.svg("Chart of each block's share of the non-linearity cost, with intervals"),
    )  # fmt: skip


def patch_figure(data: Data) -> Figure | None:
    canvas = _gains(data, "patch", "loss recovered")
    if canvas is None:
        return None
    return Figure(
        "patch", "Loss recovered by making a block's output linear",
        "Nats per token that the merge would gain if its features after a block were replaced by the linear mix of the "
        "parents'. A patch also undoes what earlier blocks bent, so later blocks tend to gain more. Hollow: the 95 % "
        "interval includes 0.",
        canvas.svg("Chart of loss recovered by patching each block, with intervals"),
    )  # fmt: skip


def _gains(data: Data, kind: str, what: str) -> Canvas | None:
    """Gains by block, with whiskers."""
    sets, depth = sites(data)
    gains = {name: (costs_of(data, name) or {}).get(kind, {}) for name in sets}
    ends = ("value", "low", "high")
    known = [number(gain, end) for found in gains.values() for gain in found.values() for end in ends]
    if not any(value is not None for value in known):
        return None
    if any(HEAD in found for found in gains.values()):
        depth = Depth([*depth.labels, HEAD], [*depth.stacks, depth.stacks[-1]])
    canvas = Canvas()
    panel = Panel(canvas, *round_ends(known, 1e-3), height=220, unit="nats per token")
    width = min(0.7 * depth.step / len(gains), 20)
    for i, (name, found) in enumerate(gains.items()):
        labels = {row["block"]: label for label, row in sets[name].items()} | {HEAD: HEAD}
        for site, gain in found.items():
            if (value := number(gain, "value")) is None or site not in labels:
                continue
            x = depth.x(depth.labels.index(labels[site])) + (i - (len(gains) - 1) / 2) * width
            panel.whisker(x, gain, series_colour(i), cap=3 * depth.size - 1 if depth.size < 1 else 3)
            doubtful = (number(gain, "low") or 0) <= 0 <= (number(gain, "high") or 0)
            tip = f"{name}, {where(labels[site])}\n{what}: {interval(gain)} nats per token"
            canvas.mark(x, panel.y(value), i, tip, hollow=doubtful, size=depth.size)
    depth.axis(panel.canvas, panel.top)
    canvas.legend([(name, i) for i, name in enumerate(gains)])
    return canvas
