"""What pydantic finds wrong in a recipe, in its words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from ctl_merge.methods import registry
from ctl_merge.problems import Place, nearest
from ctl_merge.recipe_schema import (
    LoraSchema,
    ModelSchema,
    ModuleSchema,
    OutputSchema,
    ProbeSchema,
    RecipeSchema,
    SliceSchema,
    SliceSourceSchema,
    SourceSchema,
)
from ctl_merge.recipe_tokenizer import schema_problem


def schema_problems(error: ValidationError, data: Any) -> Iterator[tuple[Place, str]]:
    """What the schema says of a document, each with its place."""
    problems = error.errors()
    for problem in [p for p in problems if _in_meant_form(p["loc"], data)] or problems:
        path = tuple(part for part in problem["loc"] if part not in _UNION_BRANCHES)
        yield path, _said(path, problem["type"], problem["msg"], problem["input"])


def _said(path: Place, kind: str, message: str, value: Any) -> str:
    name = str(path[-1]) if path else ""
    if path[:1] == ("tokenizer",):
        message = schema_problem(path, kind, message, value)
    elif kind == "extra_forbidden":
        known: list[str] = list(RecipeSchema.model_fields)
        if len(path) > 1:
            known = _keys_at(path)
        message = f"unknown key {name!r}{nearest(name, known)}"
        if name == "revision":
            message = "a revision is written after the model's name: `model: org/name@revision`"
        elif name == "residual_weight":
            message = "`residual_weight` has no effect in mergekit, nor here: remove it"
        elif name == "override_architecture":
            message = "`override_architecture` chooses one of mergekit's tables of tensors; here is none: remove it"
        elif any(name in method.parameters for method in registry().values()):
            message = f"{name!r} is a parameter: write it under `parameters`"
    elif kind == "model_type" and (path[:1] == ("modules",) or "slices" in path) and "sources" not in path:
        message = f"`{'.'.join(map(str, path))}` is a mapping of {', '.join(_keys_at((*path, '')))}, not {value!r}"
    elif kind == "model_type" and path[0] == "output":
        message = f"`output` is `lora`, or {{lora: {{rank: 16}}}}, not {value!r}"
    elif kind == "model_type":
        message = f"a model is written as `model: org/name`, with `parameters` beside it, not as {value!r}"
    elif name == "layer_range" and kind in ("too_short", "too_long", "list_type"):
        message = f"`layer_range` is [first, end], the layers from first on and before end, not {value!r}"
    elif kind == "too_short":
        message = f"`{'.'.join(map(str, path))}` is empty"
    elif kind == "missing":
        message = f"`{name}` is missing"
    else:
        message = f"`{'.'.join(map(str, path))}`: {message[:1].lower()}{message[1:]} (it is {value!r})"
    return message


def _keys_at(path: Place) -> list[str]:
    """The keys that are known at the place of an unknown one."""
    holder = next((part for part in reversed(path[:-1]) if isinstance(part, str) and part in _BELOW), "modules")
    return list(_BELOW[holder].model_fields) + (list(ModelSchema.model_fields) if "model" in path else [])


_BELOW: Mapping[str, Any] = {
    "models": SourceSchema, "base_model": ModelSchema, "model": ModelSchema, "slices": SliceSchema,
    "sources": SliceSourceSchema, "modules": ModuleSchema, "probe": ProbeSchema,
    "output": OutputSchema, "lora": LoraSchema,
}  # fmt: skip
_UNION_BRANCHES = {"str", "ModelSchema", "LongModelSchema"}


def _in_meant_form(path: tuple[int | str, ...], data: Any) -> bool:
    """Whether a schema error is of the form in which a model was written, not of the two others that it could have."""
    value = data
    for part in path:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value):
            value = value[part]
        elif part in _UNION_BRANCHES:
            meant = "str" if not isinstance(value, dict) else "LongModelSchema" if "model" in value else "ModelSchema"
            if part != meant:
                return False
    return True
