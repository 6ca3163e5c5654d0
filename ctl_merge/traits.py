"""What a recipe's document has, asked before it is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ctl_merge.methods import Method, registry
from ctl_merge.moe_schema import ExpertSchema, MixtureSchema
from ctl_merge.recipe_schema import RecipeSchema, SliceSchema, SliceSourceSchema, SourceSchema

Data = Mapping[str, Any]
Trait = Callable[[Data], bool]

_ITEMS: Mapping[str, Any] = {"models": SourceSchema, "slices": SliceSchema, "sources": SliceSourceSchema}
_LEFT_ALONE = {"int8_mask"}  # accepted, without effect


def nothing(data: Data) -> bool:
    """For what no document tells."""
    return False


def a_merge(data: Data) -> bool:
    return isinstance(data.get("merge_method"), str) and not a_mixture(data)


def a_mixture(data: Data) -> bool:
    return "experts" in data


def both(*traits: Trait) -> Trait:
    return lambda data: all(trait(data) for trait in traits)


def key(*names: str) -> Trait:
    return lambda data: any(data.get(name) is not None for name in names)


def value(name: str, *values: Any) -> Trait:
    return lambda data: data.get(name) in values


def method(*names: str) -> Trait:
    return lambda data: data.get("merge_method") in names


def anywhere(name: str) -> Trait:
    """Whether a key is set at any depth."""
    return lambda data: any(found == name and inner is not None for found, inner in _walk(data))


def stacks(data: Data) -> bool:
    """Whether layers are put on top of others."""
    return any(name == "slices" and isinstance(inner, list) and len(inner) > 1 for name, inner in _walk(data))


def parameter(name: str, *values: Any) -> Trait:
    """Whether a parameter is set anywhere, to one of the values if there are any."""

    def found(data: Data) -> bool:
        given = [own[name] for own in _parameters(data) if name in own]
        return any(value in values for value in given) if values else bool(given)

    return found


def rescales(data: Data) -> bool:
    """Whether `rescale: true` is meant or is the default."""
    return not any("rescale" in own and own["rescale"] is not True for own in _parameters(data))


def tokenizer(*sources: str) -> Trait:
    """Whether the vocabulary is one of these; `model`: that of one of the models."""

    def found(data: Data) -> bool:
        long = data.get("tokenizer")
        source = (long.get("source") or "union") if isinstance(long, Mapping) else data.get("tokenizer_source")
        return source is not None and (source if source in ("base", "union") else "model") in sources

    return found


def below_tokenizer(name: str) -> Trait:
    """Whether `tokenizer` has this key."""
    return lambda data: isinstance(data.get("tokenizer"), Mapping) and data["tokenizer"].get(name) is not None


def adapters(data: Data) -> bool:
    named = ("model", "base_model", "source_model")
    return any(
        name == "lora" or (name in named and isinstance(inner, str) and "+" in inner) for name, inner in _walk(data)
    )


def gradients(data: Data) -> bool:
    """Whether a parameter is a list of values over the layers."""
    return any(_gradient(given) for own in _parameters(data) for given in own.values())


def without_base(data: Data) -> bool:
    return a_merge(data) and not any(name == "base_model" and inner is not None for name, inner in _walk(data))


def lacks_its_base(data: Data) -> bool:
    found = _known(data)
    return found is not None and found.base == "required" and without_base(data)


def shared_below_a_model(data: Data) -> bool:
    """Whether a model has parameters that its method takes for all models together."""
    found = _known(data)
    shared = {name for name, parameter in found.parameters.items() if not parameter.per_model} if found else set()
    listed = [model for name, models in _walk(data) if name in ("models", "sources") for model in _dicts(models)]
    return any(name in shared for model in listed for name in _mapping(model.get("parameters")))


def revision_beside_a_model(data: Data) -> bool:
    listed = [item for name, inner in _walk(data) if name in ("models", "sources") for item in _dicts(inner)]
    return any("revision" in item for item in listed)


def parameters_unknown_to_the_method(data: Data) -> bool:
    found = _known(data)
    known = {*found.parameters, *_LEFT_ALONE} if found else set()
    return found is not None and any(name not in known for own in _parameters(data) for name in own)


def unknown_keys(data: Data) -> bool:
    """Whether there are keys that no recipe has, at the top or beside a model; those with rows of their own apart."""
    top: Any = MixtureSchema if a_mixture(data) else RecipeSchema
    items = {**_ITEMS, "experts": ExpertSchema, "shared_experts": ExpertSchema} if a_mixture(data) else _ITEMS
    listed = [(items[name], item) for name, inner in _walk(data) if name in items for item in _dicts(inner)]
    told = {"revision", "residual_weight", "genome", "override_architecture"}
    return any(item.keys() - schema.model_fields.keys() - told for schema, item in [(top, data), *listed])


def _known(data: Data) -> Method | None:
    name = data.get("merge_method")
    return registry().get(name) if isinstance(name, str) else None


def _parameters(data: Data) -> Iterator[Mapping[str, Any]]:
    """Every mapping of parameters in a document."""
    return (inner for name, inner in _walk(data) if name == "parameters" and isinstance(inner, Mapping))


def _gradient(given: Any) -> bool:
    if isinstance(given, Mapping):
        return isinstance(given.get("value"), list)
    return isinstance(given, list) and (not _dicts(given) or any(map(_gradient, _dicts(given))))


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key in a document with its value, however deep."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name), inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _dicts(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
