"""Models run in step over texts; statistics kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.dispatch import Placement, twin
from ctl_merge.errors import DeviceError, ProbeError
from ctl_merge.model import load_weights, return_freed_memory
from ctl_merge.probing.data import STRATA, TokenSet
from ctl_merge.probing.grams import Grams, SiteGrams
from ctl_merge.probing.lockstep import Lockstep, Visit
from ctl_merge.probing.losses import Losses
from ctl_merge.probing.metrics import interpolation, unit
from ctl_merge.stacks import every_block, find_blocks, tensors_below
from ctl_merge.weights import TaskGrams

INPUT = "input"  # the site before the first block of a stack
BASE = "base"


@dataclass(frozen=True)
class Rider:
    """A merge that is run beside the parents.

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
    """What one run over one data set leaves. `coefficients`, `explained`: by site, one per merge.

    feature_bytes, logit_bytes: the most that all models together held at a meeting, and at the end.
    """

    grams: Grams
    losses: Losses | None
    coefficients: dict[str, list[np.ndarray]] = field(default_factory=dict)
    explained: dict[str, list[float]] = field(default_factory=dict)
    feature_bytes: int = 0
    logit_bytes: int = 0


@dataclass(frozen=True)
class Running:
    """How models are run: all of them with the same placement."""

    placement: Placement = field(default_factory=Placement)
    batch: int = 8
    blocks: str | None = None  # path of the list of blocks, where it cannot be found
    trust_remote_code: bool = False


def observe(
    subject: Subject, riders: Sequence[Rider], sets: Sequence[TokenSet], running: Running,
    told: Callable[[int], object] = lambda count: None,
) -> dict[str, Observations]:  # fmt: skip
    """Run all models over all sets in step, in float32; `told` hears of each finished sequence."""
    models = {BASE: _load(subject.base, running)}
    models |= {name: _load(parent, running) for name, parent in subject.parents.items()}
    for rider in riders:
        models[rider.name] = _rider_model(rider, models, running)
    found = {}
    with Session(subject, riders, models, running.blocks) as session:
        for tokens in sets:
            if tokens.first is not None:
                session.calibrate(tokens.first.to(running.placement.device))
            for ids, strata in _batches(tokens, running.batch):
                session.run(ids.to(running.placement.device), strata)
                told(len(ids))
            found[tokens.name] = session.end()
    return found


class Session:
    """Models whose blocks meet while they run: `run` any number of batches, `end` gives what was observed.

    On leaving, the models are as they were.
    """

    def __init__(
        self, subject: Subject, riders: Sequence[Rider], models: Mapping[str, Any], blocks: str | None = None
    ) -> None:
        sites = {}
        self.caching = [config for model in models.values() for config in _forbid_cache(model)]
        for name, model in models.items():
            sites[name] = every_block(find_blocks(model, blocks))
        self.models, self.parents = models, 1 + len(subject.parents)
        self.observer = _Observer(subject, riders, tensors_below(models[BASE], subject.base.tensors, sites[BASE]))
        self.streamed = any(parameter.is_meta for parameter in models[BASE].parameters())
        self.lockstep = Lockstep(sites, self.observer.on_inputs, self._on_outputs)
        self.feature_bytes = self.logit_bytes = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.lockstep.release()
        for config in self.caching:
            config.use_cache = True

    def _on_outputs(self, site: str, visits: Mapping[str, Visit]) -> dict[str, Tensor]:
        found = self.observer.on_outputs(site, visits)
        brought = sum(t.nbytes for v in visits.values() for t in (*v.outputs.values(), *v.ghost.values()))
        self.feature_bytes = max(self.feature_bytes, brought)
        if self.streamed:
            return_freed_memory()
        return found

    def run(self, ids: Tensor, strata: Tensor) -> None:
        """One batch: ids (B, T), strata (B, S, T) bool."""
        observer = self.observer
        observer.strata = strata
        calls = {name: _forward(model, ids) for name, model in self.models.items()}
        try:
            logits = self.lockstep.run({name: call for name, (call, _) in calls.items()})
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
            raise DeviceError(
                f"{reason}: lower --batch or --length, or let less stay on the device with --max-memory"
            ) from None
        self.logit_bytes = max(self.logit_bytes, sum(tensor.nbytes for tensor in logits.values()))
        labels = calls[BASE][1]
        if labels is not None:
            observer.losses.add(logits, labels, observer.whole, self.parents)
        observer.grams.tokens += list(strata.sum(2).double())

    def calibrate(self, ids: Tensor) -> None:
        """Choose the massive dimensions by the first window of a set whose first part is another rank's."""
        self.run(ids, torch.ones(1, len(STRATA), ids.shape[1], dtype=torch.bool))
        massive = {site: grams.massive for site, grams in self.observer.grams.sites.items()}
        self.observer.begin()
        self.observer.massive = massive

    def end(self) -> Observations:
        """What was observed since the start or the last end."""
        found = self.observer.end()
        found.feature_bytes, found.logit_bytes = self.feature_bytes, self.logit_bytes
        self.observer.begin()
        return found


