"""Coefficients that tuning tries, each with its validation loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.merging import Meter
from ctl_merge.probing.observer import Observations, Rider, Subject
from ctl_merge.probing.run import observe
from ctl_merge.tuning.adjustable import Adjustable
from ctl_merge.tuning.closed_form import least_squares, normal_equations, site_of
from ctl_merge.tuning.descent import Bounds, Found, descend
from ctl_merge.tuning.options import TuneOptions
from ctl_merge.tuning.rivals import Trier
from ctl_merge.tuning.splits import Splits, windows
from ctl_merge.tuning.written import Writer
from ctl_merge.weights import task_grams

_RIDGES, _SHARES = (0.01, 0.1, 1.0), (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Candidates:
    """Coefficients from the best single λ on: `all` of them."""

    root: Checkpoint
    parents: Mapping[str, Checkpoint]
    model: Adjustable
    writer: Writer
    trier: Trier
    tokenizer: Any
    splits: Splits
    options: TuneOptions
    meter: Meter

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.options.least, self.options.most)

    def all(self, uniform: float) -> list[Found]:
        """One coefficient for all; least squares for each block; descent at the level asked for, from the better."""
        options, splits = self.options, self.splits
        listed, place = self.model.places("model")
        start = self.bounds.clip(np.full((1, len(self.parents)), uniform))
        self.model.set(start, place)
        found = [Found("one λ", "model", listed, start, self.model.loss(splits.validation))]
        if options.closed_form and options.level != "model" and len(self.parents) > 1:
            found += self._closed_form(uniform)
        if options.steps:
            best = min(found, key=lambda each: each.validation)
            _, at = self.model.places(best.level)
            tensors = self.model.tensors(best.coefficients, at)
            with self.meter("tuning", options.steps) as told:
                found.append(descend(self.model, options.level, tensors, splits.tuning, splits.validation, self.bounds,
                                     steps=options.steps, told=told))  # fmt: skip
        return found

    def _closed_form(self, uniform: float) -> list[Found]:
        """Least squares on the features of each block; validation chooses the ridge, and how far to go from λ."""
        observed = self._observed(uniform)
        owners = _owners(observed, list(self.parents))
        if not owners:
            return []
        listed, place = self.model.places("block")
        sites = list(next(iter(observed.values())).grams.sites)
        equations = {s: normal_equations(observed, s, owners, len(self.parents)) for s in sites}
        tried = []
        for ridge in _RIDGES:
            c = np.full((len(listed), len(self.parents)), uniform)
            for i, group in enumerate(listed):
                if site := site_of(group, sites):
                    c[i] = least_squares(*equations[site], ridge, uniform, self.bounds.least, self.bounds.most)
            for share in _SHARES:
                mixed = self.bounds.clip(share * c + (1 - share) * uniform)
                self.model.set(mixed, place)
                how = f"least squares on features (ridge {ridge:g}, {share:g} of the way from λ)"
                tried.append(Found(how, "block", listed, mixed, self.model.loss(self.splits.validation)))
        return [min(tried, key=lambda found: found.validation)]

    def _observed(self, uniform: float) -> dict[str, Observations]:
        """The features of all models and of the merge by one λ, on the texts to tune on."""
        merged = self.trier.open(self.writer.method("task_arithmetic", {"weight": uniform})).merged
        weights = task_grams(self.root, list(self.parents.values()), [merged])
        subject = Subject(self.root, self.parents, {"merged": merged}, weights)
        rider = Rider("merged", merged, ghost=False)
        return observe(subject, [rider], windows(self.splits.tuning, self.tokenizer), self.trier.running)


def _owners(observed: Mapping[str, Observations], parents: list[str]) -> dict[str, int]:
    """Whose task each text is, by the least loss; none where that is not known of all, or a parent has no text.

    A parent without a task of its own has no features to be near to.
    """
    owners = {}
    for name, own in observed.items():
        if own.losses is None:
            return {}
        owners[name] = int(np.argmin([sum(own.losses.nll[parent]) for parent in parents]))
    return owners if set(owners.values()) == set(range(len(parents))) else {}
