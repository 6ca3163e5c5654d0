"""Tuning a recipe's coefficients, and proving it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
from ctl_merge.processes import Ranks, launched
from ctl_merge.recipe import Recipe
from ctl_merge.reference import ModelRef
from ctl_merge.roles import roles
from ctl_merge.tuning.adjustable import Adjustable, Texts
from ctl_merge.tuning.candidates import Candidates
from ctl_merge.tuning.descent import Found
from ctl_merge.tuning.levels import LEVELS, groups
from ctl_merge.tuning.options import TuneOptions
from ctl_merge.tuning.rivals import TIES, UNIFORM, Rival, Trier, best_of, best_uniform, joined, rivals
from ctl_merge.tuning.search import search
from ctl_merge.tuning.splits import Splits, split, windows
from ctl_merge.tuning.study import check_search
from ctl_merge.tuning.tuned import TUNED, Tuned, decide
from ctl_merge.tuning.written import Writer
from ctl_merge.weights import task_grams

_PROBED = 16  # held-out sequences of each data set that the probe looks at


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
    search, if `trials` are given, which the processes of a launcher share: all return the same. The validation data
    choose among them, the held-out data judge.
    """
    options = options or TuneOptions(**how)
    ranks = launched()
    if not options.trials:
        ranks.require_alone("tuning without --trials")
    work = ranks.together(lambda: _opened(recipe, data, held_out, base, Path(folder), options, ranks))
    return replace(work, meter=meter, also=also or {}).run()


def _opened(
    recipe: Recipe | str | Path, data: str | Sequence[str], held_out: str | Sequence[str], base: str | None,
    folder: Path, options: TuneOptions, ranks: Ranks,
) -> _Tuning:  # fmt: skip
    """Everything that is refused before any work; weights are fetched, and texts split."""
    _check(options, ranks)
    opened = Merge(recipe)
    opened.fetch()
    root, parents = roles(opened, ModelRef.parse(base) if base else None)
    assert isinstance(root, ParentView)
    refs = [checkpoint.ref for checkpoint in parents.values() if isinstance(checkpoint, ParentView)]
    length = window_length(root, options)
    tokenizer = merge_tokenizer(opened, options.trust_remote_code)
    texts = passages_of(parse_specs(data, options), tokenizer, options, length)
    others = passages_of(parse_specs(held_out, options), tokenizer, options, length) if held_out else {}
    placement = place(root, options.device_map or "cpu", options.max_memory, options.blocks,
                      trust_remote_code=options.trust_remote_code)  # fmt: skip
    return _Tuning(
        opened, root, parents, Writer(opened.recipe, root.ref, refs, folder), tokenizer,
        split(texts, others, options.seed), options,
        Running(placement, options.batch, options.blocks, options.trust_remote_code), ranks,
    )  # fmt: skip


def _check(options: TuneOptions, ranks: Ranks) -> None:
    if options.level not in LEVELS:
        raise DataError(f"--level {options.level}: it is one of {', '.join(LEVELS)}")
    if options.least >= options.most:
        raise DataError(f"the cap {options.most:g} is not above the least coefficient {options.least:g}")
    if options.trials:
        check_search(options.study, ranks)


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
    ranks: Ranks
    meter: Meter = no_meter
    also: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def run(self) -> Tuned:
        """All processes search together; the first does the rest, and all have what it found."""
        seen = joined(self.splits.tuning, self.splits.validation)
        self.trier = Trier(self.running, self.writer.start)
        searched = self._searched(seen) if self.options.trials else None
        return self.ranks.gather(self.ranks.at_first(lambda: self._decided(seen, searched)))[0]  # type: ignore[return-value]

    def _decided(self, seen: Texts, searched: Rival | None) -> Tuned:
        options, splits = self.options, self.splits
        self.model = Adjustable(self.root, self.parents, self.running.placement, options.batch, options.blocks,
                                options.trust_remote_code)  # fmt: skip
        uniform, curve = best_uniform(self.model, seen)
        candidates = Candidates(self.root, self.parents, self.model, self.writer, self.trier, self.tokenizer, splits,
                                options, self.meter).all(uniform)  # fmt: skip
        best = min(candidates, key=lambda found: found.validation)
        tuned = Rival(TUNED, self._text(best), f"{best.how}, a coefficient for each {best.level}")
        if searched and self.trier.loss(searched.text, splits.validation) < best.validation:
            tuned = Rival(TUNED, searched.text, f"search, {searched.chosen}")
        with self.meter("comparing", len(TIES) + sum(map(len, self.also.values()))) as told:
            others = list(rivals(self.writer, uniform, self._own(), self.trier, seen, told))
            others += [best_of(name, choices, self.trier, seen, told) for name, choices in self.also.items()]
        if searched and searched.text != tuned.text:  # nothing is better than itself
            others.append(searched)
        evaluation = self._compare([tuned, *others])
        return self._concluded(tuned, best, candidates, others, searched, evaluation, uniform, curve)

    def _searched(self, seen: Texts) -> Rival:
        options = self.options
        with self.meter("searching", options.trials) as told:
            return search(self.writer, self.trier, seen, options.trials, options.study, options.seed, told, self.ranks)

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
        self, tuned: Rival, best: Found, candidates: Sequence[Found], others: Sequence[Rival], searched: Rival | None,
        evaluation: Evaluation, uniform: float, curve: Mapping[float, float],
    ) -> Tuned:  # fmt: skip
        recommended, verdict = decide(evaluation)
        account = [
            f"Found by ctl-merge tune: {verdict}.",
            f"Data: {self.splits.said}.",
            *(f"Tried: {found.how}, by {found.level}: validation loss {found.validation:.4f}." for found in candidates),
            *(f"Searched: {searched.chosen}." for searched in [searched] if searched),
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