def shares_weights(rider: Rider) -> bool:
    """Whether the rider runs with another one's weights: a patched merge with those of the merge that it is."""
    return rider.patch is not None


def _rider_model(rider: Rider, models: Mapping[str, Any], running: Running) -> Any:
    original = models.get(rider.name.partition("/")[0])
    if shares_weights(rider) and original is not None:
        return twin(original)
    return _load(rider.checkpoint, running, rider.as_written)


def _load(checkpoint: Checkpoint, running: Running, as_written: bool = False) -> Any:
    return load_weights(checkpoint, running.placement, as_written, running.blocks, running.trust_remote_code)


def _forbid_cache(model: Any) -> list[Any]:
    """Let no part of a model keep keys and values: a block that is run twice would attend to its first run.

    Returns the configs of the parts that would have.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    found = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in found:
        config.use_cache = False
    return found


def _batches(tokens: TokenSet, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(tokens.ids), size):
        yield tokens.ids[start : start + size], tokens.strata[start : start + size]


def _forward(model: Any, ids: Tensor) -> tuple[Callable[[], Tensor], Tensor | None]:
    """How to run a model on ids (B, T), and the tokens that its logits predict (None: it predicts no next token).

    A window is the source and the target, half each, of an encoder-decoder.
    """
    config = model.config
    if model.main_input_name != "input_ids":
        raise ProbeError(f"{type(model).__name__} does not read text: it reads {model.main_input_name}")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and ids.shape[1] > limit:
        raise ProbeError(f"windows of {ids.shape[1]} tokens exceed the context of {limit}: use --length {limit}")
    if config.is_encoder_decoder:
        half = ids.shape[1] // 2
        source, target = ids[:, :half], ids[:, half:]
        return (lambda: model(input_ids=source, decoder_input_ids=target).logits), target
    predicts = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    return (lambda: _logits(model(input_ids=ids))), ids if predicts else None


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def _block_of(site: str) -> str:
    """The block that a site belongs to: `model.layers.3` of `model.layers.3.mlp`."""
    return site if site.rpartition(".")[2].isdigit() else site.rpartition(".")[0]


class _Observer:
    """Takes the statistics at every meeting of the models."""

    def __init__(self, subject: Subject, riders: Sequence[Rider], tensors: Mapping[str, list[str]]) -> None:
        self.subject, self.riders = subject, riders
        self.names = [BASE, *subject.parents]
        self.strata: Tensor = torch.empty(0)
        self.own, self.explained = self._coefficients(tensors)
        outside = sorted(subject.weights.grams.keys() - {name for names in tensors.values() for name in names})
        self.before = self._predecessors(list(tensors), self._of_riders(outside or None)[0])
        self.whole = self._of_riders(None)[0]
        self.begin()

    def begin(self) -> None:
        """Forget the last data set."""
        self.grams = Grams(list(STRATA))
        self.massive: dict[str, list[int]] = {}
        self.coefficients: dict[str, list[np.ndarray]] = {}
        self.losses = Losses([*self.names, *(rider.name for rider in self.riders)], [r.name for r in self.riders])

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
            return  # not a sequence of vectors: no residual stream
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
