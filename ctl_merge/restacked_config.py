"""The config of a model whose layers are restacked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctl_merge.architecture import typed_config
from ctl_merge.errors import MismatchError
from ctl_merge.layers import DEPTH_KEYS
from ctl_merge.model_config import with_changes

# Lists with an entry for each layer. `layer_types` is how transformers says which layers have which attention.
_PER_LAYER = re.compile(r"layer|block|rope|attention|attn|mlp|window|type|pattern|head|intermediate", re.IGNORECASE)
# Lists of the layers that are of some kind.
_INDEXES = frozenset("mlp_only_layers moe_layers cross_attention_layers full_attn_idxs attn_layer_indices".split())
_PARTS = ("encoder", "decoder")

Path = tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """Consecutive layers [first, end) of one model."""

    config: Mapping[str, Any]
    first: int
    end: int


def restacked(config: Mapping[str, Any], runs: Sequence[Run], stack: str, depth: int) -> dict[Path, Any]:
    """What changes in `config` when its `stack` of `depth` blocks becomes the runs, one after the other.

    Keys are paths into the config. The depth, lists that have an entry for each layer and lists of layers follow;
    the kind of each layer is written out where transformers would derive it from the layer's number, which may be
    another one now. Raises MismatchError where the config does not say which of its depths is the stack's.
    """
    holder, key = _depth_key(config, stack, depth)
    total = sum(run.end - run.first for run in runs)
    changes: dict[Path, Any] = {(*holder, key): total}
    own = _at(config, holder)
    for name, value in own.items():
        if isinstance(value, list) and name in _INDEXES:
            changes[*holder, name] = list(_moved(runs, holder, name))
        elif _is_per_layer(name, value, depth):
            joined = [entry for run in runs for entry in _at(run.config, holder)[name][run.first : run.end]]
            changes[*holder, name] = "".join(joined) if isinstance(value, str) else joined
    kinds = [kind for run in runs for kind in _kinds(run, holder)]
    if "layer_types" not in own and len(kinds) == total and len(set(kinds)) > 1:
        changes |= _written_out(config, changes, holder, kinds)
    return {path: value for path, value in changes.items() if own.get(path[-1]) != value}


def _depth_key(config: Mapping[str, Any], stack: str, depth: int) -> tuple[Path, str]:
    """Where the config states the depth of a stack."""
    found = [(path, key) for path, key, value in _stated(config, ()) if value == depth]
    for part in _PARTS:  # `encoder_layers` is not the decoder's
        named = [(path, key) for path, key in found if part in key]
        if part in stack and named:
            found = named
    vision = re.search(r"vision|visual", stack) is not None
    found = [(path, key) for path, key in found if any("vision" in step for step in path) == vision] or found
    deepest = max((len(path) for path, _ in found), default=0)
    found = [(path, key) for path, key in found if len(path) == deepest]
    if len(found) > 1 and "num_hidden_layers" in {key for _, key in found}:
        found = [(path, key) for path, key in found if key == "num_hidden_layers"]
    if len(found) != 1:
        what = "states no depth" if not found else f"states {depth} as {', '.join(key for _, key in found)}"
        raise MismatchError(f"{stack}: the config {what}: slices of this model cannot be given a new depth")
    return found[0]


def _is_per_layer(name: str, value: Any, depth: int) -> bool:
    """Whether a value has an entry for each layer: a list, or a pattern of one letter each."""
    if isinstance(value, str):
        return len(value) == depth and name.endswith("pattern")
    return isinstance(value, list) and len(value) == depth and bool(_PER_LAYER.search(name))


def _stated(config: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _stated(value, (*path, key))
        elif key in DEPTH_KEYS and isinstance(value, int):
            yield path, key, value


def _moved(runs: Sequence[Run], holder: Path, name: str) -> Iterator[int]:
    """The new numbers of the layers that a list names."""
    offset = 0
    for run in runs:
        named = _at(run.config, holder).get(name) or ()
        yield from (offset + index - run.first for index in sorted(named) if run.first <= index < run.end)
        offset += run.end - run.first


def _kinds(run: Run, holder: Path) -> list[str]:
    """The kinds of a run's layers as transformers derives them; none where it knows of no kinds."""
    typed = typed_config(run.config)
    for step in holder:
        typed = getattr(typed, step, None)
    kinds = getattr(typed, "layer_types", None)
    return list(kinds[run.first : run.end]) if isinstance(kinds, list | tuple) else []


def _written_out(
    config: Mapping[str, Any], changes: Mapping[Path, Any], holder: Path, kinds: list[str]
) -> dict[Path, list[str]]:
    """The key that says of what kind each layer is; none where the class derives the same, and takes no such key."""
    derived: list[str] = []
    for written in ({(*holder, "layer_types"): kinds}, {}):
        derived = _kinds(Run(with_changes(config, {**changes, **written}), 0, len(kinds)), holder)
        if derived == kinds:
            return written
    wrong = next((i for i, (one, other) in enumerate(zip(derived, kinds, strict=False)) if one != other), len(derived))
    raise MismatchError(
        f"a {config.get('model_type')} makes the kind of each layer of its number, and layer {wrong} of this stack "
        f"would be another one than {kinds[wrong]}, which it is: choose layer_ranges that keep the pattern"
    )


def _at(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    for step in path:
        config = config[step]
    return config
