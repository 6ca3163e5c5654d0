"""Where an adapter can hold the change of each parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import CheckpointError
from ctl_merge.header import TensorSpec
from ctl_merge.parameter_names import ParameterNames, Place

# `linear`, `kernel` and `embedding` are layers that PEFT has a LoRA for; `parameter`: it wraps the parameter itself,
# as it does with stacked experts; `bias`: stored whole beside a layer; `none`: only the whole module can be stored.
Kind = Literal["linear", "kernel", "embedding", "parameter", "bias", "none"]
_TIED_BY_PEFT = {"embed_tokens", "lm_head"}  # the leaves of tied modules that PEFT ties again (ensure_weight_tying)

_BEFORE_STACKING = {"gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3"}
# Layers whose weights Mamba's kernels read past the layers' forward: PEFT refuses LoRA on them.
_MAMBA, _READ_DIRECTLY = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}, (".out_proj", ".conv1d")


@dataclass(frozen=True)
class Target:
    """A parameter of transformers' model, and the tensors in files that make it up.

    `shape`: as the model has it. `transposed`: its rows are the inputs. `tied`: modules whose parameter is the same
    one.
    """

    module: str
    parameter: str
    kind: Kind
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    transposed: bool = False
    tied: tuple[str, ...] = ()
    is_head: bool = False
    is_norm: bool = False

    @property
    def low_rank(self) -> bool:
        """Whether LoRA's two matrices can hold its change."""
        return self.kind not in ("bias", "none")

    @property
    def count(self) -> int:
        """How many matrices it is: stacked experts are one each."""
        return self.shape[0] if self.kind == "parameter" and len(self.shape) == 3 else 1

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of each: (outputs, inputs)."""
        rows, *rest = self.shape[1:] if self.kind == "parameter" and len(self.shape) == 3 else self.shape
        return (prod(rest), rows) if self.transposed else (rows, prod(rest))

    @property
    def category(self) -> str:
        """What it is to somebody who wants it stored whole: embeddings, head, norms, biases, or anything else."""
        if self.kind == "embedding":
            return "embeddings"
        if self.kind == "bias":
            return "biases"
        return "head" if self.is_head else "norms" if self.is_norm else "all"

    @property
    def tied_by_peft(self) -> bool:
        """Whether PEFT changes what is tied to it along with it."""
        return {path.rpartition(".")[2] for path in (self.module, *self.tied)} <= _TIED_BY_PEFT

    def read(self, checkpoint: Checkpoint, number: int = 0) -> Tensor:
        """One of its matrices (outputs, inputs), float64."""
        own = [place for place in self.places if place.expert in (None, number)]
        size = prod(self.matrix)
        parts = [
            _entries(checkpoint, place.name, number * size, size)
            if place.expert is None
            else _entries(checkpoint, place.name, 0, checkpoint.tensors[place.name].numel)
            for place in own
        ]
        rows = self.matrix[1] if self.transposed else self.matrix[0]
        stored = torch.cat(parts).view(rows, -1)
        return stored.T if self.transposed else stored

    def read_whole(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Tensor:
        """All of it, in the model's own shape."""
        if len(self.places) == 1:
            return _entries(checkpoint, self.places[0].name, 0, prod(self.shape), dtype).view(self.shape)
        out = torch.empty(self.shape, dtype=dtype)
        for place in self.places:
            count = checkpoint.tensors[place.name].shape[0]
            part = _entries(checkpoint, place.name, 0, checkpoint.tensors[place.name].numel, dtype)
            out[place.expert, place.row : place.row + count] = part.view(count, *self.shape[2:])
        return out


@dataclass(frozen=True)
class Targets:
    """Every parameter of a model that is made up of a checkpoint's tensors; `other`: tensors that make up none."""

    parameters: Sequence[Target]
    other: Sequence[str]
    modules: Mapping[str, int] = field(default_factory=dict)  # how many parameters of its own each module has

    def of(self, module: str) -> list[Target]:
        return [target for target in self.parameters if target.module == module]

    def can_be_saved(self, target: Target) -> bool:
        """Whether PEFT can store the target's module whole, and what is tied to it, without taking others along."""
        if not target.tied_by_peft and any(self.modules[path] > 1 for path in target.tied):
            return False  # of what is tied only in part, the rest would be lacking
        return all(path and not any(map(self._follows(path), self.modules)) for path in (target.module, *target.tied))

    def _follows(self, path: str) -> Callable[[str], bool]:
        """Whether another module lies below this one, or has a name that PEFT takes for this one's."""
        return lambda other: other.startswith(f"{path}.") or (other != path and other.endswith(path))


