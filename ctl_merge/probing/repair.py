"""What tuning changed in a merge, and what came back.

Reads `tuning` of probe.json, where a report is of a merge before and after it was tuned: see `ctl_merge.tuning`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ctl_merge.probing.depth import Depth, Line, line_panels, sites
from ctl_merge.probing.record import Data, costs_of, main_merge, number, place, rows
from ctl_merge.probing.svg import RIGHT, Canvas, Figure, round_ends, round_step, tick_text
from ctl_merge.probing.wording import interval, listed, shown

_MOST = 3  # changes that are named


def repair(data: Data) -> list[str]:
    """What was lost, where, why, what was changed, what came back; empty for a merge that was not tuned."""
    if not data.get("tuning"):
        return []
    found = [_lost(data), _where(data), _why(data), _changed(data), _back(data), _advised(data)]
    return [line for line in found if line]


def held_out(data: Data, model: str, name: str) -> Mapping[str, Any]:
    """A model's loss on a held-out data set, with its interval and its difference to the tuned merge."""
    listed_rows = data["tuning"]["evaluation"]["rows"]
    wanted = (model, name, "loss")
    return next((row for row in listed_rows if (row["model"], row["data"], row["metric"]) == wanted), {})


def _experts(data: Data) -> dict[str, str]:
    """The parent of the least held-out loss on each data set."""
    found = {}
    for name in data["tuning"]["evaluation"]["sets"]:
        known = {p: v for p in data["parents"] if (v := number(held_out(data, p, name), "value")) is not None}
        if known:
            found[name] = min(known, key=lambda parent: known[parent])
    return found


def _lost(data: Data) -> str:
    before, parts = main_merge(data)["name"], []
    for name, expert in _experts(data).items():
        loss, own = (number(held_out(data, model, name), "value") for model in (before, expert))
        if loss is not None and own is not None:
            parts.append(f"{shown(loss - own, signed=True)} on {name} against {expert}")
    return f"Lost: {before} pays {listed(parts)}, nats per token on held-out text." if parts else ""


def _where(data: Data) -> str:
    parts = []
    for name in data["sets"]:
        known = [row for row in rows(data, name) if number(row, "local") is not None]
        if known:
            worst = max(known, key=lambda row: row["local"])
            parts.append(f"block {place(worst)} on {name} (local {shown(number(worst, 'local'), digits=2)})")
    return f"Where: most of what is not linear is made in {listed(parts)}." if parts else ""


def _why(data: Data) -> str:
    parts = []
    for name in data["sets"]:
        costs = costs_of(data, name)
        if costs:
            values = [shown(number(costs[key], "value"), signed=True) for key in ("dilution", "nonlinearity")]
            parts.append(f"{values[0]} dilution and {values[1]} non-linearity on {name}")
    return f"Why: {listed(parts)}." if parts else ""


def _changed(data: Data) -> str:
    tuning = data["tuning"]
    uniform = number(tuning, "uniform")
    if uniform is None or not tuning["coefficients"]:
        return ""
    moved = [
        (abs(value - uniform), f"{parent} {shown(value, digits=2)} in {_group(row)}")
        for row in tuning["coefficients"] for parent in data["parents"]
        if (value := number(row, parent)) is not None
    ]  # fmt: skip
    largest = [text for _, text in sorted(moved, reverse=True)[:_MOST]]
    return f"Changed: {len(moved)} coefficients instead of one λ of {shown(uniform)}; most of all {listed(largest)}."


def _group(row: Data) -> str:
    return str(row["group"]).removesuffix(".weight").rstrip(".")


def _back(data: Data) -> str:
    before, names = main_merge(data)["name"], list(data["tuning"]["evaluation"]["sets"])
    parts = []
    for name in [*names, *(["mean"] if len(names) > 1 else [])]:
        row = held_out(data, before, name)
        if number(row, "difference") is not None:
            gain = {"value": row["difference"], "low": row["difference_low"], "high": row["difference_high"]}
            what = "in the mean" if name == "mean" else f"on {name}"
            parts.append(f"{interval(gain, signed=True)} {what}")
    return f"Came back: {listed(parts)} (loss before minus loss after, paired)." if parts else ""


