"""File tensor <-> module parameter <-> transformer block.

Names and layers are found from the checkpoint's names and config alone where that is possible. What needs the model's
class (renamed or tied parameters) asks transformers, in this file only, with a model on the meta device.
"""

from __future__ import annotations

import json
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
_EMBEDDING = re.compile(r"emb|wte|wpe|shared|project_in", re.IGNORECASE)
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


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a config ties the output head to the embedding; where it does not say, what its model type does."""
    text = config.get("text_config")
    stated = config.get("tie_word_embeddings")
    if stated is None and isinstance(text, Mapping):
        stated = text.get("tie_word_embeddings")
    if stated is None:
        stated = getattr(typed_config(config), "tie_word_embeddings", False)
    return bool(stated)


def precede_blocks(names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Those of the tensors outside of the blocks that a model uses before them: embeddings, as a rule.

    By the order in which the model's class lists its modules; by names where transformers does not have it.
    """
    names, modules = list(names), ModuleMap(config)
    if modules.model is None:
        return {name for name in names if _EMBEDDING.search(name)}
    order = {parameter: place for place, parameter in enumerate(modules.model.state_dict())}
    first = min((order[name] for name in block_index(order, config)), default=len(order))
    parameters = modules.parameters(names)
    return {name for name in names if order.get(parameters[name], first) < first}


def stacked(modules: ModuleMap, names: Iterable[str]) -> dict[str, list[list[str]]]:
    """The parameters in which a model stacks its experts, each with the file tensors that go into it.

    [p][e]: of expert e, the p-th of those that lie one after the other along the second axis. Parameters that are put
    together in other ways are not in the result.
    """
    if modules.model is None:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )  # fmt: skip

    conversions = get_model_conversion_mapping(modules.model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters: Any = [c for c in conversions if not isinstance(c, WeightRenaming)]
    plain = [  # stacked along the first axis, then side by side along the second
        c for c in converters
        if isinstance(c.operations[0], MergeModulelist) and c.operations[0].dim == 0 and len(c.target_patterns) == 1
        and (c.operations[1:] == [] or _joins(c.operations[1:], Concatenate))
    ]  # fmt: skip
    parts = {pattern: (place, len(c.source_patterns)) for c in plain for place, pattern in enumerate(c.source_patterns)}
    state, prefix = modules.model.state_dict(), modules.model.base_model_prefix
    found: dict[str, list[list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if pattern in parts and parameter in state:
            place, count = parts[pattern]
            found.setdefault(parameter, [[] for _ in range(count)])[place].append(name)
    return {parameter: lists for parameter, lists in found.items() if len({len(part) for part in lists}) == 1}


def _joins(operations: list[Any], kind: type) -> bool:
    return len(operations) == 1 and isinstance(operations[0], kind) and operations[0].dim == 1  # type: ignore[attr-defined]


class ModuleMap:
    """The model's own view of a checkpoint's names; an empty view for architectures that transformers does not have."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model = _meta_model(config)

    def parameters(self, names: Iterable[str]) -> dict[str, str]:
        """Module parameter of each file tensor; the name itself where the model does not rename one to one."""
        names = list(names)
        if self.model is None:
            return {name: name for name in names}
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        conversions = get_model_conversion_mapping(self.model)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters: Any = [c for c in conversions if not isinstance(c, WeightRenaming)]
        state = self.model.state_dict()
        found = {}
        for name in names:
            renamed, source = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            if renamed not in state and name in state:
                renamed = name
            found[name] = name if source is not None else renamed
        return found

    def tied(self) -> dict[str, str]:
        """Module parameters that the model can tie, each with the one that is stored in its place."""
        return dict(self.model.all_tied_weights_keys) if self.model is not None else {}

    def is_head(self, parameter: str) -> bool:
        """Whether it belongs to the output head, which a config may tie or not."""
        head = self.model and self.model.get_output_embeddings()
        return head is not None and self.model.get_submodule(parameter.rpartition(".")[0]) is head


def with_floats(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose infinities, which JSON cannot say, are floats: transformers writes {"__float__": "Infinity"}."""
    return json.loads(
        json.dumps(config), object_hook=lambda value: float(value["__float__"]) if "__float__" in value else value
    )


def typed_config(config: Mapping[str, Any]) -> Any:
    """The config as transformers reads it; None where it cannot."""
    import transformers

    try:
        return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(with_floats(config))
    except Exception:  # whatever a config makes its class raise
        return None


def _meta_model(config: Mapping[str, Any]) -> Any:
    import torch
    import transformers

    kind, typed = getattr(transformers, str((config.get("architectures") or [None])[0]), None), typed_config(config)
    if kind is None or typed is None:
        return None
    try:
        typed.tie_word_embeddings = True  # which parameters *can* be tied; the caller knows which are
        with torch.device("meta"):
            return kind._from_config(typed)
    except Exception:  # whatever a config makes the model's own code raise: the names are then taken as they are
        return None
