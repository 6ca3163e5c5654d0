"""YAML to a checked recipe, with every error at once.

A mergekit config is a recipe: same keys, defaults and meaning. Our own keys (`seed`, `missing`, `nonfinite`) are
additions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ctl_merge.document import Document
from ctl_merge.errors import CheckpointError, DataError, RecipeError
from ctl_merge.methods import Method, Parameter, registry
from ctl_merge.mixture import METHOD as MIXTURE
from ctl_merge.mixture import Mixture
from ctl_merge.moe_schema import MixtureChecker
from ctl_merge.probing.rows import DataSpec
from ctl_merge.recipe_schema import (
    DataSchema,
    Dtype,
    ModelSchema,
    ModuleSchema,
    ProbeSchema,
    RecipeSchema,
    SliceSchema,
    SliceSourceSchema,
    SourceSchema,
)
from ctl_merge.recipe_tokenizer import TokenizerChecker, TokenizerSetting, schema_problem
from ctl_merge.reference import ModelRef
from ctl_merge.settings import Setting, parse_setting

Path_ = tuple[str | int, ...]

# mergekit reads it for the dtype of its masks only; the merged weights do not depend on it.
_WITHOUT_EFFECT = {"int8_mask": "`int8_mask` concerns mergekit's memory use only and has no effect here"}


_BASE_PARAMETERS = "parameters of the base model have no effect: its own task vector is zero"


@dataclass(frozen=True)
class Source:
    """A model of the recipe with its own parameters; `layers` [first, end) of it, None for the whole model."""

    ref: ModelRef
    settings: Mapping[str, Setting] = field(default_factory=dict)
    layers: tuple[int, int] | None = None
    texts: tuple[DataSpec, ...] = ()


@dataclass(frozen=True)
class Slice:
    """A merge of its own within a recipe: a run of layers, or a module, or both.

    models, base: as the recipe's, for this slice; `module` is the part of the model, None for all of it.
    """

    models: tuple[Source, ...]
    base: Source | None
    settings: Mapping[str, Setting]  # the slice's own, then the module's, then the recipe's
    module: str | None = None

    @property
    def layers(self) -> int | None:
        """How many layers of the output it makes; None where it takes whole models."""
        span = self.models[0].layers
        return span and span[1] - span[0]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: what is merged into what, how. `text` is the file verbatim.

    `slices`: merges of their own, of which the output is made up; none where whole models are merged. `models` are
    then all models that go into them.
    """

    method: Method
    models: tuple[Source, ...]  # inputs in the recipe's order; the base is among them where it is an input
    base: ModelRef | None
    settings: Mapping[str, Setting]
    dtype: Dtype | None
    tokenizer: TokenizerSetting
    seed: int
    missing: Literal["error", "base", "skip"]
    allow_nonfinite: bool
    probe: ProbeSchema | None
    data: DataSchema | None  # where the method measures the models on text
    text: str
    name: str
    warnings: tuple[str, ...] = ()
    texts: tuple[DataSpec, ...] = ()  # for models without any of their own
    slices: tuple[Slice, ...] = ()
    steps: Mapping[str, Recipe] = field(default_factory=dict)  # earlier documents of the file, by name
    onlookers: tuple[ModelRef, ...] = ()  # among the models, and without a say in the vocabulary
    mixture: Mixture | None = None  # the models side by side, instead of merged

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """Every distinct model that is read: the one that gives config and tokenizer first."""
        first = self.base or self.models[0].ref
        bases = (part.base.ref for part in self.slices if part.base)
        return tuple(dict.fromkeys((first, *(source.ref for source in self.models), *bases)))


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file. Raises RecipeError with every problem and its line."""
    path = Path(path)
    return _last(Document.load(path), path.parent)


def parse_recipe(text: str, name: str = "recipe", relative_to: Path | None = None) -> Recipe:
    """Check a recipe given as text; relative folders are looked for in the working directory, then `relative_to`."""
    return _last(Document.parse(text, name), relative_to)


def _last(documents: Sequence[Document], folder: Path | None) -> Recipe:
    """The recipe that the others of a file are steps of: each may name the named ones before or after it as models."""
    names = [d.data.get("name") if isinstance(d.data, dict) else None for d in documents]
    if len(documents) == 1:
        return _Checker(documents[0], folder).recipe()
    file = documents[0].name
    twice = next((name for name in names if name is not None and names.count(name) > 1), None)
    if twice is not None or names.count(None) > 1:
        what = f"two merges are called {twice!r}" if twice is not None else "more than one merge has no `name`"
        raise RecipeError(f"{file}: {what}: of several documents each has a name, except the last merge")
    return _Steps(dict(zip(names, documents, strict=True)), folder).last()


class _Steps:
    """The merges of a file of several documents, each checked after those that it names as models."""

    def __init__(self, documents: Mapping[str | None, Document], folder: Path | None) -> None:
        self.documents, self.folder = documents, folder
        self.done: dict[str | None, Recipe] = {}
        self.open: list[str | None] = []

    def last(self) -> Recipe:
        """The unnamed merge; else the one that no other uses."""
        for name in self.documents:
            self._check(name)
        if None in self.documents:
            return self.done[None]
        used = {step for recipe in self.done.values() for step in recipe.steps}
        ends = [name for name in self.documents if name not in used]
        if len(ends) > 1:
            file = self.documents[ends[0]].name
            listed = ", ".join(map(repr, ends))
            raise RecipeError(
                f"{file}: no merge uses {listed}, so that it is open which is the result: leave out its name"
            )
        return self.done[ends[0]]

    def _check(self, name: str | None) -> None:
        if name in self.done:
            return
        document = self.documents[name]
        if name in self.open:
            raise RecipeError(f"{document.name}: the merge {name!r} needs itself: {' -> '.join(map(str, self.open))}")
        self.open.append(name)
        used = [other for other in self.documents if other is not None and _mentions(document.data, other)]
        for other in used:
            self._check(other)
        steps = {other: self.done[other] for other in used if other is not None}
        self.done[name] = _Checker(document, self.folder, steps).recipe()
        self.open.pop()


def _is_step(value: Any, name: str) -> bool:
    """Whether a model is written as a step: by its name, or by the folder in which mergekit would have left it."""
    if not isinstance(value, str):
        return False
    model = value.partition("+")[0]  # without an adapter
    left = model.startswith(("./", "../")) and Path(model).name == name and not Path(model).exists()
    return model == name or left


def _mentions(data: Any, name: str) -> bool:
    """Whether a document names a step as a model."""
    if isinstance(data, dict):
        keys = ("model", "base_model", "path", "source_model")
        return any(
            (key in keys and _is_step(value, name)) or (key != "name" and _mentions(value, name))
            for key, value in data.items()
        )
    return isinstance(data, list) and any(_mentions(item, name) for item in data)


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known word is near."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


class _Checker:
    """Collects the problems of one document, then either raises them all or gives the recipe."""

    def __init__(self, document: Document, folder: Path | None, steps: Mapping[str, Recipe] | None = None) -> None:
        self.document, self.folder, self.steps = document, folder, steps or {}
        self.problems: list[tuple[Path_, str]] = []
        self.warnings: list[str] = []

    def recipe(self) -> Recipe:
        data = self.document.data
        if not isinstance(data, dict):
            raise RecipeError(f"{self.document.name}: a recipe is a mapping with `merge_method` and `models`")
        self._refuse_foreign(data)
        if "experts" in data:
            return self._mixture(data)
        schema = self._schema(data)
        method = self._method(data)
        shared = self._settings(("parameters",), data.get("parameters"), method, per_model_only=False)
        base = self._ref(("base_model",), data.get("base_model"))
        parts = list(self._parts(data, method, base, shared))
        models = [*([base] if base else []), *(source.ref for part in parts for source in part.models)]
        known = models if parts and (base or not data.get("base_model")) else None
        tokenizer = TokenizerChecker(self._ref, known, self.problems).setting(data)
        texts = self._check_data(data, method, schema, parts)
        if self.problems or method is None or schema is None:
            self._raise()
        assert schema is not None and method is not None
        whole = len(parts) == 1 and parts[0].module is None and parts[0].layers is None
        merged = parts[0].models if whole else _distinct(parts)
        if any(len({(s.ref, s.layers) for s in part.models}) < len(part.models) for part in parts):
            self.warnings.append("a model is listed more than once: it counts as often as it is listed")
        return Recipe(
            method=method, models=merged, base=base, settings=shared, dtype=schema.out_dtype or schema.dtype,
            tokenizer=tokenizer, seed=schema.seed, missing=schema.missing,
            allow_nonfinite=schema.nonfinite == "allow", probe=schema.probe,
            data=(schema.data or DataSchema()) if method.statistic else None, texts=texts,
            text=self.document.text, name=self.document.name, warnings=tuple(dict.fromkeys(self.warnings)),
            slices=() if whole else tuple(parts), steps=self.steps,
        )  # fmt: skip

    def _parts(
        self, data: dict, method: Method | None, base: ModelRef | None, shared: Mapping[str, Setting]
    ) -> Iterator[Slice]:
        """The merges that the recipe is made up of: whole models are one."""
        self._one_layout((), data, ("models", "slices", "modules"))
        modules = data.get("modules")
        if not isinstance(modules, dict):
            yield from self._slices((), data, None, method, base, shared)
            return
        for name, module in modules.items():
            if isinstance(module, dict):
                path = ("modules", name)
                self._one_layout(path, module, ("models", "slices"))
                own = self._settings((*path, "parameters"), module.get("parameters"), method, per_model_only=False)
                whole = None if name == "default" and len(modules) == 1 else str(name)
                yield from self._slices(path, module, whole, method, base, _over(own, shared))

    def _check_data(
        self, data: dict, method: Method | None, schema: RecipeSchema | None, parts: Sequence[Slice]
    ) -> tuple[DataSpec, ...]:
        """Texts where the method measures on text, and only there; those of models without any of their own."""
        given = data.get("data") is not None or any(source.texts for part in parts for source in part.models)
        if method and not method.statistic and given:
            self.problems.append((("data",), f"{method.name} measures nothing on text: remove `data`"))
        if not method or not method.statistic or schema is None:
            return ()
        inputs = schema.data.inputs if schema.data else "expert"
        if method.statistic == "fisher" and inputs != "expert":
            self.problems.append(
                (("data", "inputs"), f"{method.name} takes each model's gradients: it has no `inputs`")
            )
        elif inputs == "base" and data.get("base_model") is None:
            self.problems.append((("data", "inputs"), "`inputs: base` needs a `base_model`"))
        common = self._texts(("data", "texts"), schema.data.texts if schema.data else None)
        lacking = [str(source.ref) for part in parts for source in part.models if not source.texts and not common]
        if lacking:
            self.problems.append(
                (("models",), f"{method.name} measures each model on text: give {lacking[0]} `data: FILE:column`")
            )
        return common

    def _texts(self, at: Path_, raw: Any) -> tuple[DataSpec, ...]:
        found = []
        for text in [raw] if isinstance(raw, str) else raw if isinstance(raw, list) else []:
            try:
                spec = DataSpec.parse(str(text))
                beside = self.folder / spec.source if self.folder else None
                if beside and beside.is_file() and not Path(spec.source).exists():
                    spec = replace(spec, source=str(beside))
                found.append(spec)
            except DataError as error:
                self.problems.append((at, str(error)))
        return tuple(found)

    def _one_layout(self, path: Path_, holder: dict, keys: tuple[str, ...]) -> None:
        given = [key for key in keys if holder.get(key) is not None]
        if len(given) != 1:
            what = " and ".join(f"`{key}`" for key in given) or "none of them"
            listed = ", ".join(f"`{key}`" for key in keys)
            self.problems.append(((*path, *given[1:2]), f"give one of {listed}; there is {what}"))

    def _slices(
        self, path: Path_, holder: dict, module: str | None, method: Method | None, base: ModelRef | None,
        shared: Mapping[str, Setting],
    ) -> Iterator[Slice]:  # fmt: skip
        listed, slices = holder.get("models"), holder.get("slices")
        if isinstance(listed, list):
            at = (*path, "models")
            sources = self._sources(at, listed, method)
            if method and len(sources) == len(listed) > 0 and (base or not self.document.data.get("base_model")):
                sources = self._with_base(method, sources, base)
                self._complete(at, method, sources, shared, base)
                apart = method.space == "task_vectors"
                yield Slice(tuple(sources), Source(base) if base and apart else None, shared, module)
        for index, raw in enumerate(slices if isinstance(slices, list) else []):
            if isinstance(raw, dict):
                found = self._slice((*path, "slices", index), raw, module, method, base, shared)
                yield from [found] if found else []

    def _slice(
        self, path: Path_, raw: dict, module: str | None, method: Method | None, base: ModelRef | None,
        shared: Mapping[str, Setting],
    ) -> Slice | None:  # fmt: skip
        at = (*path, "sources")
        listed: Any = raw.get("sources")
        sources = self._sources(at, listed, method)
        own = self._settings((*path, "parameters"), raw.get("parameters"), method, per_model_only=False)
        base = self._ref((*path, "base_model"), raw.get("base_model")) or base
        if not method or not isinstance(listed, list) or len(sources) < len(listed) or not sources:
            return None
        spans = [source.layers for source in sources if source.layers]
        lengths = sorted({end - first for first, end in spans})
        if len(spans) < len(sources):
            return None  # the schema has said what is wrong with a layer_range
        if len(lengths) > 1 or lengths[0] <= 0 or min(spans)[0] < 0:
            told = ", ".join(f"[{first}, {end}]" for first, end in spans)
            why = "all sources of a slice have as many layers" if len(lengths) > 1 else "[first, end) holds no layer"
            self.problems.append((at, f"layer_range {told}: {why}"))
            return None
        kept, taken = self._base_of_slice(at, method, sources, base)
        settings = _over(own, shared)
        self._complete(at, method, kept, settings, base)
        return Slice(tuple(kept), taken, settings, module)

    def _base_of_slice(
        self, at: Path_, method: Method, sources: list[Source], base: ModelRef | None
    ) -> tuple[list[Source], Source | None]:
        """A slice's sources as the method sees them, and the base's layers, which must be among those listed."""
        own = [source for source in sources if source.ref == base]
        if base is None or method.base == "none":
            return sources, None
        if method.base == "required" and len(own) != 1:
            what = "is not among its sources" if not own else "is among its sources more than once"
            self.problems.append(
                (at, f"the slice's base {base} {what}: {method.name} needs it once, with its layer_range")
            )
        if method.space == "task_vectors":
            if any(source.settings for source in own):
                self.warnings.append(_BASE_PARAMETERS)
            return self._apart(sources, base), own[0] if own else None
        if method.base == "required":
            sources = sorted(sources, key=lambda source: source.ref != base)
        return sources, None

    def _raise(self) -> None:
        lines = sorted((self.document.line(path), message) for path, message in self.problems)
        listed = "\n".join(f"  line {line}: {message}" for line, message in dict.fromkeys(lines))
        raise RecipeError(f"{self.document.name}: {len(dict.fromkeys(lines))} problem(s) in the recipe\n{listed}")

    def _refuse_foreign(self, data: dict) -> None:
        """Documents of mergekit's other tools, which share none of a recipe's keys."""
        if "genome" in data:
            raise RecipeError(
                f"{self.document.name}: a mergekit-evolve genome is not a recipe: it describes a search. Write the "
                "parameters that it found; `ctl-merge probe` tells which blocks and parents to change next"
            )
        if "experts" in data and "merge_method" in data:
            raise RecipeError(
                f"{self.document.name}, line {self.document.line(('merge_method',))}: `experts` make a mixture of "
                "experts, which has no `merge_method`: remove the line"
            )

    def _mixture(self, data: dict) -> Recipe:
        """A recipe of experts side by side."""
        found = MixtureChecker(self._ref, self.problems, self.warnings).check(data)
        if found is None:
            self._raise()
        assert found is not None
        schema, base, mixture = found
        refs = dict.fromkeys(expert.ref for expert in mixture.everyone)
        return Recipe(
            method=MIXTURE, models=tuple(map(Source, refs)), base=base, settings={}, dtype=schema.dtype,
            tokenizer=TokenizerSetting(), seed=schema.seed, missing="error",
            allow_nonfinite=schema.nonfinite == "allow", probe=None, data=None,
            text=self.document.text, name=self.document.name,
            warnings=tuple(dict.fromkeys(self.warnings)), steps=self.steps, mixture=mixture,
        )  # fmt: skip

    def _schema(self, data: dict) -> RecipeSchema | None:
        try:
            return RecipeSchema.model_validate(data)
        except ValidationError as error:
            problems = error.errors()
            for problem in [p for p in problems if _in_meant_form(p["loc"], data)] or problems:
                path = tuple(part for part in problem["loc"] if part not in _UNION_BRANCHES)
                self._schema_problem(path, problem["type"], problem["msg"], problem["input"])
            return None

    def _schema_problem(self, path: Path_, kind: str, message: str, value: Any) -> None:
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
            elif any(name in method.parameters for method in registry().values()):
                message = f"{name!r} is a parameter: write it under `parameters`"
        elif kind == "model_type" and (path[:1] == ("modules",) or "slices" in path) and "sources" not in path:
            message = f"`{'.'.join(map(str, path))}` is a mapping of {', '.join(_keys_at((*path, '')))}, not {value!r}"
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
            what = f"no merge method {name!r}{nearest(name, methods)}; there are: {known}"
            self.problems.append((("merge_method",), what))
        return methods.get(name) if isinstance(name, str) else None

    def _ref(self, path: Path_, raw: Any) -> ModelRef | None:
        lora = None
        if isinstance(raw, dict) and "model" in raw:
            raw, lora = raw["model"], raw.get("lora")
        text, adapter = _written(raw), _written(lora)
        if not isinstance(text, str) or not isinstance(adapter, str | None):
            return None  # the schema has said so
        try:
            ref = self._parse(text)
            return ref if adapter is None else ref.with_adapter(ModelRef.parse(adapter, self.folder))
        except CheckpointError as error:
            self.problems.append((path, str(error)))
            return None

    def _parse(self, text: str) -> ModelRef:
        step = next((name for name in self.steps if _is_step(text, name)), None)
        if step is None:
            return ModelRef.parse(text, self.folder)
        ref, adapter = ModelRef(step, step=step), text.partition("+")[2]
        return ref.with_adapter(ModelRef.parse(adapter, self.folder)) if adapter else ref

    def _sources(self, at: Path_, listed: Any, method: Method | None) -> list[Source]:
        found = []
        for index, raw in enumerate(listed if isinstance(listed, list) else []):
            if isinstance(raw, dict):
                ref = self._ref((*at, index, "model"), raw.get("model"))
                settings = self._settings(
                    (*at, index, "parameters"), raw.get("parameters"), method, per_model_only=True
                )
                span: Any = raw.get("layer_range")
                whole = isinstance(span, list) and len(span) == 2 and all(isinstance(place, int) for place in span)
                if ref:
                    texts = self._texts((*at, index, "data"), raw.get("data"))
                    found.append(Source(ref, settings, (span[0], span[1]) if whole else None, texts))
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
                self.warnings.append(_BASE_PARAMETERS)
            return self._apart(sources, base)
        if all(source.ref != base for source in sources):
            sources = [*sources, Source(base)]
        return sorted(sources, key=lambda source: source.ref != base) if method.base == "required" else sources

    def _apart(self, sources: list[Source], base: ModelRef) -> list[Source]:
        """The models whose task vectors count; the base's own, which is zero, where it is listed alone."""
        others = [source for source in sources if source.ref != base]
        if not others and sources:
            self.warnings.append(f"there is no model besides the base {base}: the output is the base")
        return others or sources[:1]

    def _complete(
        self, at: Path_, method: Method, sources: list[Source], shared: Mapping[str, Setting], base: ModelRef | None
    ) -> None:
        """What is missing as a whole: the base, models, required parameters. `at`: where the models are listed."""
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
            self.problems.append((at, f"{method.name} merges {wanted} {kind}; the recipe has {len(sources)}"))
        for parameter in method.parameters.values():
            self._require(at, parameter, sources, shared, base)

    def _require(
        self, at: Path_, parameter: Parameter, sources: list[Source], shared: Mapping[str, Setting],
        base: ModelRef | None,
    ) -> None:  # fmt: skip
        if not parameter.required or parameter.name in shared:
            return
        if not parameter.per_model:
            self.problems.append((("parameters",), f"the parameter `{parameter.name}` is missing"))
            return
        for index, source in enumerate(sources):
            if parameter.name not in source.settings:
                note = " (the base is an ordinary input of this method)" if source.ref == base else ""
                self.problems.append(
                    ((*at, index), f"the model {source.ref} has no `{parameter.name}`{note}: give it one")
                )


