"""What texts say of a model's weights: Grams, Fisher information.

Taken by running each model on its own text when a method first asks for it, and kept in files that are mapped into
memory: a Gram of every linear layer is larger than the model.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctl_merge.architecture import origins
from ctl_merge.checkpoint import Checkpoint, FileCheckpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.devices import physical_memory
from ctl_merge.dispatch import Placement
from ctl_merge.errors import CheckpointError
from ctl_merge.methods.registry import Statistic
from ctl_merge.model import load_weights
from ctl_merge.probing.data import TokenSet, load_tokenizer, load_tokens
from ctl_merge.probing.forward import forward
from ctl_merge.probing.rows import DataSpec
from ctl_merge.reference import ModelRef

BATCH = 8  # sequences run at once


@dataclass(frozen=True)
class Texts:
    """`sequences` windows of `length` tokens of each model's own text.

    `base`: the model that reads all texts; None: each its own.
    """

    specs: Mapping[ModelRef, Sequence[DataSpec]]
    sequences: int
    length: int
    base: ModelRef | None = None


class TextEvidence:
    """A statistic of models on texts, by model and tensor. Thread-safe."""

    def __init__(
        self, kind: Statistic, texts: Texts, checkpoints: Mapping[ModelRef, FileCheckpoint]
    ) -> None:  # fmt: skip
        self.kind, self.texts, self.checkpoints = kind, texts, checkpoints
        self._taken: dict[ModelRef, Taken] = {}
        self._lock = threading.Lock()

    def of(self, ref: ModelRef, tensor: str, start: int = 0, count: int | None = None) -> Tensor | None:
        """The statistic of one of a model's tensors, float64 on the CPU; None where it has none.

        gram: (in, in) for the weight of a linear layer. fisher: the entries [start, start + count), (count,).
        """
        return self._of_model(ref).of(tensor, start, count)

    def transposed(self, ref: ModelRef, tensor: str) -> bool:
        """Whether a linear layer stores its weight as (in, out)."""
        return tensor in self._of_model(ref).transposed

    def _of_model(self, ref: ModelRef) -> Taken:
        with self._lock:
            if ref not in self._taken:
                self._taken[ref] = self._take(ref)
            return self._taken[ref]

    def _take(self, ref: ModelRef) -> Taken:
        checkpoint = self.checkpoints[self.texts.base or ref]
        sets = token_sets(ref, self.texts, checkpoint)
        if self.kind == "fisher":  # a gradient needs the whole model
            return _fishers(load_weights(checkpoint), sets, checkpoint)
        return _grams(load_weights(checkpoint, _placed(checkpoint)), sets, checkpoint)


def _placed(checkpoint: Checkpoint) -> Placement:
    """In memory, or read block by block where it would take more than half of that."""
    whole = 4 * sum(spec.numel for spec in checkpoint.tensors.values())
    return Placement() if whole <= physical_memory() // 2 else Placement("cpu", {"": "disk"})


def token_sets(ref: ModelRef, texts: Texts, checkpoint: FileCheckpoint) -> list[TokenSet]:
    """A model's own texts, cut by the tokenizer of the model that reads them."""
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.name)
    return [load_tokens(spec, tokenizer, texts.sequences, texts.length) for spec in texts.specs[ref]]


class Taken:
    """The statistic of one model: sums in mapped files, divided when they are read."""

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

    def of(self, tensor: str, start: int, count: int | None) -> Tensor | None:
        found = self._sums.get(self.alias.get(tensor, tensor))
        if found is None:
            return None
        return (found if count is None else found.view(-1)[start : start + count]) / self.count


def _stored_names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """The file tensor of each parameter that is stored as it is."""
    state, found = model.state_dict(), {}
    for name, origin in origins(model, checkpoint.tensors).items():
        stored = origin.sources[0][0]
        alone = len(origin.sources) == 1 and name in state
        if alone and tuple(checkpoint.tensors[stored].shape) == tuple(state[name].shape):
            found[name] = stored
    return found


def linear_layers(model: Any, checkpoint: Checkpoint) -> dict[str, tuple[str, bool]]:
    """The linear layers by path: the file tensor of the weight, and whether it is stored as (in, out)."""
    stored, found = _stored_names(model, checkpoint), {}
    for path, module in model.named_modules():
        conv = type(module).__name__ == "Conv1D"  # GPT-2's linear layer
        name = stored.get(f"{path}.weight")
        if name is not None and (isinstance(module, torch.nn.Linear) or conv):
            found[path] = (name, conv)
    return found


@contextmanager
def watching(model: Any, layers: Mapping[str, tuple[str, bool]], taken: Taken) -> Iterator[Callable[[], None]]:
    """While entered, x xᵀ is added up for those layers; the caller says when a forward is over."""
    seen: list[tuple[Tensor, str]] = []  # the inputs of this forward, held so that none takes another's place

    def watch(tensor: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            shared = next((name for inputs, name in seen if inputs is args[0]), None)
            taken.alias[tensor] = shared or tensor
            if shared is None:
                seen.append((args[0], tensor))
                rows = args[0].reshape(-1, args[0].shape[-1]).double()
                taken.add(tensor, rows.mT @ rows)

        return hook

    taken.transposed |= {name for name, turned in layers.values() if turned}
    handles = [model.get_submodule(path).register_forward_pre_hook(watch(name)) for path, (name, _) in layers.items()]
    try:
        yield seen.clear
    finally:
        for handle in handles:
            handle.remove()


def _grams(model: Any, sets: Sequence[TokenSet], checkpoint: Checkpoint) -> Taken:
    """Σ x xᵀ over all tokens for each linear layer."""
    taken = Taken()
    with torch.inference_mode(), watching(model, linear_layers(model, checkpoint), taken) as finished:
        for ids in batches(sets):
            forward(model, ids)[0]()
            taken.count += ids.numel()
            finished()
    return taken


def _fishers(model: Any, sets: Sequence[TokenSet], checkpoint: Checkpoint) -> Taken:
    """Σ of the squared gradient of each sequence's log-likelihood, for each parameter."""
    taken, stored = Taken(), _stored_names(model, checkpoint)
    parameters = [(stored[name], p) for name, p in model.named_parameters() if name in stored]
    for _, parameter in parameters:
        parameter.requires_grad_(True)
    for ids in batches(sets, 1):
        run, labels = forward(model, ids)
        if labels is None:
            raise CheckpointError(f"{checkpoint.name} predicts no next token, so that no text has a likelihood")
        loss = torch.nn.functional.cross_entropy(run()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
        for (name, _), gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                taken.add(name, gradient.double().square())
        taken.count += 1
    return taken


def batches(sets: Sequence[TokenSet], size: int = BATCH) -> Iterator[Tensor]:
    """Token ids (B, T), of one set after the other."""
    for tokens in sets:
        yield from tokens.ids.split(size)
