"""Figure and table of tune_against_uniform.py: held-out losses by group of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from predicts_loss_figure import ticks_of

UNIFORM = "task arithmetic"
SHOWN = ("tuned", UNIFORM, "average", "ties", "dare", "localize_and_stitch", "regmean", "lot", "best expert", "base")
COLOURS = ("#0072B2", "#000000", "#999999", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#D55E00")
_LEFT, _WIDTH, _ROW = 190, 540, 30
_MOST = 1.0  # nats per token beyond which a mark stands at the edge


def means(rows: Sequence[Mapping[str, Any]], group: str, model: str) -> float:
    """The mean held-out loss over seeds."""
    known = [row["mean"] for row in rows if row["experts"] == group and row["model"] == model]
    return float(np.mean(known)) if known else float("nan")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The README's table: means over seeds, and in how many seeds tuning wins beyond doubt."""
    lines = [
        f"| experts | {' | '.join(SHOWN)} | gain over task arithmetic, seed by seed |",
        f"|---{'|---' * (len(SHOWN) + 1)}|",
    ]
    for group in dict.fromkeys(row["experts"] for row in rows):
        values = {model: means(rows, group, model) for model in SHOWN}
        least = min(v for v in values.values() if v == v)
        cells = [f"**{v:.2f}**" if v == least else f"{v:.2f}" if v == v else "–" for v in values.values()]
        gains = [row["gain"] for row in rows if row["experts"] == group and row["model"] == UNIFORM]
        told = "; ".join(f"{g:+.2f} [{low:.2f}, {high:.2f}]" for g, low, high in gains)
        lines.append(f"| {group.replace('+', ' + ')} | {' | '.join(cells)} | {told} |")
    return "\n".join(lines)


def figure(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    """For each group the mean over seeds of each model's loss minus task arithmetic's: an SVG.

    The tuned merge has one small mark for each seed besides, with its paired 95 % interval.
    """
    listed = list(dict.fromkeys(row["experts"] for row in rows))
    points = {(group, model): _above(rows, group, model) for group in listed for model in models}
    known = [min(float(np.mean(own)), _MOST) for own in points.values() if own]
    ticks = ticks_of([0.0, *known])
    bottom = 34 + _ROW * len(listed)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {bottom + 84}" font-family="sans-serif" '
             f'font-size="12"><rect width="760" height="{bottom + 84}" fill="#fff"/>']  # fmt: skip

    def across(value: float) -> float:
        return _LEFT + _WIDTH * (min(max(value, ticks[0]), ticks[-1]) - ticks[0]) / (ticks[-1] - ticks[0])

    for tick in ticks:
        look = "#666" if abs(tick) < 1e-9 else "#e4e4e4"
        parts.append(f'<path d="M{across(tick):.1f} 24V{bottom}" stroke="{look}"/>')
        parts.append(f'<text x="{across(tick):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{tick:g}</text>')
    parts.append(f'<text x="{_LEFT + _WIDTH / 2}" y="{bottom + 34}" text-anchor="middle">'
                 "mean held-out loss minus that of task arithmetic at its best λ, nats per token</text>")  # fmt: skip
    for i, group in enumerate(listed):
        y = 34 + _ROW * (i + 0.5)
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(group.replace("+", " + "))}</text>')
        for gain, low, high in _gains(rows, group):
            tip = f"{group}: tuned {-gain:+.3f} [{-high:.3f}, {-low:.3f}]"
            parts.append(f'<path d="M{across(-high):.1f} {y}H{across(-low):.1f}" stroke="{COLOURS[0]}" '
                         f'stroke-width="5" stroke-opacity=".25"><title>{escape(tip)}</title></path>')  # fmt: skip
        for colour, model in reversed(list(zip(COLOURS, models, strict=False))):
            own = points[group, model]
            if own:
                mean = float(np.mean(own))
                beyond = ", beyond the scale" if mean > ticks[-1] else ""
                tip = escape(f"{group}, {model}: {mean:+.3f}{beyond}")
                parts.append(f'<circle cx="{across(mean):.1f}" cy="{y}" r="5" fill="{colour}" stroke="#fff">'
                             f"<title>{tip}</title></circle>")  # fmt: skip
    for i, (colour, model) in enumerate(zip(COLOURS, models, strict=False)):
        x, y = 30 + 180 * (i % 4), bottom + 56 + 18 * (i // 4)
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{colour}"/><text x="{x + 10}" y="{y}">{model}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _above(rows: Sequence[Mapping[str, Any]], group: str, model: str) -> list[float]:
    """A model's loss minus task arithmetic's, one for each seed."""
    of = {(row["seed"], row["model"]): row["mean"] for row in rows if row["experts"] == group}
    return [loss - of[seed, "task arithmetic"] for (seed, name), loss in of.items() if name == model]


def _gains(rows: Sequence[Mapping[str, Any]], group: str) -> list[list[float]]:
    return [row["gain"] for row in rows if row["experts"] == group and "gain" in row]
