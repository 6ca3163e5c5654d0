"""Numbers, intervals and runs of blocks, written to be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ctl_merge.probing.record import number

_DEGREES = ((0.1, "nearly linear"), (0.3, "mostly linear"), (0.7, "partly linear"), (1.0, "hardly linear"))


def shown(value: float | None, signed: bool = False, digits: int = 3) -> str:
    """A number to be read; – where there is none. The minus is a minus."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    text = text if abs(value) < 1e4 else f"{value:.2e}"
    return text.replace("-", "−")


def interval(found: Any, signed: bool = False, digits: int = 3) -> str:
    """`0.323 [0.218, 0.432]`."""
    low, high = number(found, "low"), number(found, "high")
    ends = ", ".join(shown(end, digits=digits) for end in (low, high))
    bounds = f" [{ends}]" if low is not None and high is not None else ""
    return shown(number(found, "value"), signed, digits) + bounds


def share(nonlinearity: float | None) -> str:
    """1 - R² in per cent: what linear mixing explains."""
    if nonlinearity is None:
        return "–"
    explained = 100 * max(0.0, 1 - nonlinearity**2)
    if explained in (0, 100):
        return "all" if explained else "none"
    return "over 99.9 %" if explained >= 99.95 else f"{explained:.{0 if explained < 99 else 1}f} %"


def degree(nonlinearity: float) -> str:
    """R in words; the thresholds leave 99, 91 and 51 % explained."""
    return next((word for bound, word in _DEGREES if nonlinearity < bound), "not linear")


def spans(chosen: Iterable[str], among: Sequence[str]) -> str:
    """`blocks 0–2 and 4`: neighbours among all blocks are drawn together; at most four such runs are named."""
    runs: list[list[str]] = []
    wanted, last = set(chosen), -2
    for i, label in enumerate(among):
        if label in wanted:
            joined = i == last + 1 and label.rpartition(" ")[0] == runs[-1][0].rpartition(" ")[0]
            runs = [*runs[:-1], [*runs[-1], label]] if joined else [*runs, [label]]
            last = i
    texts = [run[0] if len(run) == 1 else f"{run[0]}–{run[-1].rpartition(' ')[2]}" for run in runs]
    more = [f"{sum(map(len, runs[3:]))} more"] if len(runs) > 4 else []
    return f"block{'s' if len(wanted) > 1 else ''} {listed([*texts[:3], *more] if more else texts)}"


def listed(texts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)
