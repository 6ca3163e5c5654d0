"""YAML to a checked recipe, with every error at once.

A mergekit config is a recipe: same keys, defaults and meaning. Our own keys (`seed`, `missing`, `nonfinite`) are
additions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from ctl_merge.document import Document
from ctl_merge.errors import CheckpointError, RecipeError
from ctl_merge.methods import Method, Parameter, registry
from ctl_merge.reference import ModelRef
from ctl_merge.settings import Setting, parse_setting

Dtype = Literal["float32", "float16", "bfloat16", "float64"]
Path_ = tuple[str | int, ...]

LATER = {
    "slices": "`slices` (stacks of layer ranges) are not supported yet: list whole models under `models`",
    "modules": "`modules` (multi-part models) are not supported yet: list whole models under `models`",
    "tokenizer": "tokenizer surgery is not supported yet; `tokenizer_source: base` keeps the base's vocabulary",
    "chat_template": "`chat_template` is not supported yet: the output keeps the base's chat template",
}
LATER_METHODS = frozenset("nuslerp multislerp karcher model_stock".split())
# mergekit reads it for the dtype of its masks only; the merged weights do not depend on it.
_WITHOUT_EFFECT = {"int8_mask": "`int8_mask` concerns mergekit's memory use only and has no effect here"}


class ModelSchema(BaseModel):
    """A model by folder or Hub name in mergekit's long form."""

    model_config = ConfigDict(extra="forbid", strict=True)
    path: str = Field(description="folder or org/name")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")


class LongModelSchema(BaseModel):
    """mergekit's `{model: {path, revision}}`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: ModelSchema | str


class SourceSchema(BaseModel):
    """One model that goes into the merge."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | ModelSchema | LongModelSchema = Field(description="folder, org/name or org/name@revision")
    parameters: dict[str, Any] | None = Field(None, description="the model's own parameters")


class ProbeSchema(BaseModel):
    """How the merge is to be probed: what `ctl-merge probe` takes as options."""

    model_config = ConfigDict(extra="forbid", strict=True)
    data: list[str] = Field(default_factory=list, description="NAME=FILE:column, FILE, or org/dataset:column@split")
    sequences: int = Field(default=64, ge=1, description="windows of each data set")
    length: int = Field(default=256, ge=2, description="tokens of a window")


class RecipeSchema(BaseModel):
    """A merge: the method, the models, their parameters."""

    model_config = ConfigDict(extra="forbid", strict=True)
    merge_method: str = Field(description="see `ctl-merge methods`")
    models: list[SourceSchema] = Field(min_length=1, description="the models that are merged")
    base_model: str | ModelSchema | LongModelSchema | None = Field(
        None, description="the model that task vectors are differences from; gives config and tokenizer"
    )
    parameters: dict[str, Any] | None = Field(None, description="shared parameters, and defaults of per-model ones")
    dtype: Dtype | None = Field(
        None, description="dtype of the merged weights (arithmetic is float64); base's if unset"
    )
    out_dtype: Dtype | None = Field(None, description="dtype of the merged weights; wins over `dtype`")
    tokenizer_source: Literal["base"] | None = Field(
        None, description="`base`: keep the base's vocabulary and drop the rows that only other models have"
    )
    probe: ProbeSchema | None = Field(None, description="how `--probe` and `ctl-merge probe` look at the merge")
    seed: StrictInt = Field(0, ge=0, description="seed of the methods that draw random numbers")
    missing: Literal["error", "base", "skip"] = Field(
        "error", description="tensors that only some models have: refuse, take the base's, or leave them out"
    )
    nonfinite: Literal["error", "allow"] = Field(
        "error", description="NaN or infinity in an input: refuse, or let it through"
    )


@dataclass(frozen=True)
class Source:
    """A model of the recipe with its own parameters."""

    ref: ModelRef
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: what is merged into what, how. `text` is the file verbatim."""

    method: Method
    models: tuple[Source, ...]  # inputs in the recipe's order; the base is among them where it is an input
    base: ModelRef | None
    settings: Mapping[str, Setting]
    dtype: Dtype | None
    keep_base_vocabulary: bool
    seed: int
    missing: Literal["error", "base", "skip"]
    allow_nonfinite: bool
    probe: ProbeSchema | None
    text: str
    name: str
    warnings: tuple[str, ...] = ()

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """Every distinct model that is read: the one that gives config and tokenizer first."""
        first = self.base or self.models[0].ref
        return tuple(dict.fromkeys((first, *(source.ref for source in self.models))))


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file. Raises RecipeError with every problem and its line."""
    path = Path(path)
    return _Checker(Document.load(path), path.parent).recipe()


