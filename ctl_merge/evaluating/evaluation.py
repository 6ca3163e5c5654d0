"""What an evaluation found, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ctl_merge
from ctl_merge.evaluating.metrics import kind_of
from ctl_merge.local_paths import without_paths
from ctl_merge.output import disk_errors
from ctl_merge.together import write_whole

OVER = ("mean", "worst")  # rows over all data sets


@dataclass(frozen=True)
class Evaluation:
    """One flat row for each model, data set and metric: `pandas.DataFrame(evaluation.rows)`.

    value, low, high: with 95 % intervals (Wilson's for shares, else by bootstrap over sequences); difference,
    difference_low, difference_high: to the first model, paired. Data sets `mean` and `worst` are over all of them.
    `answers`: for each model and data set what it wrote, with why a program failed. `sets`: the data sets by name, with
    the spec that they were read by. `folders`: of the models that lie in one.
    """

    rows: list[dict[str, Any]]
    sets: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    answers: Mapping[str, Mapping[str, list[dict[str, Any]]]] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The models in the order in which they were given."""
        return list(dict.fromkeys(row["model"] for row in self.rows))

    def of(self, model: str, data: str, metric: str) -> dict[str, Any] | None:
        """One row, None where that was not measured."""
        wanted = (model, data, metric)
        return next((row for row in self.rows if (row["model"], row["data"], row["metric"]) == wanted), None)

    @property
    def data(self) -> dict[str, Any]:
        """All of it but the answers, as JSON has it: a number that does not exist is null."""
        rows = [{key: _plain(value) for key, value in row.items()} for row in self.rows]
        return {
            "ctl_merge": ctl_merge.__version__, "settings": dict(self.settings),
            "sets": {name: without_paths(spec) for name, spec in self.sets.items()},
            "warnings": [without_paths(line) for line in self.warnings], "rows": rows,
        }  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(self.data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: Path) -> None:
        """Write results and answers as JSON. Raises OutputError."""
        text = json.dumps({**self.data, "answers": self.answers}, indent=2, ensure_ascii=False, allow_nan=False)
        with disk_errors(path, "Free space, or choose another file, and run the same command again."):
            write_whole(path, text + "\n")

    def results(self, model: str) -> list[dict[str, Any]]:
        """What was measured of a model as entries of the Hub's `model-index`, for its card.

        Intervals stand in the metric's arguments; what says something of two models only is left out.
        """
        return [
            {
                "task": {"type": "text-generation"},
                "dataset": {"type": _published(self.sets[row["data"]], row["data"]), "name": row["data"]},
                "metrics": [{"type": row["metric"], "name": kind_of(row["metric"]).title,
                             "value": round(row["value"], 6), "args": _bounds(row)}],
            }
            for row in self.rows
            if row["model"] == model and row["data"] in self.sets and ":" not in row["metric"]
            and _plain(row["value"]) is not None
        ]  # fmt: skip


def _published(spec: str, name: str) -> str:
    """A data set's address on the Hub; of a file nothing but the name that it was given."""
    source = spec.partition("=")[2] or spec
    source = source.partition("@")[0].partition(":")[0]
    return source if source.count("/") == 1 and not Path(source).exists() and not source.startswith(".") else name


def _bounds(row: Mapping[str, Any]) -> dict[str, Any]:
    ends = {end: _plain(row[end]) for end in ("low", "high")}
    known = {f"interval_95_{end}": round(value, 6) for end, value in ends.items() if value is not None}
    return {"items": row["count"], **known}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
