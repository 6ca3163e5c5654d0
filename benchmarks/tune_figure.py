"""Figure and table of tune_against_uniform.py: held-out losses by group of experts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from predicts_loss_figure import ticks_of

UNIFORM, BEST = "task arithmetic", "best expert"
SHOWN = ("tuned", UNIFORM, "average", "ties", "dare", "localize_and_stitch", "regmean", "lot", BEST, "base")
COLOURS = ("#0072B2", "#000000", "#999999", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#D55E00")
_LEFT, _WIDTH, _ROW = 190, 540, 30
_MOST = 1.0  # nats per token beyond which a mark stands at the edge


def means(rows: Sequence[Mapping[str, Any]], group: str, model: str) -> float:
    """The mean held-out loss over seeds."""
    known = [row["mean"] for row in rows if row["experts"] == group and row["model"] == model]
    return float(np.mean(known)) if known else float("nan")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The README's table, means over seeds, and in words what follows from it."""
    lines = [
        f"| experts | {' | '.join(SHOWN)} | gain over task arithmetic, seed by seed |",
        f"|---{'|---' * (len(SHOWN) + 1)}|",
    ]
    for group in dict.fromkeys(row["experts"] for row in rows):
        values = [means(rows, group, model) for model in SHOWN]
        told = "; ".join(_told(gain) for gain in _gains(rows, group))
        lines.append(f"| {group.replace('+', ' + ')} | {' | '.join(_cells(values))} | {told} |")
    return "\n".join(lines) + "\n\n" + summary(rows)


def tasks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Held-out loss by task, a table for each group of experts."""
    parts = ["# Held-out loss by task\n\nNats per token, means over seeds; written by `tune_against_uniform.py`."]
    for group in dict.fromkeys(row["experts"] for row in rows):
        own = [row for row in rows if row["experts"] == group]
        names = list(own[0]["losses"])
        models = [*SHOWN[:8], BEST, *dict.fromkeys(r["model"] for r in own if r["model"] not in SHOWN), "base"]
        table = {model: [row for row in own if row["model"] == model] for model in models}
        columns = [[float(np.mean([r["losses"][name] for r in found])) for found in table.values()] for name in names]
        columns += [
            [float(np.mean([r[over] for r in found])) for found in table.values()] for over in ("mean", "worst")
        ]
        cells = zip(*map(_cells, columns), strict=True)
        lines = [
            f"| model | chosen | {' | '.join((*names, 'mean', 'worst'))} |",
            "|---|---" + "|---" * len(columns) + "|",
        ]
        for (model, found), line in zip(table.items(), cells, strict=True):
            chosen = "; ".join(dict.fromkeys(r["chosen"] for r in found if r["chosen"]))
            lines.append(f"| {model} | {chosen} | {' | '.join(line)} |")
        parts += [f"## {group.replace('+', ' + ')}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def counted(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """In how many runs the tuned merge is ahead of task arithmetic, and of the best of all others."""
    uniform = [row for row in rows if row["model"] == UNIFORM]
    best = [row for row in rows if row.get("best_of_others")]
    tuned = {(row["experts"], row["seed"]): row for row in rows if row["model"] == "tuned"}
    return {
        "runs": len(tuned),
        "ahead": sum(row["gain"][0] > 0 for row in uniform),
        "beyond_doubt": sum(row["gain"][1] > 0 for row in uniform),
        "behind_beyond_doubt": sum(row["gain"][2] < 0 for row in uniform),
        "not_ahead": [f"{row['experts']}, seed {row['seed']}" for row in uniform if row["gain"][0] <= 0],
        "mean_gain": round(float(np.mean([row["gain"][0] for row in uniform])), 4),
        "beats_all_beyond_doubt": sum(row["gain"][1] > 0 for row in best),
        "best_of_others": dict(Counter(row["model"] for row in best).most_common()),
        "worst_text_lower": sum(tuned[row["experts"], row["seed"]]["worst"] < row["worst"] for row in uniform),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the table shows, in words."""
    found, groups = counted(rows), len({row["experts"] for row in rows})
    runs, won, level = found["runs"], found["beats_all_beyond_doubt"], found["not_ahead"]
    best = ", ".join(f"{model} in {count}" for model, count in found["best_of_others"].items())
    behind = f" ({'; '.join(level)})" if level else ""
    return (
        f"Of {runs} runs ({groups} groups, {runs // groups} sets of data each) the tuned merge has a lower mean than "
        f"task arithmetic at its best λ in {found['ahead']}, beyond doubt in {found['beyond_doubt']}; plain task "
        f"arithmetic is level or ahead in {len(level)}{behind}, beyond doubt in {found['behind_beyond_doubt']}. The "
        f"best of all others ({best}) is beaten beyond doubt in {won}; in the other {runs - won} `tune` recommends "
        "that one. Tuning lowers the mean and may pay with one text: the worst text's loss is below task arithmetic's "
        f"in {found['worst_text_lower']} runs."
    )


def _cells(values: Sequence[float]) -> list[str]:
    """Losses as cells, the least in bold; – where there is none."""
    least = min((v for v in values if v == v), default=math.nan)
    shown = [_shown(v) for v in values]
    return ["–" if v != v else f"**{text}**" if v == least else text for v, text in zip(values, shown, strict=True)]


def _shown(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _told(gain: Sequence[float]) -> str:
    value, low, high = gain
    digits = 2 if max(map(abs, gain)) >= 0.1 else 3
    return f"{value:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


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
    return [loss - of[seed, UNIFORM] for (seed, name), loss in of.items() if name == model]


def _gains(rows: Sequence[Mapping[str, Any]], group: str) -> list[list[float]]:
    return [row["gain"] for row in rows if row["experts"] == group and row["model"] == UNIFORM]
