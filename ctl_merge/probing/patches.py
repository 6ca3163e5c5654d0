"""The figure of loss recovered by mending blocks."""

from __future__ import annotations

from ctl_merge.probing.depth import sites, where
from ctl_merge.probing.record import Data, costs_of, number
from ctl_merge.probing.svg import Canvas, Figure, Panel, round_top
from ctl_merge.probing.wording import interval


def patch_figure(data: Data) -> Figure | None:
    sets, depth = sites(data)
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
            tip = f"{name}, {where(label)}\nloss recovered: {interval(gain)} nats per token"
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
