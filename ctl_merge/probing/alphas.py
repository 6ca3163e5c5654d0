"""The figure of R and loss against α."""

from __future__ import annotations

import math

from ctl_merge.probing.record import Data, main_merge, mean, number, rows, sweep
from ctl_merge.probing.svg import LEFT, RIGHT, Canvas, Figure, Panel, round_step, round_top, series_colour
from ctl_merge.probing.wording import shown


def sweep_figure(data: Data) -> Figure | None:
    merges, main = sweep(data), main_merge(data)["name"]
    if not merges:
        return None
    alphas = [float(merge["alpha"]) for merge in merges]
    low, high = min(0.0, *alphas), max(1.0, *alphas)
    x = {m["name"]: LEFT + (RIGHT - LEFT) * (m["alpha"] - low) / (high - low) for m in merges}

    def average(name: str, merge: str) -> float | None:
        return mean(number(row, "nonlinearity") for row in rows(data, name, merge))

    def loss(name: str, merge: str) -> float | None:
        return number((data["sets"][name].get("losses") or {}).get("nll"), merge, "value")

    canvas = Canvas()
    for title, unit, of in (("R, mean over blocks", "R", average), ("Loss of the merge", "nats per token", loss)):
        known = {(n, m): v for n in data["sets"] for m in x if (v := of(n, m)) is not None}
        if not known:
            continue
        step = round_step(max(known.values()) - min(known.values()) or 1)
        bottom = 0.0 if of is average else step * math.floor(min(known.values()) / step)
        top = round_top(known.values()) if of is average else step * math.ceil(max(known.values()) / step + 0.2)
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
