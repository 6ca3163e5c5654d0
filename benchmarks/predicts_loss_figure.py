"""The figure of ctl_predicts_loss.py: R of merges against what they cost in loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = {"linear": "#0072B2", "task_arithmetic": "#D55E00", "ties": "#009E73", "dare_linear": "#CC79A7",
           "slerp": "#000000"}  # fmt: skip


def figure(
    shown: Sequence[Mapping[str, object]], correlations: Sequence[Mapping[str, object]], outcomes: Mapping[str, str]
) -> str:
    """R against every outcome, coloured by method, with the correlation over as many merges: an SVG."""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 350" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="760" height="350" fill="#fff"/>')
    for place, (outcome, title) in enumerate(outcomes.items()):
        rho = next(c for c in correlations if (c["predictor"], c["outcome"], c["count"]) == ("R", outcome, len(shown)))
        low, high = rho["all_interval"]  # type: ignore[misc]
        head = f"{title}: ρ = {rho['all']:.2f} [{low:.2f}, {high:.2f}], {len(shown)} merges"
        parts += _panel(shown, outcome, head, 45 + 375 * place)
    for i, (method, colour) in enumerate(COLOURS.items()):
        parts.append(f'<circle cx="{60 + 130 * i}" cy="334" r="4.5" fill="{colour}" fill-opacity=".75"/>')
        parts.append(f'<text x="{69 + 130 * i}" y="338">{method}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(rows: Sequence[Mapping[str, object]], outcome: str, head: str, left: int) -> list[str]:
    width, bottom, height = 320, 280, 240
    xs, ys = ([float(row[name]) for row in rows] for name in ("R", outcome))  # type: ignore[arg-type]
    ticks = (ticks_of(xs), ticks_of(ys))
    (x0, x1), (y0, y1) = ((t[0], t[-1]) for t in ticks)
    across = lambda v: left + width * (v - x0) / (x1 - x0)  # noqa: E731
    up = lambda v: bottom - height * (v - y0) / (y1 - y0)  # noqa: E731
    parts = [f'<text x="{left}" y="22" font-size="11">{escape(head)}</text>']
    for v in ticks[1]:
        look = "#888" if abs(v) < 1e-9 else "#e4e4e4"
        parts.append(f'<path d="M{left} {up(v):.1f}h{width}" stroke="{look}"/>')
        parts.append(f'<text x="{left - 6}" y="{up(v) + 4:.1f}" text-anchor="end" fill="#555">{v:g}</text>')
    for v in ticks[0]:
        parts.append(f'<text x="{across(v):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{v:g}</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{bottom + 34}" text-anchor="middle">'
        "nats per token against R, mean of blocks</text>"
    )
    for row, x, y in zip(rows, xs, ys, strict=True):
        tip = escape(f"{row['recipe']}, {row['experts']}: R {x:.2f}, {y:.2f}")
        parts.append(
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="4.5" fill="{COLOURS[str(row["method"])]}" '
            f'fill-opacity=".75" stroke="#fff" stroke-width=".6"><title>{tip}</title></circle>'
        )
    return parts


def ticks_of(values: Sequence[float]) -> list[float]:
    """Round numbers from below the least to above the largest value."""
    span = max(values) - min(values) or 1.0
    step = next(s for s in (m * 10.0**e for e in range(-3, 4) for m in (1, 2, 5)) if span / s <= 6)
    first, last = math.floor(min(values) / step), math.ceil(max(values) / step)
    return [round(i * step, 6) for i in range(first, last + 1)]
