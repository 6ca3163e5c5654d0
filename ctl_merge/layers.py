"""Transformer blocks by tensor names and config alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

# The keys under which configs state how many blocks a stack has.
DEPTH_KEYS = frozenset(
    "num_hidden_layers num_layers n_layer n_layers num_decoder_layers num_encoder_layers encoder_layers decoder_layers "
    "depth num_blocks".split()
)
# What lists of blocks are called; a config may leave out a depth that is its model type's default.
_STACK_NAMES = frozenset("layers layer blocks block h".split())
_LEAST_TENSORS = 4  # of a block; layers of a small head have weight and bias


def natural(name: str) -> tuple[object, ...]:
    """Sort key that counts numbers in names as numbers: layers.2 before layers.10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def depths(config: Mapping[str, Any]) -> set[int]:
    """The numbers of blocks that a config states, those of its sub-configs included."""
    found = {int(v) for k, v in config.items() if k in DEPTH_KEYS and isinstance(v, int) and v > 0}
    found |= {len(v) for k, v in config.items() if k == "depths" and isinstance(v, list)}
    for value in config.values():
        if isinstance(value, Mapping):
            found |= depths(value)
    return found


def block_index(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, tuple[str, int, int]]:
    """The stack, place and depth of each tensor that lies in a transformer block; others are not in the result.

    A stack is an outermost numbered list with as many items as the config states blocks for some part of the model
    (or more: extra prediction layers follow the stack and count as its last place). So is a list of another length
    that has the name and the size of a stack.
    """
    places: dict[str, tuple[str, int]] = {}
    sizes: dict[str, int] = {}
    tensors: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            stack = ".".join(parts[:number])
            places[name] = (stack, int(parts[number]))
            sizes[stack] = max(sizes.get(stack, 0), int(parts[number]) + 1)
            tensors[stack] += 1
    stated = depths(config)
    unmatched = stated - set(sizes.values())
    depth = {}
    for stack, size in sizes.items():
        named = stack.rpartition(".")[2] in _STACK_NAMES and tensors[stack] >= _LEAST_TENSORS * size
        depth[stack] = size if size in stated else max((d for d in unmatched if d < size), default=size * named)
    return {
        name: (stack, min(index, depth[stack] - 1), depth[stack])
        for name, (stack, index) in places.items()
        if depth[stack]
    }


def layer_places(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, float]:
    """Where each tensor lies in depth: index / (layers - 1); 1 for a single layer, absent outside of the blocks."""
    blocks = block_index(names, config)
    return {name: index / (depth - 1) if depth > 1 else 1.0 for name, (_, index, depth) in blocks.items()}
