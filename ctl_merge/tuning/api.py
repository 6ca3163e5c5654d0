"""Tuning a recipe's coefficients, and proving it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.errors import DataError
from ctl_merge.evaluating.api import loss_metrics
from ctl_merge.evaluating.evaluation import Evaluation
from ctl_merge.evaluating.measured import rows_of
from ctl_merge.evaluating.metrics import Measured
from ctl_merge.evaluating.passages import passages_of
from ctl_merge.merged import ParentView
from ctl_merge.merging import Merge, Meter, no_meter
from ctl_merge.probing.observer import Rider, Subject
from ctl_merge.probing.placement import place
from ctl_merge.probing.report import ProbeReport, rebuild
from ctl_merge.probing.run import Running, observe
from ctl_merge.probing.statistics import Statistics
from ctl_merge.probing.windows import merge_tokenizer, parse_specs, window_length
from ctl_merge.recipe import Recipe
from ctl_merge.reference import ModelRef
from ctl_merge.roles import roles
from ctl_merge.tuning.adjustable import Adjustable
from ctl_merge.tuning.closed_form import least_squares, normal_equations, site_of
from ctl_merge.tuning.descent import Bounds, Found, descend
from ctl_merge.tuning.levels import LEVELS, groups
from ctl_merge.tuning.options import TuneOptions
from ctl_merge.tuning.rivals import TIES, UNIFORM, Rival, Trier, best_of, best_uniform, joined, rivals
from ctl_merge.tuning.search import check_search, search
from ctl_merge.tuning.splits import Splits, split, windows
from ctl_merge.tuning.tuned import TUNED, Tuned, decide
from ctl_merge.tuning.written import Writer
from ctl_merge.weights import task_grams

_PROBED = 16  # held-out sequences of each data set that the probe looks at
_RIDGES, _SHARES = (0.01, 0.1, 1.0), (0.25, 0.5, 0.75, 1.0)


def tune(
    recipe: Recipe | str | Path, data: str | Sequence[str] = (), *, held_out: str | Sequence[str] = (),
    base: str | None = None, folder: str | Path = ".", also: Mapping[str, Mapping[str, str]] | None = None,
    options: TuneOptions | None = None, meter: Meter = no_meter, **how: Any,
) -> Tuned:  # fmt: skip
    """Find coefficients with which the recipe's models merge at the least loss on `data`, and compare on other data.

    `data`: a data set for each task, `TASK=SPEC` as the probe reads them, else the shipped tasks; `held_out`: of the
    same names, to compare on.
    `folder`: where the recipe will lie, for relative paths of models. `also`: more to compare with, by name recipes to
    choose from, as text. `how`: fields of TuneOptions. Tried are, in turn:
    one coefficient for all, by its loss; coefficients of blocks by least squares on features; descent on the loss; a
    search, if `trials` are given. The validation data choose among them, the held-out data judge.
    """
    options = options or TuneOptions(**how)
    _check(options)
    opened = Merge(recipe)
    opened.fetch()
    root, parents = roles(opened, ModelRef.parse(base) if base else None)
    assert isinstance(root, ParentView)
    refs = [checkpoint.ref for checkpoint in parents.values() if isinstance(checkpoint, ParentView)]
    writer = Writer(opened.recipe, root.ref, refs, Path(folder))
    length = window_length(root, options)
    tokenizer = merge_tokenizer(opened, options.trust_remote_code)
    texts, others = (
        passages_of(parse_specs(own), tokenizer, options, length) if own is data or own else {}
        for own in (data, held_out)
    )
    placement = place(root, options.device_map or "cpu", options.max_memory, options.blocks,
                      trust_remote_code=options.trust_remote_code)  # fmt: skip
    running = Running(placement, options.batch, options.blocks, options.trust_remote_code)
    work = _Tuning(
        opened,
        root,
        parents,
        writer,
        tokenizer,
        split(texts, others, options.seed),
        options,
        running,
        meter,
        also or {},
    )
    return work.run()


def _check(options: TuneOptions) -> None:
    if options.level not in LEVELS:
        raise DataError(f"--level {options.level}: it is one of {', '.join(LEVELS)}")
    if options.least >= options.most:
        raise DataError(f"the cap {options.most:g} is not above the least coefficient {options.least:g}")
    if options.trials:
        check_search(options.study)


@dataclass
class _Tuning:
    """One tuning, step by step."""

    opened: Merge
    root: Checkpoint
    parents: Mapping[str, Checkpoint]
    writer: Writer
    tokenizer: Any
    splits: Splits
    options: TuneOptions
    running: Running
    meter: Meter
    also: Mapping[str, Mapping[str, str]]

    def run(self) -> Tuned:
        options, splits = self.options, self.splits
        self.bounds = Bounds(options.least, options.most)
        self.model = Adjustable(self.root, self.parents, self.running.placement, options.batch, options.blocks,
                                options.trust_remote_code)  # fmt: skip
        self.trier = Trier(self.running, self.writer.start)
        seen = joined(splits.tuning, splits.validation)
        uniform, curve = best_uniform(self.model, seen)
        candidates = self._candidates(uniform)
        searched = self._searched(seen) if options.trials else None
        best = min(candidates, key=lambda found: found.validation)
        tuned = Rival(TUNED, self._text(best), f"{best.how}, a coefficient for each {best.level}")
        if searched and self.trier.loss(searched.text, splits.validation) < best.validation:
            tuned = Rival(TUNED, searched.text, f"search, {searched.chosen}")
        with self.meter("comparing", len(TIES) + sum(map(len, self.also.values()))) as told:
            others = list(rivals(self.writer, uniform, self._own(), self.trier, seen, told))
            others += [best_of(name, choices, self.trier, seen, told) for name, choices in self.also.items()]
        evaluation = self._compare([tuned, *others, *([searched] if searched else [])])
        return self._concluded(tuned, best, candidates, others, evaluation, uniform, curve)

    def _candidates(self, uniform: float) -> list[Found]:
        """One coefficient for all; least squares for each block; descent at the level asked for, from the better."""
        options, splits = self.options, self.splits
        listed, place = self.model.places("model")
        start = self.bounds.clip(np.full((1, len(self.parents)), uniform))
        self.model.set(start, place)
        found = [Found("one λ", "model", listed, start, self.model.loss(splits.validation))]
        if options.closed_form and options.level != "model" and len(self.parents) > 1:
            found += self._closed_form(uniform)
        if not options.steps:
            return found
        best = min(found, key=lambda each: each.validation)
        _, at = self.model.places(best.level)
        tensors = self.model.tensors(best.coefficients, at)
        with self.meter("tuning", options.steps) as told:
            found.append(descend(self.model, options.level, tensors, splits.tuning, splits.validation, self.bounds,
                                 steps=options.steps, told=told))  # fmt: skip
        return found

    def _closed_form(self, uniform: float) -> list[Found]:
        """Least squares on the features of each block; validation chooses the ridge, and how far to go from λ."""
        merged = self.trier.open(self.writer.method("task_arithmetic", {"weight": uniform})).merged
        weights = task_grams(self.root, list(self.parents.values()), [merged])
        subject = Subject(self.root, self.parents, {"merged": merged}, weights)
        rider = Rider("merged", merged, ghost=False)
        observed = observe(subject, [rider], windows(self.splits.tuning, self.tokenizer), self.running)
        owners = {}
        for name, own in observed.items():
            if own.losses is None:
                return []
            nll = [sum(own.losses.nll[parent]) for parent in self.parents]
            owners[name] = int(np.argmin(nll))
        if set(owners.values()) != set(range(len(self.parents))):
            return []  # a parent without a task of its own has no features to be near to
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

    def _searched(self, seen: Any) -> Rival:
        with self.meter("searching", self.options.trials) as told:
            return search(self.writer, self.trier, seen, self.options.trials, self.options.study, self.splits.said,
                          self.options.seed, told)  # fmt: skip

    def _own(self) -> tuple[str, str]:
        """The recipe as it is."""
        return (Path(self.opened.recipe.name).stem or "recipe", self.writer.original())

    def _text(self, found: Found, account: Sequence[str] = ()) -> str:
        _, place = self.model.places(found.level)
        tensors = self.model.tensors(found.coefficients, place)
        return self.writer.coefficients(tensors, groups(tensors, self.root.config, found.level), account)

    def _compare(self, made: Sequence[Rival]) -> Evaluation:
        """All merges, the parents and the base on the held-out texts: each recipe as it will be read."""
        merges: dict[str, Checkpoint] = {rival.name: self.trier.open(rival.text).merged for rival in made}
        table: dict[str, dict[str, dict[str, Measured]]] = {}
        for name, checkpoint in {**merges, **self.parents, "base": self.root}.items():
            found = self.trier.predictions(checkpoint, self.splits.held_out)
            table[name] = {text: loss_metrics(own) for text, own in found.items()}
        return Evaluation(rows_of(table), {name: name for name in self.splits.held_out}, {"splits": self.splits.said})

    def _concluded(
        self, tuned: Rival, best: Found, candidates: Sequence[Found], others: Sequence[Rival], evaluation: Evaluation,
        uniform: float, curve: Mapping[float, float],
    ) -> Tuned:  # fmt: skip
        recommended, verdict = decide(evaluation)
        account = [
            f"Found by ctl-merge tune: {verdict}.",
            f"Data: {self.splits.said}.",
            *(f"Tried: {found.how}, by {found.level}: validation loss {found.validation:.4f}." for found in candidates),
        ]
        texts = {rival.name: rival.text for rival in (tuned, *others)}
        for name, ref in zip(self.parents, self.writer.parents, strict=True):
            texts[name] = Writer(self.opened.recipe, self.writer.base, [ref], self.writer.start).method(
                "task_arithmetic", {"weight": 1.0}
            )
        texts.setdefault("base", self.writer.method("task_arithmetic", {"weight": 0.0}))
        chosen = texts[recommended]
        text = "".join(f"# {line}\n" for line in account) + chosen
        before = next(rival for rival in others if rival.name == UNIFORM)
        report = self._probed(before, tuned) if self.options.probe else None
        return Tuned(
            text, recommended, verdict, texts, [_told(found) for found in candidates], self._rows(best), evaluation,
            {rival.name: rival.chosen for rival in (tuned, *others)}, self.splits.said, uniform, curve, report,
        )  # fmt: skip

    def _rows(self, best: Found) -> list[dict[str, Any]]:
        return [
            {"group": group or "all", **dict(zip(self.parents, map(float, own), strict=True))}
            for group, own in zip(best.groups, best.coefficients, strict=True)
        ]

    def _probed(self, uniform: Rival, tuned: Rival) -> ProbeReport:
        """The merge before and after, block by block, on held-out text."""
        merges: dict[str, Checkpoint] = {each.name: self.trier.open(each.text).merged for each in (uniform, tuned)}
        weights = task_grams(self.root, list(self.parents.values()), list(merges.values()))
        subject = Subject(self.root, self.parents, merges, weights)
        riders = [Rider(name, checkpoint, ghost=name == uniform.name) for name, checkpoint in merges.items()]
        sets = windows(self.splits.held_out, self.tokenizer, _PROBED)
        with self.meter("probing", sum(len(tokens.ids) for tokens in sets)) as told:
            observed = observe(subject, riders, sets, self.running, told)
        notes = {uniform.name: {"main": True}}
        settings = {"sequences": _PROBED, "length": sets[0].ids.shape[1], "compute": "float32"}
        return rebuild(Statistics.of(subject, riders, observed, notes, settings=settings))


def _told(found: Found) -> dict[str, Any]:
    return {
        "how": found.how, "level": found.level, "coefficients": int(found.coefficients.size),
        "validation": found.validation, "path": found.path,
    }  # fmt: skip