def find_targets(tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], name: str) -> Targets:
    """What the tensors of a checkpoint are in transformers' model of its config.

    Raises CheckpointError where transformers has none.
    """
    names = ParameterNames(tensors, config)
    model = names.modules.model
    if model is None:
        raise CheckpointError(
            f"{name}: transformers has no model for its config, so that the modules of an adapter cannot be named"
        )
    found = [t for path, module in model.named_modules() for t in _of_module(names, path, module)]
    if any(target.count > 1 for target in found):
        found = [replace(t, kind="parameter") if _means_experts(t) else t for t in found]
    stored = {target.parameter: target for target in found if all(p.name in tensors for p in target.places)}
    tied: dict[str, list[str]] = {}
    for target in found:
        if target.parameter not in stored and target.places:  # the same tensor as another parameter
            tied.setdefault(target.places[0].own, []).append(target.module)
    parameters = [
        replace(t, tied=tuple(tied.get(t.places[0].name, ()))) if len(t.places) == 1 else t for t in stored.values()
    ]
    used = {place.name for target in parameters for place in target.places}
    return Targets(parameters, [n for n in tensors if n not in used], Counter(target.module for target in found))


def _means_experts(target: Target) -> bool:
    """Whether PEFT would take the layer's name, in a model of stacked experts, for that of theirs before stacking."""
    return target.kind == "linear" and target.module.rpartition(".")[2] in _BEFORE_STACKING


def _of_module(names: ParameterNames, path: str, module: torch.nn.Module) -> Iterator[Target]:
    for leaf, parameter in module.named_parameters(recurse=False):
        full = f"{path}.{leaf}" if path else leaf
        shape = tuple(parameter.shape)
        kind, transposed = _kind(module, leaf, shape)
        if kind != "bias" and path.endswith(_READ_DIRECTLY) and names.config.get("model_type") in _MAMBA:
            kind = "none"
        if kind == "parameter" and sum(1 for _ in module.parameters()) > sum(1 for _ in module.parameters(False)):
            kind = "none"  # PEFT's wrapper of a module hides what is wrapped below it when it merges
        norm = "norm" in type(module).__name__.lower()
        head = names.modules.is_head(full)
        yield Target(path, full, kind, shape, tuple(names.places(full)), transposed, is_head=head, is_norm=norm)


def _kind(module: torch.nn.Module, leaf: str, shape: tuple[int, ...]) -> tuple[Kind, bool]:
    """What PEFT can do with a parameter, and whether its rows are the inputs."""
    if type(module).__name__ in ("MultiheadAttention", "NonDynamicallyQuantizableLinear"):
        return "none", False  # torch's attention reads the weights past its layers' forward
    convolution = isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d)
    known = isinstance(module, torch.nn.Linear | torch.nn.Embedding) or convolution or type(module).__name__ == "Conv1D"
    if leaf == "bias" and known:
        return "bias", False
    if isinstance(module, torch.nn.Linear) and leaf == "weight":
        return "linear", False
    if isinstance(module, torch.nn.Embedding) and leaf == "weight":
        return "embedding", True
    if type(module).__name__ == "Conv1D" and leaf == "weight":
        return "linear", True
    if convolution and leaf == "weight" and module.groups == 1:  # type: ignore[union-attr]
        return "kernel", False
    if known or len(shape) not in (2, 3) or "bias" in leaf:
        return "none", False
    return "parameter", len(shape) == 3 and bool(getattr(module, "is_transposed", False))


def _entries(checkpoint: Checkpoint, tensor: str, start: int, count: int, dtype: torch.dtype | None = None) -> Tensor:
    out = torch.empty(count, dtype=dtype or torch.float64)
    checkpoint.read_into(tensor, out, start)
    return out
