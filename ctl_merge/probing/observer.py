"""What is kept of models that run in step.

A Subject is what is probed; Riders are the merges that run beside its base and parents; the Observer takes their
statistics at every meeting, and leaves Observations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.probing.data import STRATA
from ctl_merge.probing.grams import Grams, SiteGrams
from ctl_merge.probing.lockstep import Visit
from ctl_merge.probing.losses import Losses
from ctl_merge.probing.metrics import interpolation, unit
from ctl_merge.weights import TaskGrams

INPUT = "input"  # the site before the first block of a stack
BASE = "base"


@dataclass(frozen=True)
class Rider:
    """A merge that is run beside the parents. The riders of a run begin with the subject's merges, in their order.

    `ghost`: its blocks are run on the interpolated input as well. `as_written`: rounded to the checkpoint's dtype
    before it is run. `patch`: the site at which its features are replaced by the interpolation.
    """

    name: str
    checkpoint: Checkpoint
    ghost: bool = True
    as_written: bool = False
    patch: str | None = None
    weights_of: int | None = None  # the rider whose coefficients it has; None: its own, by its place


@dataclass(frozen=True)
class Subject:
    """What is probed: a base, its finetunes, merges of them, and their inner products in weight space."""

    base: Checkpoint
    parents: Mapping[str, Checkpoint]
    merges: Mapping[str, Checkpoint]
    weights: TaskGrams

    def coefficients(self, merge: int, tensors: Sequence[str] | None = None) -> tuple[np.ndarray, float]:
        """The merge's effective coefficients in weight space over some tensors (all: None), and their R².

        The whole model's for a parent that is the base in these tensors: its features differ by what lies before.
        """
        gram, k = self.weights.total(tensors), len(self.parents)
        unmoved = np.diag(gram)[:k] == 0
        if tensors is None or not unmoved.any():
            return self.weights.coefficients(gram, merge)
        whole = self.weights.coefficients(self.weights.total(), merge)
        if unmoved.all():
            return whole
        found, explained = self.weights.coefficients(gram, merge)
        return np.where(unmoved, whole[0], found), explained


@dataclass
class Observations:
    """What one run over one data set leaves.

    coefficients, explained: by site, one for each rider. skipped: rows of the data set that hold a null.
    feature_bytes, logit_bytes: the most that all models together held at a meeting, and at the end.
    """

    grams: Grams
    losses: Losses | None
    coefficients: dict[str, list[np.ndarray]] = field(default_factory=dict)
    explained: dict[str, list[float]] = field(default_factory=dict)
    skipped: int = 0
    feature_bytes: int = 0
    logit_bytes: int = 0


def _block_of(site: str) -> str:
    """The block that a site belongs to: `model.layers.3` of `model.layers.3.mlp`."""
    return site if site.rpartition(".")[2].isdigit() else site.rpartition(".")[0]


class Observer:
    """Takes the statistics at every meeting of the models."""

    def __init__(self, subject: Subject, riders: Sequence[Rider], tensors: Mapping[str, list[str]]) -> None:
        self.subject, self.riders = subject, riders
        self.names = [BASE, *subject.parents]
        self.strata: Tensor = torch.empty(0)
        self.own, self.explained = self._coefficients(tensors)
        outside = sorted(subject.weights.grams.keys() - {name for names in tensors.values() for name in names})
        self.before = self._predecessors(list(tensors), self._of_riders(outside or None)[0])
        merges = [rider.name for rider in riders if rider.name in subject.merges]
        self.whole = self._of_riders(None)[0][: len(merges)]
        self.begin()

    def begin(self) -> None:
        """Forget the last data set."""
        self.grams = Grams(list(STRATA))
        self.massive: dict[str, list[int]] = {}
        self.coefficients: dict[str, list[np.ndarray]] = {}
        self.losses = Losses(
            [*self.names, *(rider.name for rider in self.riders)], [r.name for r in self.riders[: len(self.whole)]]
        )

    def end(self) -> Observations:
        """What is kept of the data set."""
        explained = {site: self.explained[_block_of(site)] for site in self.coefficients if _block_of(site) in self.own}
        return Observations(self.grams, self.losses if self.losses.count else None, self.coefficients, explained)

    def _of_riders(self, tensors: Sequence[str] | None) -> tuple[list[np.ndarray], list[float]]:
        places = [i if rider.weights_of is None else rider.weights_of for i, rider in enumerate(self.riders)]
        found = [self.subject.coefficients(place, tensors) for place in places]
        return [c for c, _ in found], [r2 for _, r2 in found]

    def _coefficients(self, tensors: Mapping[str, list[str]]) -> tuple[dict, dict]:
        own, explained = {}, {}
        for site, names in tensors.items():
            own[site], explained[site] = self._of_riders([n for n in names if n in self.subject.weights.grams] or None)
        return own, explained

    def _predecessors(self, sites: list[str], first: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
        """The coefficients of what a block reads: those of the block before it, of the embeddings for the first."""
        found: dict[str, list[np.ndarray]] = {}
        last: dict[str, list[np.ndarray]] = {}
        for site in sites:
            stack = site.rpartition(".")[0]
            found[site] = last.get(stack, first)
            last[stack] = self.own[site]
        return found

    def on_inputs(self, site: str, hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Statistics of a stack's input; the interpolated input for the merges that have a ghost."""
        if site.endswith(".0"):
            self._take(f"{site.removesuffix('.0')}.{INPUT}", hidden, {}, self.before[site])
        wanted = [(r.name, c) for r, c in zip(self.riders, self.before[site], strict=True) if r.ghost and not r.patch]
        return {name: self._interpolate(hidden, c) for name, c in wanted}

    def on_outputs(self, site: str, visits: Mapping[str, Visit]) -> dict[str, Tensor]:
        """Statistics of a block and its parts; the interpolated output for the merges that are patched here."""
        for part in visits[BASE].outputs:
            if all(part in visit.outputs for visit in visits.values()):
                outputs = {name: visit.outputs[part] for name, visit in visits.items()}
                ghosts = {name: visit.ghost[part] for name, visit in visits.items() if part in visit.ghost}
                self._take(site if part == "block" else f"{site}.{part}", outputs, ghosts, self.own[site])
        hidden = {name: visits[name].outputs["block"] for name in self.names}
        patched = [(r.name, c) for r, c in zip(self.riders, self.own[site], strict=True) if r.patch == site]
        return {name: self._interpolate(hidden, c) for name, c in patched}

    def _interpolate(self, hidden: Mapping[str, Tensor], coefficients: np.ndarray) -> Tensor:
        shares = interpolation(coefficients, len(self.names))
        mixed = sum(share * hidden[name].double() for share, name in zip(shares, self.names, strict=True))
        return mixed.to(hidden[BASE].dtype)  # type: ignore[union-attr]

    def _take(
        self, site: str, outputs: Mapping[str, Tensor], ghosts: Mapping[str, Tensor], coefficients: list[np.ndarray]
    ) -> None:
        kept = [rider for rider in self.riders if not rider.patch]
        names = [*self.names, *(rider.name for rider in kept)]
        features = [*(outputs[name] for name in names), *ghosts.values()]
        if features[0].ndim != 3 or any(f.shape != features[0].shape for f in features):
            return  # a part's output that is not a sequence of vectors
        if len(features[0]) != len(self.strata) or features[0].shape[1] > self.strata.shape[-1]:
            return
        length = features[0].shape[1]  # an encoder reads the first tokens of a window, a decoder after it the last
        strata = self.strata[..., :length] if "encoder" in site.split(".") else self.strata[..., -length:]
        strata = strata.to(features[0].device)
        sources = [*names, *(f"{name}/ghost" for name in ghosts)]
        grams = self.grams.sites.setdefault(site, SiteGrams(sources, self.massive.get(site, [])))
        self.coefficients[site] = coefficients
        size = len(grams.sources)
        of_kept = [c for rider, c in zip(self.riders, coefficients, strict=True) if not rider.patch]
        pairs = [
            (torch.from_numpy(unit(len(self.names) + i, size)), torch.from_numpy(interpolation(c, size)))
            for i, c in enumerate(of_kept)
        ]
        grams.add(torch.stack(features), strata, pairs)