def _written(model: Any) -> Any:
    """A model's name and revision in one text."""
    if isinstance(model, dict):
        return f"{model.get('path')}@{model['revision']}" if model.get("revision") else model.get("path")
    return model


def _over(own: Mapping[str, Setting], outer: Mapping[str, Setting]) -> dict[str, Setting]:
    """Settings of a slice or module before those around it: what matches no filter falls through to them."""
    names = dict.fromkeys((*own, *outer))
    return {name: Setting(own.get(name, _NOTHING).choices + outer.get(name, _NOTHING).choices) for name in names}


_NOTHING = Setting(())


def _distinct(parts: Iterable[Slice]) -> tuple[Source, ...]:
    """Each model of the slices once, in order of appearance."""
    return tuple(Source(ref) for ref in dict.fromkeys(source.ref for part in parts for source in part.models))


def _keys_at(path: Path_) -> list[str]:
    """The keys that are known at the place of an unknown one."""
    holder = next((part for part in reversed(path[:-1]) if isinstance(part, str) and part in _BELOW), "modules")
    return list(_BELOW[holder].model_fields) + (list(ModelSchema.model_fields) if "model" in path else [])


_BELOW: Mapping[str, Any] = {
    "models": SourceSchema, "base_model": ModelSchema, "model": ModelSchema, "slices": SliceSchema,
    "sources": SliceSourceSchema, "modules": ModuleSchema, "probe": ProbeSchema,
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
