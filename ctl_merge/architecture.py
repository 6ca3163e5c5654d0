"""File tensor <-> module parameter <-> transformer block.

Names and layers are found from the checkpoint's names and config alone where that is possible. What needs the model's
class (renamed or tied parameters) asks transformers, in this file only, with a model on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# The keys under which configs state how many blocks a stack has.
_DEPTH_KEYS = frozenset(
    "num_hidden_layers num_layers n_layer n_layers num_decoder_layers num_encoder_layers encoder_layers decoder_layers "
    "depth num_blocks".split()
)


def natural(name: str) -> tuple[object, ...]:
    """Sort key that counts numbers in names as numbers: layers.2 before layers.10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def depths(config: Mapping[str, Any]) -> set[int]:
    """The numbers of blocks that a config states, those of its sub-configs included."""
    found = {int(v) for k, v in config.items() if k in _DEPTH_KEYS and isinstance(v, int) and v > 0}
    found |= {len(v) for k, v in config.items() if k == "depths" and isinstance(v, list)}
    for value in config.values():
        if isinstance(value, Mapping):
            found |= depths(value)
    return found


def block_index(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, tuple[str, int, int]]:
    """The stack, place and depth of each tensor that lies in a transformer block; others are not in the result.

    A stack is an outermost numbered list with as many items as the config states blocks for some part of the model
    (or more: extra prediction layers follow the stack and count as its last place).
    """
    places: dict[str, tuple[str, int]] = {}
    sizes: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            stack = ".".join(parts[:number])
            places[name] = (stack, int(parts[number]))
            sizes[stack] = max(sizes.get(stack, 0), int(parts[number]) + 1)
    stated = depths(config)
    unmatched = stated - set(sizes.values())
    depth = {
        s: size if size in stated else max((d for d in unmatched if d < size), default=0) for s, size in sizes.items()
    }
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
    """Whether a config ties the output head to the embedding, as far as it says so itself."""
    text = config.get("text_config")
    stated = config.get("tie_word_embeddings")
    if stated is None and isinstance(text, Mapping):
        stated = text.get("tie_word_embeddings")
    return bool(stated)


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
        """Module parameters that the model ties, each with the one that is stored in its place."""
        return dict(self.model.all_tied_weights_keys) if self.model is not None else {}


def _meta_model(config: Mapping[str, Any]) -> Any:
    import torch
    import transformers

    name = (config.get("architectures") or [None])[0]
    kind = getattr(transformers, str(name), None)
    if kind is None or "model_type" not in config:
        return None
    try:
        typed = transformers.AutoConfig.for_model(**config)
        typed.tie_word_embeddings = True  # which parameters *can* be tied; the caller knows which are
        with torch.device("meta"):
            return kind._from_config(typed)
    except Exception:  # whatever a config makes the model's own code raise: the names are then taken as they are
        return None
