"""Models run in step over texts; statistics kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.dispatch import Placement, twin
from ctl_merge.errors import DeviceError, ProbeError
from ctl_merge.model import load_weights, return_freed_memory
from ctl_merge.probing.data import STRATA, TokenSet
from ctl_merge.probing.forward import forward
from ctl_merge.probing.lockstep import Lockstep, Visit
from ctl_merge.probing.observer import BASE, Observations, Observer, Rider, Subject
from ctl_merge.stacks import every_block, find_blocks, tensors_below


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
            for ids, strata in batches(tokens, running.batch):
                session.run(ids.to(running.placement.device), strata)
                told(len(ids))
            found[tokens.name] = replace(session.end(), skipped=tokens.skipped)
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
        self.observer = Observer(subject, riders, tensors_below(models[BASE], subject.base.tensors, sites[BASE]))
        self.streamed = any(parameter.is_meta for parameter in models[BASE].parameters())
        self.lockstep = Lockstep(sites, self._on_inputs, self._on_outputs)
        self.feature_bytes = self.logit_bytes = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.lockstep.release()
        for config in self.caching:
            config.use_cache = True

    def _check_layout(self, site: str, hidden: Tensor) -> None:
        """Refuse features that are not (B, T, H), as a token's could not be told from another's."""
        model, strata = self.models[BASE], self.observer.strata
        count, length = strata.shape[0], strata.shape[-1]
        lengths = (length // 2, length - length // 2) if model.config.is_encoder_decoder else (length,)
        if hidden.ndim != 3 or hidden.shape[0] != count or hidden.shape[1] not in lengths:
            expected = " or ".join(str((count, n, "H")).replace("'", "") for n in dict.fromkeys(lengths))
            raise ProbeError(
                f"{type(model).__name__} cannot be probed: the features at {site} are laid out {tuple(hidden.shape)}, "
                f"not {expected} (sequences, tokens, dimensions)"
            )

    def _on_inputs(self, site: str, hidden: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._check_layout(site, hidden[BASE])
        return self.observer.on_inputs(site, hidden)

    def _on_outputs(self, site: str, visits: Mapping[str, Visit]) -> dict[str, Tensor]:
        self._check_layout(site, visits[BASE].outputs["block"])
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
        calls = {name: forward(model, ids) for name, model in self.models.items()}
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


def batches(tokens: TokenSet, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = batch_size(tokens, size)
    for start in range(0, len(tokens.ids), size):
        yield tokens.ids[start : start + size], tokens.strata[start : start + size]


def batch_size(tokens: TokenSet, size: int) -> int:
    """How many windows are run at once, where `size` were asked for."""
    count, length = tokens.ids.shape
    return length - 1 if min(size, count) == length else size  # a square batch would hide features laid out (T, B, H)
