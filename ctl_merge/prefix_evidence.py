"""Grams of inputs that come out of the merge itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from ctl_merge.checkpoint import Checkpoint, FileCheckpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import MismatchError
from ctl_merge.evidence import Taken, Texts, batches, linear_layers, token_sets, watching
from ctl_merge.model import ModuleWeights, load_weights
from ctl_merge.probing.data import TokenSet
from ctl_merge.probing.forward import forward
from ctl_merge.reference import ModelRef
from ctl_merge.stacks import find_blocks, text_sites


class _Enough(Exception):
    """Ends a forward whose rest nobody asks for."""


class PrefixEvidence:
    """The Grams of RegMean++ (arXiv 2508.03121): what a layer reads once all before it is merged.

    The inputs of block l in each model, on its own text, are taken with the merge's weights in the embeddings and in
    the blocks before l, and the model's own in l; those of layers after the blocks with all blocks merged. So blocks
    are measured and merged in turn, and the models stay in memory. Thread-safe. `merged` is the merge that asks.
    """

    def __init__(
        self, texts: Texts, checkpoints: Mapping[ModelRef, FileCheckpoint], merged: Callable[[], Checkpoint]
    ) -> None:  # fmt: skip
        self.texts, self.checkpoints, self.merged = texts, checkpoints, merged
        self._runs: dict[ModelRef, _Run] = {}
        self._stage = -1  # the last block that was measured
        self._lock = threading.RLock()  # measuring a block reads the merge of the one before it

    def of(self, ref: ModelRef, tensor: str, start: int = 0, count: int | None = None) -> Tensor | None:
        """The Gram (in, in) of a linear layer's weight, float64 on the CPU; None for other tensors."""
        with self._lock:
            run = self._run(ref)
            stage = run.stages.get(tensor)
            while stage is not None and self._stage < stage:
                self._advance()
            return run.taken.of(tensor, start, count)

    def transposed(self, ref: ModelRef, tensor: str) -> bool:
        """Whether a linear layer stores its weight as (in, out)."""
        with self._lock:
            return tensor in self._run(ref).taken.transposed

    def _run(self, ref: ModelRef) -> _Run:
        if not self._runs:
            self._runs = {r: _Run(self.checkpoints[r], token_sets(r, self.texts, self.checkpoints[r]))
                          for r in self.texts.specs}  # fmt: skip
        return self._runs[ref]

    def _advance(self) -> None:
        """Put the merge of what was measured last into all models, and measure the next block."""
        runs = list(self._runs.values())
        names = runs[0].parameters(self._stage)
        weights = ModuleWeights(runs[0].model, self.merged())
        for name in names:
            value = weights[name]
            for run in runs:
                run.put(name, value)
        self._stage += 1
        for run in runs:
            run.measure(self._stage)


class _Run:
    """One model with its text. Stage -1 is what lies outside of the blocks, stage l block l, the last the head."""

    def __init__(self, checkpoint: FileCheckpoint, sets: list[TokenSet]) -> None:
        self.checkpoint, self.sets, self.model = checkpoint, sets, load_weights(checkpoint)
        self.sites = text_sites(self.model, find_blocks(self.model))
        self.taken = Taken()
        self.layers = linear_layers(self.model, checkpoint)
        self.stages = {stored: self._stage_of(path) for path, (stored, _) in self.layers.items()}

    def _stage_of(self, path: str) -> int:
        inside = (i for i, site in enumerate(self.sites) if path.startswith(f"{site}."))
        return next(inside, len(self.sites))

    def parameters(self, stage: int) -> list[str]:
        """The parameters that are merged before the stage after this one: of the block, or of all outside (-1)."""
        names = [name for name, _ in self.model.named_parameters()]
        if stage < 0:
            linear = {f"{path}.weight" for path in self.layers}
            return [n for n in names if self._stage_of(n) == len(self.sites) and n not in linear]
        return [name for name in names if name.startswith(f"{self.sites[stage]}.")]

    def put(self, name: str, value: Tensor) -> None:
        own = self.model.get_parameter(name)
        if own.shape != value.shape:
            raise MismatchError(
                f"{self.checkpoint.name}: {name} has shape {list(own.shape)}, the merge's {list(value.shape)}: "
                "`inputs: merged` runs each model with the merge's weights, which must have its shapes"
            )
        own.data.copy_(value)

    def measure(self, stage: int) -> None:
        """Run the text up to the end of the stage."""
        chosen = {path: layer for path, layer in self.layers.items() if self.stages[layer[0]] == stage}
        block: torch.nn.Module | None = self.model.get_submodule(self.sites[stage]) if stage < len(self.sites) else None
        ending = block.register_forward_hook(_stop) if block is not None else None
        counted = 0
        try:
            with torch.inference_mode(), watching(self.model, chosen, self.taken) as finished:
                for ids in batches(self.sets):
                    _until_enough(forward(self.model, ids)[0])
                    counted += ids.numel()
                    finished()
        finally:
            if ending:
                ending.remove()
        self.taken.count = counted


def _stop(*_: Any) -> None:
    raise _Enough


def _until_enough(run: Callable[[], Any]) -> None:
    try:
        run()
    except _Enough:
        pass
