"""What a probe found, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctl_merge.probing import archive
from ctl_merge.probing.blocks import site_rows
from ctl_merge.probing.costs import best_parent, loss_report
from ctl_merge.probing.intervals import Draws
from ctl_merge.probing.observer import Observations, Rider, Subject
from ctl_merge.probing.scaling import scaling_rows
from ctl_merge.probing.statistics import Statistics
from ctl_merge.together import appearing
from ctl_merge.weights import TaskGrams

FORMAT = 2  # of probe.json; `ctl_merge.probing.schema` describes it


@dataclass(frozen=True)
class ProbeReport:
    """The report as plain data (`data`, the content of probe.json) and as flat rows (`rows`, one a block and merge)."""

    data: dict[str, Any]
    statistics: Statistics

    def with_tuning(self, tuning: Mapping[str, Any]) -> ProbeReport:
        """The report, whose page tells of tuning too."""
        return rebuild(replace(self.statistics, tuning=dict(tuning)))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each data set, merge and site: `pandas.DataFrame(report.rows)`."""
        return [{"set": name, **row} for name, found in self.data["sets"].items() for row in found["blocks"]]

    def to_json(self) -> str:
        """probe.json: numbers as they are, null where a number does not exist."""
        return json.dumps(_plain(self.data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write probe.json, report.html, the figures and the statistics into a folder, whole or not at all.

        An earlier report there is replaced; other files stay. Raises OutputError.
        """
        from ctl_merge.probing.figures import FILES, write_figures
        from ctl_merge.probing.page import render_page

        plain = json.loads(self.to_json())
        page = render_page(plain)
        with appearing(Path(folder), "probe.json", [f"figures/{file}" for file in FILES]) as work:
            (work / "probe.json").write_text(self.to_json(), "utf-8")
            (work / "report.html").write_text(page, "utf-8")
            write_figures(plain, work / "figures")
            archive.save(self.statistics, work / archive.FILE)

    @classmethod
    def load(cls, folder: str | Path) -> ProbeReport:
        """The report of a folder that `save` wrote, computed again from its statistics; no model is run.

        Raises ProbeError where the statistics are missing, damaged, or something else.
        """
        return rebuild(archive.load(Path(folder) / archive.FILE))


def build_report(
    subject: Subject, riders: Sequence[Rider], observed: Mapping[str, Observations], settings: Mapping[str, Any]
) -> ProbeReport:
    """All metrics of a run."""
    return rebuild(Statistics.of(subject, riders, observed, settings=dict(settings)))


def rebuild(statistics: Statistics) -> ProbeReport:
    """All metrics that follow from the statistics of a run."""
    whole, parents = statistics.weights.total(), statistics.parents
    merges = []
    for i, (name, notes) in enumerate(statistics.merges.items()):
        found, explained = statistics.weights.coefficients(whole, i)
        effective = dict(zip(parents, found.tolist(), strict=True))
        merges.append({"name": name, "effective_weight": effective, "explained_weight": explained, **notes})
    data = {
        "format": FORMAT, "ctl_merge": statistics.version,
        "base": statistics.base, "parents": parents, "merges": merges,
        "settings": statistics.settings, "warnings": statistics.warnings,
        "lineage": lineage(statistics.weights, parents),
        "sets": {name: _set(statistics, name, found) for name, found in statistics.sets.items()},
    }  # fmt: skip
    if statistics.tuning is not None:
        data["tuning"] = statistics.tuning
    return ProbeReport(data, statistics)


def lineage(weights: TaskGrams, parents: Sequence[str]) -> list[dict[str, Any]]:
    """How far each parent is from the base: ‖τ‖/‖θ_0‖, cos(θ_i, θ_0), the largest cos(τ_i, τ_j), over the whole model.

    Finetunes have cosines above 0.9 with their base as a rule; far below it, the base is not the base. Task vectors
    share much where the parents have a nearer common ancestor: 1/2 if the base is another finetune of it.
    """
    gram, k = weights.total(), len(parents)
    own = gram[k, k]
    found = []
    for i, name in enumerate(parents):
        both = gram[i, i] + 2 * gram[i, k] + own
        cosine = (gram[i, k] + own) / math.sqrt(both * own) if both > 0 and own > 0 else math.nan
        norm = math.sqrt(gram[i, i] / own) if own > 0 and gram[i, i] >= 0 else math.nan
        others = [c for j in range(k) if j != i and not math.isnan(c := _cosine(gram, i, j))]
        found.append({
            "parent": name, "relative_norm": norm, "cosine_to_base": cosine,
            "cosine_to_others": max(others, default=math.nan),
        })  # fmt: skip
    return found


def _cosine(gram: Any, i: int, j: int) -> float:
    square = gram[i, i] * gram[j, j]
    return float(gram[i, j] / math.sqrt(square)) if square > 0 else math.nan


def _set(statistics: Statistics, name: str, found: Observations) -> dict[str, Any]:
    parents, merges = statistics.parents, list(statistics.merges)
    draws, strata = Draws(len(found.grams.tokens)), found.grams.present()
    blocks = [row for site in found.grams.sites for row in site_rows(found, site, merges, parents, draws)]
    if statistics.scaled:
        by_scale = {1.0: found, **{scale: sets[name] for scale, sets in statistics.scaled.items()}}
        scaling_rows(blocks, by_scale, statistics.main, merges.index(statistics.main), draws)
    losses = found.losses
    return {
        "sequences": draws.count, "tokens": sum(strata.values()), "strata": strata, "skipped_rows": found.skipped,
        "best_parent": best_parent(losses, parents, draws) if losses else None, "blocks": blocks,
        "losses": loss_report(losses, parents, merges, statistics.patches, draws) if losses else None,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
