"""Evaluating models and recipes on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ctl_merge.deferred import torch
from ctl_merge.errors import DataError
from ctl_merge.evaluating.answers import check_answers, measure_answers
from ctl_merge.evaluating.evaluation import Evaluation
from ctl_merge.evaluating.likelihood import Predictions, predict
from ctl_merge.evaluating.measured import rows_of
from ctl_merge.evaluating.metrics import Agreement, CalibrationError, Divergence, Measured, Perplexity, TokenLoss
from ctl_merge.evaluating.options import EvaluationOptions
from ctl_merge.evaluating.passages import Passage, passages_of
from ctl_merge.evaluating.subjects import Evaluated, Group, open_groups
from ctl_merge.merging import Merge, Meter, no_meter
from ctl_merge.model import load_weights
from ctl_merge.probing.placement import place
from ctl_merge.probing.rows import DataSpec
from ctl_merge.probing.windows import parse_specs, window_length
from ctl_merge.processes import Ranks, launched
from ctl_merge.recipe import Recipe

_KINDS = ("data", "match", "choice", "code")
_SETTINGS = (
    "sequences", "batch", "rows", "mask_prompt", "chat", "special_tokens", "items", "join", "end", "stop", "extract",
    "max_new_tokens", "samples", "temperature", "seed", "timeout", "memory",
)  # fmt: skip
Given = str | Path | Recipe | Merge


def evaluate(
    models: Given | Sequence[Given], data: str | Sequence[str] = (), *, match: str | Sequence[str] = (),
    choice: str | Sequence[str] = (), code: str | Sequence[str] = (), base: str | None = None,
    options: EvaluationOptions | None = None, meter: Meter = no_meter, **how: Any,
) -> Evaluation:  # fmt: skip
    """Measure models (folders, names on the Hub, recipes, which are not written) on data, side by side.

    `data`: texts whose loss is taken, as `ctl_merge.probe` reads them; the shipped tasks if nothing is named at all.
    `match`: rows whose last column is the answer that greedy generation must give. `choice`: rows that end with a list
    of choices and the right one, which must be the likeliest. `code`: programs to be written and run. `base`: the model
    that the others come from, where a recipe names none. `how`: fields of EvaluationOptions.

    >>> import ctl_merge
    >>> found = ctl_merge.evaluate(["recipes/quickstart/ties.yaml", "recipes/quickstart/base"], sequences=2, length=16)
    >>> [(row["model"], row["data"]) for row in found.rows if row["metric"] == "loss"][:3]
    [('ties', 'cycle'), ('ties', 'shift'), ('base', 'cycle')]
    """
    options = options or EvaluationOptions(**how)
    given: Sequence[Given] = models if isinstance(models, list | tuple) else [models]  # type: ignore[list-item]
    ranks = launched()

    def opened() -> tuple[dict[str, list[DataSpec]], list[Group]]:
        specs = {
            kind: parse_specs(texts, options) for kind, texts in zip(_KINDS, (data, match, choice, code), strict=True)
        }
        _check(specs, options)
        return specs, open_groups(given, base, options.parents, options.trust_remote_code)

    specs, groups = ranks.together(opened)
    work = _Work(options, specs, ranks, meter)
    for group in groups:
        work.run(group)
    shown = {spec.name: spec for kind in _KINDS for spec in specs[kind]}
    return Evaluation(
        rows_of(work.table),
        {name: _said(shown.get(name)) for name in dict.fromkeys(d for own in work.table.values() for d in own)},
        {key: value for key, value in asdict(options).items() if key in _SETTINGS} | {"length": work.length},
        work.warnings,
        work.answers,
        {model.name: model.folder for group in groups for model in group.models if model.folder},
    )


def _said(spec: DataSpec | None) -> str:
    """A data set as a card may name it: a file without the folder that it lies in."""
    if spec is None:
        return "shipped"
    return Path(spec.source).name if spec.path.exists() else spec.source


def _check(specs: Mapping[str, Sequence[DataSpec]], options: EvaluationOptions) -> None:
    names = [spec.name for own in specs.values() for spec in own]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"several data sets are called {twice[0]}: name them, as in {twice[0]}2=FILE")
    reserved = [name for name in names if name in ("mean", "worst")]
    if reserved:
        raise DataError(f"a data set cannot be called {reserved[0]}: that is what a row over all of them is called")
    check_answers(bool(specs["code"]), options)


@dataclass
class _Work:
    """The evaluation of one group after the other."""

    options: EvaluationOptions
    specs: Mapping[str, Sequence[DataSpec]]
    ranks: Ranks
    meter: Meter
    table: dict[str, dict[str, dict[str, Measured]]] = field(default_factory=dict)
    answers: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    length: int = 0
    seen: dict[str, list[Passage]] = field(default_factory=dict)

    def run(self, group: Group) -> None:
        first = group.models[0]
        new = [model for model in group.models if model.name not in self.table or model is first]
        passages, running, device = self.ranks.together(lambda: self._opened(group))
        for name, own in passages.items():
            self._losses(name, own, running, {first.name: first.parents}, device)
        for model in new:
            asked = {kind: self.specs[kind] for kind in _KINDS[1:]}
            found, written = measure_answers(
                model, running[model.name], asked, self.options, self.length, device, self.ranks, self.meter
            )
            self.table.setdefault(model.name, {}).update(found)
            self.answers[model.name] = written

    def _opened(self, group: Group) -> tuple[dict[str, list[Passage]], dict[str, Any], str]:
        """Passages of each text, the models ready to run, and the device that they run on."""
        options, first = self.options, group.models[0]
        self.length = window_length(first.checkpoint, options)
        passages: dict[str, list[Passage]] = {}
        if self.specs["data"] or not any(self.specs.values()):
            passages = passages_of(self.specs["data"], first.tokenizer, options, self.length)
            self._compare_tokens(first, passages)
        placement = place(
            first.checkpoint, options.device_map or "auto", options.max_memory, options.blocks,
            trust_remote_code=options.trust_remote_code, models=len(group.models), holding=len(group.models),
        )  # fmt: skip
        running = {model.name: load_weights(model.checkpoint, placement, blocks=options.blocks,
                                            trust_remote_code=options.trust_remote_code)
                   for model in group.models}  # fmt: skip
        return passages, running, placement.device

    def _compare_tokens(self, model: Evaluated, passages: Mapping[str, list[Passage]]) -> None:
        """Losses per token compare only where the tokens are the same."""
        for name, own in passages.items():
            before = self.seen.setdefault(name, own)
            same = len(before) == len(own) and all(torch.equal(a.ids, b.ids) for a, b in zip(before, own, strict=True))
            if not same:
                self.warnings.append(
                    f"{model.name} cuts {name} into other tokens than the first model: losses per token do not compare"
                )

    def _losses(
        self, name: str, passages: list[Passage], running: Mapping[str, Any], agreement: Mapping[str, Sequence[str]],
        device: str,
    ) -> None:  # fmt: skip
        with self.meter("evaluating", len(passages)) as told:
            found = predict(
                running, passages, self.options.batch, agreement=agreement, calibration=self.options.calibration,
                device=device, told=told, ranks=self.ranks,
            )  # fmt: skip
        for model, predictions in found.items():
            self.table.setdefault(model, {})[name] = loss_metrics(predictions)


def loss_metrics(found: Predictions) -> dict[str, Measured]:
    """The metrics that follow from predictions of passages."""
    tokens = found.tokens
    metrics = {metric.key: metric.items(found.nll, tokens) for metric in (TokenLoss, Perplexity)}
    if found.bins:
        metrics[CalibrationError.key] = CalibrationError.of_bins(found.bins)
    for other in found.agree:
        metrics[f"{Agreement.key}:{other}"] = Agreement.items(found.agree[other], tokens)
        metrics[f"{Divergence.key}:{other}"] = Divergence.items(found.kl[other], tokens)
    return metrics
