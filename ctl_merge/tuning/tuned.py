"""What tuning found, as plain data and as a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctl_merge.errors import ProbeError
from ctl_merge.evaluating.evaluation import Evaluation
from ctl_merge.output import disk_errors
from ctl_merge.probing.wording import interval, shown
from ctl_merge.together import write_whole

TUNED = "tuned"


@dataclass(frozen=True)
class Tuned:
    """The recipe to be used (`text`), and what it was compared with on data that tuning never saw.

    `recipes`: every candidate's and rival's text by name. `recommended`: the name of the one in `text`; `verdict` says
    why. `candidates`: what tuning tried, with the validation loss of each. `coefficients`: of the tuned merge, one for
    each group of tensors and parent. `evaluation`: all models on the held-out data, differences are to the tuned merge.
    """

    text: str
    recommended: str
    verdict: str
    recipes: Mapping[str, str]
    candidates: list[dict[str, Any]]
    coefficients: list[dict[str, Any]]
    evaluation: Evaluation
    chosen: Mapping[str, str]
    splits: str
    uniform: float
    curve: Mapping[float, float] = field(default_factory=dict)
    report: Any = None  # a ProbeReport of task arithmetic and the tuned merge, if it was asked for

    @property
    def data(self) -> dict[str, Any]:
        return {
            "recommended": self.recommended, "verdict": self.verdict, "splits": self.splits, "uniform": self.uniform,
            "curve": {str(k): v for k, v in sorted(self.curve.items())}, "chosen": dict(self.chosen),
            "candidates": self.candidates, "coefficients": self.coefficients, "evaluation": self.evaluation.data,
        }  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(self.data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save_report(self, folder: str | Path) -> None:
        """Write the page of the merge before and after: report.html, probe.json, figures. Raises OutputError."""
        if self.report is None:
            raise ProbeError("the merge was tuned without a look at its blocks: tune it with probe=True")
        self.report.with_tuning(self.data).save(folder)

    def save(self, path: str | Path) -> None:
        """Write the recommended recipe. Raises OutputError."""
        path = Path(path)
        with disk_errors(path, "Free space, or choose another file, and run the same command again."):
            write_whole(path, self.text)


def best_rival(evaluation: Evaluation, metric: str = "loss") -> str:
    """The model, other than the tuned one, of the least mean loss on the held-out data."""
    data = _summary(evaluation)
    others = [name for name in evaluation.models if name != TUNED]
    return min(others, key=lambda name: (evaluation.of(name, data, metric) or {})["value"])


def decide(evaluation: Evaluation) -> tuple[str, str]:
    """Which model to take, and why: the tuned one only where it is better beyond doubt."""
    data, rival = _summary(evaluation), best_rival(evaluation)
    row = evaluation.of(rival, data, "loss") or {}
    ends = ("difference", "difference_low", "difference_high")
    gain = dict(zip(("value", "low", "high"), (row[end] for end in ends), strict=True))
    losses = {name: shown((evaluation.of(name, data, "loss") or {})["value"]) for name in (TUNED, rival)}
    told = f"held-out {'mean ' if data == 'mean' else ''}loss {losses[TUNED]} tuned, {losses[rival]} {rival}"
    told += f", gain {interval(gain, signed=True)}"
    if gain["low"] > 0:
        return TUNED, f"the tuned merge beats the best of the others: {told}"
    known = "is not better beyond doubt" if gain["value"] > 0 else "does not beat the best of the others"
    return rival, f"the tuned merge {known}: {told}; use {rival}"


def _summary(evaluation: Evaluation) -> str:
    """The row over all data sets, or the one data set."""
    return "mean" if len(evaluation.sets) > 1 else next(iter(evaluation.sets))