def parse_recipe(text: str, name: str = "recipe", relative_to: Path | None = None) -> Recipe:
    """Check a recipe given as text; relative folders are looked for in the working directory, then `relative_to`."""
    return _Checker(Document.parse(text, name), relative_to).recipe()


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known word is near."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


class _Checker:
    """Collects the problems of one document, then either raises them all or gives the recipe."""

    def __init__(self, document: Document, folder: Path | None) -> None:
        self.document, self.folder = document, folder
        self.problems: list[tuple[Path_, str]] = []
        self.warnings: list[str] = []

    def recipe(self) -> Recipe:
        data = self.document.data
        if not isinstance(data, dict):
            raise RecipeError(f"{self.document.name}: a recipe is a mapping with `merge_method` and `models`")
        self._refuse_foreign(data)
        schema = self._schema(data)
        method = self._method(data)
        shared = self._settings(("parameters",), data.get("parameters"), method, per_model_only=False)
        base = self._ref(("base_model",), data.get("base_model"))
        sources = self._sources(data, method)
        listed = data.get("models")
        complete = isinstance(listed, list) and len(sources) == len(listed) > 0
        if method and complete and (base or not data.get("base_model")):
            sources = self._with_base(method, sources, base)
            self._complete(method, sources, shared, base)
        if self.problems or method is None or schema is None:
            self._raise()
        assert schema is not None and method is not None
        if len({source.ref for source in sources}) < len(sources):
            self.warnings.append("a model is listed more than once: it counts as often as it is listed")
        return Recipe(
            method=method, models=tuple(sources), base=base, settings=shared, dtype=schema.out_dtype or schema.dtype,
            keep_base_vocabulary=schema.tokenizer_source == "base", seed=schema.seed, missing=schema.missing,
            allow_nonfinite=schema.nonfinite == "allow", probe=schema.probe,
            text=self.document.text, name=self.document.name,
            warnings=tuple(self.warnings),
        )  # fmt: skip

    def _raise(self) -> None:
        lines = sorted((self.document.line(path), message) for path, message in self.problems)
        listed = "\n".join(f"  line {line}: {message}" for line, message in dict.fromkeys(lines))
        raise RecipeError(f"{self.document.name}: {len(dict.fromkeys(lines))} problem(s) in the recipe\n{listed}")

    def _refuse_foreign(self, data: dict) -> None:
        """Documents of mergekit's other tools, which share none of a recipe's keys."""
        if "genome" in data:
            raise RecipeError(
                f"{self.document.name}: a mergekit-evolve genome is not a recipe; merge with fixed parameters"
            )
        if "experts" in data and "merge_method" not in data:
            raise RecipeError(f"{self.document.name}: mergekit-moe configs are not supported yet")

    def _schema(self, data: dict) -> RecipeSchema | None:
        self.problems += [((key,), message) for key, message in LATER.items() if data.get(key) is not None]
        given = {key: value for key, value in data.items() if key not in LATER}
        try:
            return RecipeSchema.model_validate(given)
        except ValidationError as error:
            problems = error.errors()
            for problem in [p for p in problems if _in_meant_form(p["loc"], data)] or problems:
                path = tuple(part for part in problem["loc"] if part not in _UNION_BRANCHES)
                self._schema_problem(path, problem["type"], problem["msg"], problem["input"])
            return None

    def _schema_problem(self, path: Path_, kind: str, message: str, value: Any) -> None:
        name = str(path[-1]) if path else ""
        if path[:1] == ("models",) and kind == "missing" and "slices" in self.document.data:
            return  # already told that slices are not supported
        if path[-1:] == ("tokenizer_source",):
            message = f"only `tokenizer_source: base` is supported yet, not {value!r}"
        elif kind == "extra_forbidden":
            known = [*RecipeSchema.model_fields, *LATER]
            if len(path) > 1:  # below `models` or `base_model`
                known = [*SourceSchema.model_fields, *ModelSchema.model_fields]
            message = f"unknown key {name!r}{nearest(name, known)}"
            if any(name in method.parameters for method in registry().values()):
                message = f"{name!r} is a parameter: write it under `parameters`"
        elif kind == "model_type":
            message = f"a model is written as `model: org/name`, with `parameters` beside it, not as {value!r}"
        elif kind == "missing":
            message = f"`{name}` is missing"
        else:
            message = f"`{'.'.join(map(str, path))}`: {message[:1].lower()}{message[1:]} (it is {value!r})"
        self.problems.append((path, message))

    def _method(self, data: dict) -> Method | None:
        name, methods = data.get("merge_method"), registry()
        if isinstance(name, str) and name not in methods:
            known = ", ".join(sorted(methods))
            what = f"the merge method {name!r} is not supported yet"
            if name not in LATER_METHODS:
                what = f"no merge method {name!r}{nearest(name, methods)}"
            self.problems.append((("merge_method",), f"{what}; there are: {known}"))
        return methods.get(name) if isinstance(name, str) else None

    def _ref(self, path: Path_, raw: Any) -> ModelRef | None:
        if isinstance(raw, dict):
            raw = raw.get("model", raw)
        if isinstance(raw, dict):
            raw = f"{raw.get('path')}@{raw['revision']}" if raw.get("revision") else raw.get("path")
        if not isinstance(raw, str):
            return None  # the schema has said so
        try:
            return ModelRef.parse(raw, self.folder)
        except CheckpointError as error:
            self.problems.append((path, str(error)))
            return None

    def _sources(self, data: dict, method: Method | None) -> list[Source]:
        raw_models = data.get("models")
        found = []
        for index, raw in enumerate(raw_models if isinstance(raw_models, list) else []):
            if isinstance(raw, dict):
                ref = self._ref(("models", index, "model"), raw.get("model"))
                path = ("models", index, "parameters")
                settings = self._settings(path, raw.get("parameters"), method, per_model_only=True)
                if ref:
                    found.append(Source(ref, settings))
        return found

    def _settings(self, path: Path_, raw: Any, method: Method | None, *, per_model_only: bool) -> dict[str, Setting]:
        if method is None or not isinstance(raw, dict):
            return {}
        found = {}
        for name, value in raw.items():
            parameter = method.parameters.get(name)
            if parameter is None and name in _WITHOUT_EFFECT:
                self.warnings.append(_WITHOUT_EFFECT[name])
            elif parameter is None:
                hint = nearest(str(name), method.parameters) or f"; it has: {', '.join(method.parameters)}"
                self.problems.append(((*path, name), f"{method.name} has no parameter {name!r}{hint}"))
            elif per_model_only and not parameter.per_model:
                self.problems.append(
                    ((*path, name), f"{name!r} is shared by all models: move it to the recipe's own `parameters`")
                )
            else:
                below: list[tuple[Path_, str]] = []
                setting = parse_setting(value, parameter, below)
                self.problems += [((*path, name, *at), message) for at, message in below]
                found[name] = setting or Setting(())  # a wrong value is not a missing one
        return found

    def _with_base(self, method: Method, sources: list[Source], base: ModelRef | None) -> list[Source]:
        """The inputs in the order in which the method sees them."""
        if base is None or method.base == "none":
            return sources
        if method.space == "task_vectors":
            if any(source.ref == base and source.settings for source in sources):
                self.warnings.append("parameters of the base model have no effect: its own task vector is zero")
            return [source for source in sources if source.ref != base]
        if all(source.ref != base for source in sources):
            sources = [*sources, Source(base)]
        return sorted(sources, key=lambda source: source.ref != base) if method.base == "required" else sources

    def _complete(
        self, method: Method, sources: list[Source], shared: Mapping[str, Setting], base: ModelRef | None
    ) -> None:
        """What is missing as a whole: the base, models, required parameters."""
        if method.base == "required" and base is None:
            self.problems.append(
                (("merge_method",), f"{method.name} needs a `base_model`: the model the others come from")
            )
        if method.base == "none" and base is not None and all(source.ref != base for source in sources):
            self.problems.append((("base_model",), f"{method.name} takes no `base_model`: remove it"))
        least, most = method.models
        if len(sources) < least or (most is not None and len(sources) > most):
            wanted = f"{least}" if least == most else f"at least {least}"
            kind = "models besides the base" if method.space == "task_vectors" else "models, the base included"
            self.problems.append((("models",), f"{method.name} merges {wanted} {kind}; the recipe has {len(sources)}"))
        for parameter in method.parameters.values():
            self._require(parameter, sources, shared, base)

    def _require(
        self, parameter: Parameter, sources: list[Source], shared: Mapping[str, Setting], base: ModelRef | None
    ) -> None:
        if not parameter.required or parameter.name in shared:
            return
        if not parameter.per_model:
            self.problems.append((("parameters",), f"the parameter `{parameter.name}` is missing"))
            return
        for index, source in enumerate(sources):
            if parameter.name not in source.settings:
                note = " (the base is an ordinary input of this method)" if source.ref == base else ""
                self.problems.append(
                    (("models", index), f"the model {source.ref} has no `{parameter.name}`{note}: give it one")
                )


_UNION_BRANCHES = {"str", "ModelSchema", "LongModelSchema"}


def _in_meant_form(path: tuple[int | str, ...], data: Any) -> bool:
    """Whether a schema error is of the form in which a model was written, not of the two others that it could have."""
    value = data
    for part in path:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif part in _UNION_BRANCHES:
            meant = "str" if not isinstance(value, dict) else "LongModelSchema" if "model" in value else "ModelSchema"
            if part != meant:
                return False
    return True
