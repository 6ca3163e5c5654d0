"""All that a report is computed from, without models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ctl_merge
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.merged import ParentView
from ctl_merge.probing.observer import Observations, Rider, Subject
from ctl_merge.weights import TaskGrams


@dataclass(frozen=True)
class Statistics:
    """What a run leaves, without models: the report follows from it.

    merges: for each, what the report is to say of it (`main`, `alpha`). patches: for each merge, the models that are
    patched at a site. scaled: by scale, observations of the main merge alone. tuning: of a merge before and after it
    was tuned, what tuning found, evaluation included.
    """

    base: str
    parents: list[str]
    merges: dict[str, dict[str, Any]]
    weights: TaskGrams
    sets: Mapping[str, Observations]
    patches: dict[str, dict[str, str]] = field(default_factory=dict)
    scaled: Mapping[float, Mapping[str, Observations]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    version: str = ctl_merge.__version__
    tuning: dict[str, Any] | None = None

    @classmethod
    def of(
        cls, subject: Subject, riders: Sequence[Rider], observed: Mapping[str, Observations],
        merges: Mapping[str, dict[str, Any]] | None = None, **more: Any,
    ) -> Statistics:  # fmt: skip
        """Of a run; `more`: the other fields."""
        patches: dict[str, dict[str, str]] = {}
        for rider in riders:
            if rider.patch:
                patches.setdefault(rider.name.rpartition("/patch@")[0], {})[rider.patch] = rider.name
        notes = {name: dict((merges or {}).get(name, {})) for name in subject.merges}
        base = subject.base
        # Where it lies is nobody's business.
        name = base.ref.short if isinstance(base, FileCheckpoint | ParentView) else base.name
        return cls(name, list(subject.parents), notes, subject.weights, observed, patches, **more)

    @property
    def main(self) -> str:
        """The merge that the report is about."""
        return next((name for name, notes in self.merges.items() if notes.get("main")), next(iter(self.merges)))