def _advised(data: Data) -> str:
    said = str(data["tuning"]["verdict"])
    return f"So: {said}."


def repair_figures(data: Data) -> list[Figure]:
    """Held-out losses before and after, and the coefficients along the blocks."""
    if not data.get("tuning"):
        return []
    return [figure for figure in (_losses(data), _coefficients(data)) if figure]


def _losses(data: Data) -> Figure:
    canvas, before = Canvas(height=4), main_merge(data)["name"]
    experts = _experts(data)
    names = list(data["tuning"]["evaluation"]["sets"])
    shown_of = {
        name: [("base", "base", "soft"), (f"{experts.get(name)} (expert)", experts.get(name, ""), "s2"),
               (before, before, "s1"), ("tuned", "tuned", "s0")]
        for name in names
    }  # fmt: skip
    if len(names) > 1:
        shown_of["mean"] = [("base", "base", "soft"), (before, before, "s1"), ("tuned", "tuned", "s0")]
    every = [held_out(data, model, name) for name, own in shown_of.items() for _, model, _ in own]
    values = [v for row in every for key in ("value", "low", "high") if (v := number(row, key)) is not None]
    low, high = min(values), max(max(values), min(values) + 0.1)
    left, right = 150, RIGHT - 60

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    for name, own in shown_of.items():
        title = "mean over the texts" if name == "mean" else name
        canvas.text(8, canvas.height + 18, title, room=RIGHT - 8, font_weight=600, font_size=13)
        canvas.height += 26
        for label, model, colour in own:
            row = held_out(data, model, name)
            value = number(row, "value")
            if value is None:
                continue
            y = canvas.height + 9
            canvas.add("path", d=f"M{left} {y:.1f}H{right}", stroke="grid")
            canvas.text(left - 10, y + 4, label, room=left - 14, text_anchor="end")
            ends = [number(row, key) for key in ("low", "high")]
            if ends[0] is not None and ends[1] is not None:
                canvas.add("path", d=f"M{x(ends[0]):.1f} {y:.1f}H{x(ends[1]):.1f}", stroke=colour, stroke_width=3)
            canvas.add("circle", f"{label} on {title}: {interval(row)}", cx=x(value), cy=y, r=5.5, fill=colour)
            canvas.text(right + 10, y + 4, shown(value))
            canvas.height += 20
        canvas.height += 6
    step = round_step(high - low)
    first = int(low / step) + 1
    for i in range(first, int(high / step) + 1):
        canvas.text(x(i * step), canvas.height + 10, tick_text(i * step), text_anchor="middle", fill="soft")
    canvas.height += 20
    return Figure(
        "held_out", "Before and after, on text that tuning never saw",
        "Loss in nats per token with 95 % intervals: lower (further left) is better. Orange: one λ for all, the best "
        "that there is; blue: tuned; green: the expert of each text.",
        canvas.svg("Chart of held-out losses of base, expert, task arithmetic and tuned merge"),
    )  # fmt: skip


def _coefficients(data: Data) -> Figure | None:
    """The tuned coefficients of each parent in weights, block by block, beside the one before."""
    _, depth = sites(data)
    uniform = number(data["tuning"], "uniform")
    if not depth.labels or uniform is None:
        return None
    panels = {parent: _lines(data, depth, parent) for parent in data["parents"]}
    _, top = round_ends([v for lines in panels.values() for line in lines for v in line.values])
    canvas = line_panels(panels, depth, unit="ĉ") if top > 0 else Canvas()
    return Figure(
        "tuned_coefficients", "What was changed, block by block",
        "How much of each parent the merge's weights hold in every block, before and after: over several tensors of a "
        "block it is the coefficient that explains them best.",
        canvas.svg("Line chart of coefficients by block before and after tuning"),
    )  # fmt: skip


def _lines(data: Data, depth: Depth, parent: str) -> Sequence[Line]:
    name = next(iter(data["sets"]))
    found = []
    for i, merge in ((1, main_merge(data)["name"]), (0, "tuned")):
        by = {place(row): row for row in rows(data, name, merge)}
        values = [number(by.get(label), "effective_weight", parent) for label in depth.labels]
        tips = [f"{merge}: {parent} {shown(value)}" for value in values]
        found.append(Line(merge, i, values, tips))
    return found
