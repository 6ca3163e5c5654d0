"""File tensor <-> module parameter, as transformers sees them.

What needs the model's class (renamed or tied parameters, layers, code that a model brings along) asks transformers, in
this file only, with a model on the meta device.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctl_merge.errors import CheckpointError
from ctl_merge.layers import block_index

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDING = re.compile(r"emb|wte|wpe|shared|project_in", re.IGNORECASE)


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
        if self.model is None:
            return {name: name for name in names}
        return {
            name: target if converter is None else name for name, target, _, converter in _targets(self.model, names)
        }

    def tied(self) -> dict[str, str]:
        """Module parameters that the model can tie, each with the one that is stored in its place."""
        return tied_parameters(self.model) if self.model is not None else {}

    def is_head(self, parameter: str) -> bool:
        """Whether it belongs to the output head, which a config may tie or not."""
        head = self.model and self.model.get_output_embeddings()
        return head is not None and self.model.get_submodule(parameter.rpartition(".")[0]) is head


# ---- a model's parameters


@dataclass(frozen=True)
class Origin:
    """What parameters are made of: a transform of transformers', and the file tensors that go into it.

    `first`: the first parameter that comes out. `sources`: names, each with the transform's pattern for it.
    """

    first: str
    transform: Any
    sources: list[tuple[str, str]]

    def build(self, model: Any, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters that come out, by name."""
        collected = copy.deepcopy(self.transform)
        for name, pattern in self.sources:
            collected.add_tensor(self.first, name, pattern, read(name))
        built = collected.convert(self.first, model=model, config=model.config)
        return {name: found[0] if isinstance(found, list) else found for name, found in built.items()}


def origins(model: Any, names: Iterable[str]) -> dict[str, Origin]:
    """Where each parameter of the model comes from, if a checkpoint has tensors of these names."""
    from transformers.core_model_loading import WeightRenaming, dot_natural_key

    found: dict[str, Origin] = {}
    for name, target, pattern, converter in _targets(model, sorted(names, key=dot_natural_key)):
        origin = found.setdefault(target, Origin(target, converter or WeightRenaming(name, target), []))
        origin.sources.append((name, pattern))
    for origin in list(found.values()):
        for other in getattr(origin.transform, "target_patterns", [])[1:]:
            found.setdefault(origin.first.replace(origin.transform.target_patterns[0], other), origin)
    return found


def tied_parameters(model: Any) -> dict[str, str]:
    """Parameters that the model ties, each with the one that is stored in its place."""
    return dict(model.all_tied_weights_keys)


def _targets(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str, str, Any]]:
    """For each file tensor: name, first parameter that it goes into, pattern, converter (None if only renamed)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters: Any = [c for c in conversions if not isinstance(c, WeightRenaming)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:  # saved under the model's own names
            target, pattern = rename_source_key(name, [], [], prefix, state)
        yield name, target, pattern or name, by_pattern[pattern] if pattern else None


# ---- a model's layers


def is_layer(module: Any) -> bool:
    """Whether transformers' own classes say that the module is a transformer layer."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def layer_classes(model: Any) -> set[str]:
    """The names of the classes that the model says must not be split, or whose outputs are its hidden states."""
    found = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("hidden_states", [])
        for each in recorded if isinstance(recorded, list | tuple) else [recorded]:
            kind: Any = getattr(each, "target_class", each)  # a class, or what records its outputs
            found.add(kind if isinstance(kind, str) else kind.__name__)
    return found


# ---- a config's model


def empty_model(config: Mapping[str, Any], name: str, code: Path | None = None, trust_remote_code: bool = False) -> Any:
    """A transformers model of that config in eval mode, float32, its parameters on the meta device.

    `code`: the folder of the config. Code that lies there, or in another repository that the config names, is run only
    if `trust_remote_code` says so; then it comes before transformers' own, as in from_pretrained. Raises
    CheckpointError.
    """
    import torch
    from accelerate import init_empty_weights

    def build(kind: Any, typed: Any) -> Any:
        with init_empty_weights(include_buffers=False):
            return kind._from_config(typed, dtype=torch.float32).eval()

    reference = _own_class(config)
    if not reference or not trust_remote_code or code is None:
        return build(*_native(config, name))
    try:
        return build(*_own(config, reference, code))
    except Exception as error:  # whatever foreign code raises
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise CheckpointError(f"{name}: the code that the model brings along cannot be run ({reason})") from error


def _native(config: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """transformers' own class for the config, and the config as it reads it."""
    import transformers

    architecture = (config.get("architectures") or [None])[0]
    if architecture is None:
        raise CheckpointError(f"{name}: config.json has no `architectures`, which name the model's class")
    kind, typed = getattr(transformers, str(architecture), None), str(config.get("model_type"))
    if kind is not None and typed in transformers.CONFIG_MAPPING:
        return kind, transformers.CONFIG_MAPPING[typed].from_dict(with_floats(config))
    lacking = repr(architecture) if kind is None else f"model_type {typed!r}"
    if not _own_class(config):
        raise CheckpointError(f"{name}: transformers has no {lacking}; if the model is new, update transformers")
    raise CheckpointError(
        f"{name}: transformers has no {lacking}; the model brings code of its own. Read that code, and if you trust it "
        "let it run: --trust-remote-code (in Python trust_remote_code=True)"
    )


def _own_class(config: Mapping[str, Any]) -> str | None:
    """Where the config says that the class of its model lies: `file.Class` or `org/name--file.Class`."""
    named = config.get("auto_map")
    models = {key: str(value) for key, value in named.items() if "AutoModel" in key} if isinstance(named, dict) else {}
    architecture = str((config.get("architectures") or [None])[0])
    own = (value for value in models.values() if value.rpartition(".")[2] == architecture)
    return next(own, models.get("AutoModelForCausalLM"))


def _own(config: Mapping[str, Any], reference: str, code: Path) -> tuple[Any, Any]:
    """The model's own class and its config, as its own class reads it: runs code that came with the model."""
    from transformers import CONFIG_MAPPING
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind: Any = get_class_from_dynamic_module(reference, str(code))
    named = config["auto_map"].get("AutoConfig")
    if named is None:
        return kind, CONFIG_MAPPING[config["model_type"]].from_dict(with_floats(config))
    typed: Any = get_class_from_dynamic_module(named, str(code))
    return kind, typed.from_dict(with_floats(config))


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
