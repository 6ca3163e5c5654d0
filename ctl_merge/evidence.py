"""What texts say of a model's weights: Grams, Fisher information.

Taken by running each model on its own text when a method first asks for it, and kept in files that are mapped into
memory: a Gram of every linear layer is larger than the model.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctl_merge.checkpoint import Checkpoint, FileCheckpoint
from ctl_merge.errors import CheckpointError
from ctl_merge.methods.registry import Statistic
from ctl_merge.model import ModuleWeights, load_weights
from ctl_merge.probing.data import DataSpec, TokenSet, load_tokenizer, load_tokens
from ctl_merge.probing.run import forward
from ctl_merge.reference import ModelRef

_BATCH = 8  # sequences run at once


@dataclass(frozen=True)
class Texts:
    """`sequences` windows of `length` tokens of each model's own text. `run`: whose activations count."""

    specs: Mapping[ModelRef, Sequence[DataSpec]]
    sequences: int
    length: int
    base: ModelRef | None = None  # the model whose layers' inputs are taken on all texts; None: each model's own


class Evidence:
    """A statistic of models on texts, by model and tensor. Thread-safe."""

    def __init__(
        self, kind: Statistic, texts: Texts, checkpoints: Mapping[ModelRef, FileCheckpoint], device: str = "cpu",
        streamed: Callable[[Checkpoint], bool] = lambda checkpoint: False,
    ) -> None:  # fmt: skip
        self.kind, self.texts, self.checkpoints = kind, texts, checkpoints
        self.device, self.streamed = device, streamed
        self._taken: dict[ModelRef, _Taken] = {}
        self._lock = threading.Lock()

    def of(self, ref: ModelRef, tensor: str, shape: Sequence[int]) -> Tensor | None:
        """The statistic of one of a model's tensors, None where it has none.

        gram: (in, in), and the last dimension of the weight is what the layer reads; fisher: `shape`.
        """
        with self._lock:
            if ref not in self._taken:
                self._taken[ref] = self._take(ref)
        return self._taken[ref].of(tensor, shape)

    def transposed(self, ref: ModelRef, tensor: str) -> bool:
        """Whether a linear layer stores its weight as (in, out)."""
        return tensor in self._taken[ref].transposed

    def _take(self, ref: ModelRef) -> _Taken:
        run = self.texts.base if self.kind == "gram" and self.texts.base else ref
        checkpoint = self.checkpoints[run]
        tokenizer = load_tokenizer(checkpoint.folder, checkpoint.name)
        sets = [load_tokens(s, tokenizer, self.texts.sequences, self.texts.length) for s in self.texts.specs[ref]]
        streamed = self.kind == "gram" and self.streamed(checkpoint)  # a gradient needs the whole model
        model = load_weights(checkpoint, self.device, streamed)
        take = _grams if self.kind == "gram" else _fishers
        return take(model, sets, _stored_names(model, checkpoint), self.device)


class _Taken:
    """The statistics of one model: sums in a mapped file, divided when they are read."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ctl-merge-evidence-")
        self._sums: dict[str, Tensor] = {}
        self.count = 0  # tokens, or sequences
        self.transposed: set[str] = set()
        self.alias: dict[str, str] = {}  # layers that read the same inputs share one Gram

    def add(self, name: str, value: Tensor) -> None:
        if name not in self._sums:
            path = Path(self._folder.name) / str(len(self._sums))
            mapped = torch.from_file(str(path), shared=True, size=value.numel(), dtype=torch.float64)
            self._sums[name] = mapped.view(value.shape).zero_()
        self._sums[name].add_(value.to("cpu"))

    def of(self, tensor: str, shape: Sequence[int]) -> Tensor | None:
        found = self._sums.get(self.alias.get(tensor, tensor))
        if found is None:
            return None
        return found / max(1, self.count)


def _stored_names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """The file tensor of each parameter that is stored as one."""
    weights = ModuleWeights(model, checkpoint)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: weights.stored_as(name) for name in shapes}
    return {n: t for n, t in found.items() if t is not None and tuple(checkpoint.tensors[t].shape) == shapes[n]}


def _grams(model: Any, sets: Sequence[TokenSet], stored: Mapping[str, str], device: str) -> _Taken:
    """Σ x xᵀ over all tokens for each linear layer."""
    taken = _Taken()
    seen: list[tuple[Tensor, str]] = []  # the inputs of this forward, held so that none takes another's place

    def watch(tensor: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            shared = next((name for inputs, name in seen if inputs is args[0]), None)
            taken.alias[tensor] = shared or tensor
            if shared is None:
                seen.append((args[0], tensor))
                rows = args[0].detach().reshape(-1, args[0].shape[-1]).double()
                taken.add(tensor, rows.mT @ rows)

        return hook

    handles = []
    for path, module in model.named_modules():
        kind = type(module).__name__
        name = stored.get(f"{path}.weight")
        if name is not None and (isinstance(module, nn.Linear) or kind == "Conv1D"):
            taken.transposed |= {name} if kind == "Conv1D" else set()
            handles.append(module.register_forward_pre_hook(watch(name)))
    try:
        with torch.inference_mode():
            for ids in _batches(sets, _BATCH, device):
                forward(model, ids)[0]()
                taken.count += ids.numel()
                seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return taken


def _fishers(model: Any, sets: Sequence[TokenSet], stored: Mapping[str, str], device: str) -> _Taken:
    """Σ of the squared gradient of each sequence's log-likelihood, for each parameter."""
    taken = _Taken()
    parameters = [(stored[name], p) for name, p in model.named_parameters() if name in stored]
    for _, parameter in parameters:
        parameter.requires_grad_(True)
    for ids in _batches(sets, 1, device):
        run, labels = forward(model, ids)
        if labels is None:
            raise CheckpointError(f"{type(model).__name__} predicts no next token, so that it has no likelihood")
        logits = run()[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
        for (name, _), gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                taken.add(name, gradient.double().square())
        taken.count += 1
    return taken


def _batches(sets: Sequence[TokenSet], size: int, device: str) -> Iterator[Tensor]:
    for tokens in sets:
        yield from (ids.to(device) for ids in tokens.ids.split(size))
