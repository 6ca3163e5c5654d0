"""Slices and modules: merges of their own, side by side.

A slice is a merge of views: each source looks like a model whose layers are numbered as the output's, and that has no
others. So a stack of layers is planned as whole models are, slice by slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ctl_merge.architecture import precede_blocks
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.deferred import Tensor
from ctl_merge.errors import MismatchError
from ctl_merge.header import TensorSpec
from ctl_merge.layers import block_index
from ctl_merge.model_config import with_changes
from ctl_merge.recipe import Recipe, Slice, Source
from ctl_merge.reference import ModelRef
from ctl_merge.restacked_config import Path, Run, restacked

# What mergekit calls the parts of multi-part models, and how their tensors' names begin.
_MODULES = {
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "vision_model": ("vision_model",),
    "multi_modal_projector": ("multi_modal_projector", "visual.merger", "visual.deepstack_merger_list"),
}
_REST = ("text_decoder", "default")  # what no other module takes


class View(FileCheckpoint):
    """Some tensors of a checkpoint under other names."""

    def __init__(
        self, whole: FileCheckpoint, ref: ModelRef, names: Mapping[str, str], changes: Mapping[Path, object]
    ) -> None:
        self.whole, self.ref, self.name, self.names = whole, ref, str(ref), names
        self.folder, self.snapshot, self.file_sizes = whole.folder, whole.snapshot, whole.file_sizes
        self.config = with_changes(whole.config, changes)
        self.tensors: Mapping[str, TensorSpec] = {name: whole.tensors[stored] for name, stored in names.items()}

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        self.whole.read_into(self.names[tensor], out, start)

    def fetch(self) -> None:
        self.whole.fetch()

    def stored(self, tensor: str) -> tuple[ModelRef, str]:
        return self.whole.ref, self.names[tensor]


@dataclass(frozen=True)
class Part:
    """One merge of views. `places`: where its tensors lie in depth, 0 to 1 within the slice; None: in their stack."""

    recipe: Recipe
    views: Mapping[ModelRef, FileCheckpoint]
    places: Mapping[str, float] | None


@dataclass(frozen=True)
class Stacked:
    """A recipe cut into its parts. `changes`: what the output's config needs for its new depths."""

    parts: tuple[Part, ...]
    changes: Mapping[Path, object] = field(default_factory=dict)
    decisions: tuple[str, ...] = ()


def cut(recipe: Recipe, checkpoints: Mapping[ModelRef, FileCheckpoint]) -> Stacked:
    """The parts of a recipe that has slices or modules. Raises MismatchError where its models do not have them."""
    modules = list(dict.fromkeys(part.module for part in recipe.slices))
    first = checkpoints[recipe.refs[0]]
    _check_covered(first, modules)
    changes: dict[Path, object] = {}
    decisions: list[str] = []
    cutters = []
    for module in modules:
        cutter = _Cutter(recipe, checkpoints, module, modules)
        changes |= cutter.changes()
        decisions += cutter.decisions()
        cutters.append(cutter)
    return Stacked(tuple(part for c in cutters for part in c.parts(changes)), changes, tuple(decisions))


def _check_covered(first: FileCheckpoint, modules: Sequence[str | None]) -> None:
    left = [name for name in first.tensors if all(not _belongs(name, module, modules) for module in modules)]
    if left:
        raise MismatchError(
            f"no module of the recipe covers {len(left)} tensors of {first.name}, such as {left[0]}: add a module "
            "whose name begins theirs, or `text_decoder` for all that no other takes"
        )
    for module in modules:
        if not any(_belongs(name, module, modules) for name in first.tensors):
            tops = sorted({name.partition(".")[0] for name in first.tensors})
            raise MismatchError(
                f"module {module!r}: no tensor of {first.name} begins so; its tensors begin with {', '.join(tops)}"
            )


def _belongs(name: str, module: str | None, modules: Sequence[str | None]) -> bool:
    """Whether the tensor is of this module: of those that match, the one with the longest beginning has it."""
    if module is None:
        return True
    found = {other: _match(name, other) for other in modules if other is not None}
    best = max(found.values())
    return best == found[module] if best else module in _REST


def _match(name: str, module: str) -> int:
    beginnings = _MODULES.get(module, () if module in _REST else (module,))
    bare = name.removeprefix("model.")
    return max((len(b) for b in beginnings if f"{name}.".startswith(f"{b}.") or bare.startswith(f"{b}.")), default=0)


