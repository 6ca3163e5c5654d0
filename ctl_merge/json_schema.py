"""The JSON schema of recipes, generated."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from ctl_merge.methods import Method, Parameter, registry
from ctl_merge.methods.parameters import NUMBER
from ctl_merge.moe_schema import MixtureSchema
from ctl_merge.recipe_schema import RecipeSchema


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12): keys, and for each method the parameters that it takes, where it takes them."""
    methods = registry()
    schema = RecipeSchema.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "ctl-merge recipe"}
    schema["properties"]["merge_method"]["enum"] = sorted(methods)
    schema["allOf"] = [
        {"if": {"properties": {"merge_method": {"const": method.name}}}, "then": _with_parameters(method)}
        for method in methods.values()
    ]
    return _or_mixture(schema)


def _or_mixture(merge: dict[str, Any]) -> dict[str, Any]:
    """The schema of merges, or of mixtures of experts for documents that have `experts` and no method."""
    mixture = MixtureSchema.model_json_schema()
    definitions = {**merge["$defs"], **mixture.pop("$defs"), "MixtureSchema": mixture}
    layouts = [{"required": [layout]} for layout in ("models", "slices", "modules")]
    merged = {"required": merge.pop("required"), "oneOf": layouts, "propertyNames": {"enum": [*merge["properties"]]}}
    return {
        **merge, "$defs": definitions, "properties": {**mixture["properties"], **merge["properties"]},
        "if": {"required": ["experts"], "not": {"required": ["merge_method"]}},
        "then": {"$ref": "#/$defs/MixtureSchema"}, "else": merged,
    }  # fmt: skip


def _with_parameters(method: Method) -> dict[str, Any]:
    """Where a recipe has parameters, those that the method takes there."""
    shared = {"parameters": _object(list(method.parameters.values()))}
    source = {"items": {"properties": {"parameters": _object([p for p in method.parameters.values() if p.per_model])}}}
    layouts = {"models": source, "slices": {"items": {"properties": {**shared, "sources": source}}}}
    modules = {"additionalProperties": {"properties": {**shared, **layouts}}}
    return {"properties": {**shared, **layouts, "modules": modules}}


def _object(parameters: list[Parameter]) -> dict[str, Any]:
    names = {parameter.name: _setting(parameter) for parameter in parameters}
    # `int8_mask` is mergekit's, and without effect.
    return {"type": ["object", "null"], "properties": {**names, "int8_mask": {}}, "additionalProperties": False}


def _setting(parameter: Parameter) -> dict[str, Any]:
    """A value, a gradient, a filtered value, or a list of those."""
    value = TypeAdapter(parameter.type).json_schema()
    text = value.pop("description", "")
    if parameter.type_is_bool:
        value = {"anyOf": [value, {"enum": [0, 1]}]}
    elif "'number'" in str(value) or "'integer'" in str(value):  # YAML 1.1 takes 1e-10, without a point, for text
        value = {"anyOf": [value, {"type": "string", "pattern": f"^{NUMBER.pattern}$"}]}
    gradient = {"type": "array", "items": value, "minItems": 1}
    choice = {
        "type": "object",
        "properties": {"value": {"anyOf": [value, gradient]}, "filter": {"type": ["string", "null"]}},
        "required": ["value"],
        "additionalProperties": False,
    }
    found: dict[str, Any] = {"anyOf": [value, gradient, choice, {"type": "array", "items": choice, "minItems": 1}]}
    found["description"] = f"{text}{'; each model its own' if parameter.per_model else ''}"
    if not parameter.required:
        found["default"] = parameter.default
    return found
