"""Running a merge, its parents and its base through the same texts, block by block, and keeping what is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.errors import ProbeError
from ctl_merge.model import find_blocks, load_weights
from ctl_merge.probe.data import STRATA, TokenSet
from ctl_merge.probe.grams import Grams, SiteGrams
from ctl_merge.probe.lockstep import Lockstep, Visit
from ctl_merge.probe.losses import Losses
from ctl_merge.probe.metrics import interpolation, unit
from ctl_merge.weights import TaskGrams

INPUT = "input"  # the site before the first block of a stack


@dataclass(frozen=True)
class Rider:
    """A merge that is run beside the parents. `ghost`: run its blocks on the interpolated input as well."""

    name: str
    checkpoint: Checkpoint
    ghost: bool = True
    as_written: bool = False  # rounded to the checkpoint's dtype before it is run


@dataclass(frozen=True)
class Subject:
    """What is probed: a base, its finetunes, merges of them, and their inner products in weight space."""

    base: Checkpoint
    parents: Mapping[str, Checkpoint]
    riders: Sequence[Rider]
    weights: TaskGrams

    def coefficients(self, rider: int, tensors: Sequence[str] | None = None) -> np.ndarray:
        """The merge's effective coefficients in weight space over some tensors (all: None).

        Those of the whole model where the parents do not differ in these tensors.
        """
        gram = self.weights.total(tensors)
        k = len(self.parents)
        if not np.diag(gram)[:k].all():
            gram = self.weights.total()
        return self.weights.coefficients(gram, rider)[0]


@dataclass
class Observations:
    """What one run over one data set leaves."""

    grams: Grams
    losses: Losses | None
    coefficients: dict[str, list[np.ndarray]] = field(default_factory=dict)  # site -> one per rider


def observe(
    subject: Subject, sets: Sequence[TokenSet], *, device: str = "cpu", streamed: bool = False, batch: int = 8,
    blocks: str | None = None, told: Callable[[int], object] = lambda count: None,
) -> dict[str, Observations]:  # fmt: skip
    """Run all models over all sets in step; `told` hears of each finished sequence.

    Weights are float32. `streamed`: weights are read block by block, so memory does not grow with depth.
    """
    checkpoints = {"base": subject.base, **subject.parents, **{rider.name: rider.checkpoint for rider in subject.riders}}
    written = {rider.name for rider in subject.riders if rider.as_written}
    models: dict[str, Any] = {}
    sites: dict[str, dict[str, Any]] = {}
    for name, checkpoint in checkpoints.items():
        model = load_weights(checkpoint, device, streamed, name in written)
        model.config.use_cache = False
        models[name] = model
        sites[name] = {site: block for stack in find_blocks(model, blocks).values() for site, block in stack.items()}
    observer = _Observer(subject, list(sites["base"]))
    lockstep = Lockstep(sites, observer.on_inputs, observer.on_outputs)
    found = {}
    for tokens in sets:
        observer.begin()
        losses = Losses([*checkpoints], [rider.name for rider in subject.riders])
        for ids, strata in _batches(tokens, batch):
            observer.strata = strata
            calls = {name: _forward(model, ids.to(device)) for name, model in models.items()}
            logits = lockstep.run({name: call for name, (call, _) in calls.items()})
            labels = next(iter(calls.values()))[1]
            if labels is not None:
                global_ = [subject.coefficients(i) for i in range(len(subject.riders))]
                losses.add(logits, labels, global_, 1 + len(subject.parents))
            observer.grams.tokens += list(strata.sum(2).double())
            told(len(ids))
        found[tokens.name] = Observations(observer.grams, losses if losses.count else None, observer.coefficients)
    return found


def _batches(tokens: TokenSet, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(tokens.ids), size):
        yield tokens.ids[start : start + size], tokens.strata[start : start + size]


def _forward(model: Any, ids: Tensor) -> tuple[Callable[[], Tensor], Tensor | None]:
    """How to run a model on ids (B, T), and the tokens that its logits predict (None: it predicts no next token)."""
    config = model.config
    if model.main_input_name != "input_ids":
        raise ProbeError(f"{type(model).__name__} does not read text (it reads {model.main_input_name})")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and ids.shape[1] > limit:
        raise ProbeError(f"windows of {ids.shape[1]} tokens are longer than the model's context of {limit}: use --length")
    if config.is_encoder_decoder:
        half = ids.shape[1] // 2
        source, target = ids[:, :half], ids[:, half:]
        return (lambda: model(input_ids=source, decoder_input_ids=target).logits), target
    predicts = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    return (lambda: _logits(model(input_ids=ids))), ids if predicts else None


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


class _Observer:
    """Takes the statistics at every meeting of the models."""

    def __init__(self, subject: Subject, sites: list[str]) -> None:
        self.subject, self.sites = subject, sites
        self.strata: Tensor = torch.empty(0)
        by_site = {site: [name for name in subject.weights.grams if f".{site}." in f".{name}."] for site in sites}
        riders = range(len(subject.riders))
        self._own = {site: [subject.coefficients(i, by_site[site] or None) for i in riders] for site in sites}
        self._before = self._predecessors()
        self.begin()

    def begin(self) -> None:
        """Forget the last data set."""
        self.grams = Grams(list(STRATA))
        self.coefficients: dict[str, list[np.ndarray]] = {}

    def _predecessors(self) -> dict[str, list[np.ndarray]]:
        """The coefficients of what a block reads: of the block before it, of the embeddings for the first."""
        outside = [n for n in self.subject.weights.grams if not any(f".{s}." in f".{n}." for s in self.sites)]
        first = [self.subject.coefficients(i, outside or None) for i in range(len(self.subject.riders))]
        found, last = {}, {}
        for site in self.sites:
            stack = site.rpartition(".")[0]
            found[site] = last.get(stack, first)
            last[stack] = self._own[site]
        return found

    def on_inputs(self, site: str, hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Statistics of a stack's input; the interpolated input for the merges that want a ghost."""
        if site.endswith(".0"):
            self._take(f"{site.removesuffix('.0')}.{INPUT}", hidden, {}, self._before[site])
        parents = ["base", *self.subject.parents]
        found = {}
        for rider, coefficients in zip(self.subject.riders, self._before[site], strict=True):
            if rider.ghost:
                shares = interpolation(coefficients, len(parents))
                found[rider.name] = sum(s * hidden[n].double() for s, n in zip(shares, parents, strict=True)).to(
                    hidden["base"].dtype
                )
        return found

    def on_outputs(self, site: str, visits: Mapping[str, Visit]) -> None:
        for part in visits["base"].outputs:
            if all(part in visit.outputs for visit in visits.values()):
                outputs = {name: visit.outputs[part] for name, visit in visits.items()}
                ghosts = {name: visit.ghost[part] for name, visit in visits.items() if part in visit.ghost}
                self._take(site if part == "block" else f"{site}.{part}", outputs, ghosts, self._own[site])

    def _take(
        self, site: str, outputs: Mapping[str, Tensor], ghosts: Mapping[str, Tensor], coefficients: list[np.ndarray]
    ) -> None:
        names = [*outputs, *(f"{name}/ghost" for name in ghosts)]
        features = [tensor for tensor in (*outputs.values(), *ghosts.values())]
        if features[0].ndim != 3 or any(f.shape != features[0].shape for f in features):
            return  # no sequence of vectors: not a residual stream
        grams = self.grams.sites.setdefault(site, SiteGrams(names))
        self.coefficients[site] = coefficients
        size, first = len(names), 1 + len(self.subject.parents)
        pairs = [
            (torch.from_numpy(unit(first + i, size)), torch.from_numpy(interpolation(c, size)))
            for i, c in enumerate(coefficients)
        ]
        strata = self.strata[..., -features[0].shape[1] :]
        if strata.shape[-1] != features[0].shape[1]:
            return
        grams.add(torch.stack(features), strata, pairs)