class _Cutter:
    """Cuts one module of a recipe."""

    def __init__(
        self, recipe: Recipe, checkpoints: Mapping[ModelRef, FileCheckpoint], module: str | None,
        modules: Sequence[str | None],
    ) -> None:  # fmt: skip
        self.recipe, self.checkpoints, self.modules, self.module = recipe, checkpoints, modules, module
        self.slices = [part for part in recipe.slices if part.module == module]
        self.layered = self.slices[0].layers is not None
        self.layers = {ref: _layers(checkpoints[ref], self._names(ref)) for ref in recipe.refs} if self.layered else {}

    def _names(self, ref: ModelRef) -> list[str]:
        return [n for n in self.checkpoints[ref].tensors if _belongs(n, self.module, self.modules)]

    @property
    def _whole(self) -> bool:
        """Whether the one slice takes all layers of all its models: what `models` would have said."""
        sources = [s for part in self.slices for s in (*part.models, *([part.base] if part.base else []))]
        return (
            self.layered and len(self.slices) == 1 and all(s.layers == (0, self.layers[s.ref].depth) for s in sources)
        )

    def changes(self) -> dict[Path, object]:
        """What the output's config needs for the new depth of this module."""
        if not self.layered:
            return {}
        sources = [part.models[0] for part in self.slices]
        for source in (s for part in self.slices for s in (*part.models, *([part.base] if part.base else []))):
            self._check_range(source)
        runs = [Run(self.checkpoints[s.ref].config, *s.layers) for s in sources if s.layers]
        first = self.recipe.refs[0]
        stack, depth = self.layers[first].stack, self.layers[first].depth
        return restacked(self.checkpoints[first].config, runs, stack, depth)

    def _check_range(self, source: Source) -> None:
        own = self.layers[source.ref]
        assert source.layers is not None
        if source.layers[1] > own.depth:
            raise MismatchError(
                f"{source.ref} has {own.depth} layers ({own.stack}), which layer_range {list(source.layers)} exceeds"
            )

    def decisions(self) -> list[str]:
        """The new stack in words."""
        if not self.layered or self._whole:
            return []
        own = self.layers[self.recipe.refs[0]]
        runs = ", ".join("+".join(f"{s.ref}[{s.layers[0]}:{s.layers[1]}]" for s in p.models if s.layers)
                         for p in self.slices)  # fmt: skip
        total = sum(part.layers or 0 for part in self.slices)
        instead = f" instead of {own.depth}" if total != own.depth else ""
        return [f"{own.stack} has {total} layers{instead}: {runs}"]

    def parts(self, changes: Mapping[Path, object]) -> Iterator[Part]:
        offset = 0
        for number, part in enumerate(self.slices):
            ends = (number == 0, number == len(self.slices) - 1)
            yield self._part(part, offset, ends, changes)
            offset += part.layers or 0

    def _part(self, part: Slice, offset: int, ends: tuple[bool, bool], changes: Mapping[Path, object]) -> Part:
        views: dict[ModelRef, FileCheckpoint] = {}

        def viewed(source: Source) -> Source:
            ref = replace(source.ref, layers=None if self._whole else source.layers)
            views[ref] = View(self.checkpoints[source.ref], ref, self._view(source, offset, ends), changes)
            return Source(ref, source.settings)

        base = viewed(part.base).ref if part.base else None
        models = tuple(map(viewed, part.models))
        flat = replace(self.recipe, models=models, base=base, settings=part.settings, slices=())
        if not self.layered or self._whole:
            return Part(flat, views, None)
        own, count = self.layers[part.models[0].ref], part.layers or 0
        places = {
            f"{own.stack}.{offset + i}.{rest}": i / (count - 1) if count > 1 else 1.0
            for i in range(count)
            for rest in own.rests
        }
        return Part(flat, views, places)

    def _view(self, source: Source, offset: int, ends: tuple[bool, bool]) -> dict[str, str]:
        """The tensors of a source in a slice: the output's names, and those in its own files."""
        names = self._names(source.ref)
        if source.layers is None or self._whole:
            return {name: name for name in names}
        own, (first, end) = self.layers[source.ref], source.layers
        found = {name: name for name in own.before if ends[0]} | {name: name for name in own.after if ends[1]}
        for name, (index, rest) in own.places.items():
            if first <= index < end:
                found[f"{own.stack}.{offset + index - first}.{rest}"] = name
        return found


@dataclass(frozen=True)
class _Layers:
    """The one stack of blocks of a model: each tensor's layer and the rest of its name."""

    stack: str
    depth: int
    places: Mapping[str, tuple[int, str]]
    rests: frozenset[str]
    before: frozenset[str]  # what is outside of the stack, as the model uses it
    after: frozenset[str]


def _layers(checkpoint: FileCheckpoint, names: Sequence[str]) -> _Layers:
    blocks = block_index(names, checkpoint.config)
    stacks = sorted({stack for stack, _, _ in blocks.values()})
    if len(stacks) != 1:
        what = f"several stacks of layers ({', '.join(stacks)})" if stacks else "no stack of layers that can be found"
        hint = ": write `modules` with slices for each, by the beginning of its tensors' names" if stacks else ""
        raise MismatchError(f"{checkpoint.name} has {what}, so that `layer_range` says too little{hint}")
    stack = stacks[0]
    places = {}
    for name in blocks:
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        places[name] = (int(number), rest)
    depth = next(iter(blocks.values()))[2]
    outside = [name for name in names if name not in places]
    before = precede_blocks(outside, checkpoint.config)
    rests = frozenset(rest for _, rest in places.values())
    return _Layers(stack, depth, places, rests, frozenset(before), frozenset(outside) - before)
