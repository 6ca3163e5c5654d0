"""The recipe checker: a document in, every problem at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ctl_merge.document import Document
from ctl_merge.errors import CheckpointError, DataError, RecipeError
from ctl_merge.methods import Method, registry
from ctl_merge.mixture import METHOD as MIXTURE
from ctl_merge.moe_schema import MixtureChecker
from ctl_merge.probing.rows import DataSpec
from ctl_merge.problems import Place, Problems, nearest
from ctl_merge.recipe import Recipe, Slice, Source
from ctl_merge.recipe_inputs import InputChecker
from ctl_merge.recipe_schema import DataSchema, LoraSchema, RecipeSchema
from ctl_merge.recipe_tokenizer import TokenizerChecker, TokenizerSetting
from ctl_merge.recipe_words import schema_problems
from ctl_merge.reference import ModelRef
from ctl_merge.settings import Setting, parse_setting

# mergekit reads it for the dtype of its masks only; the merged weights do not depend on it.
_WITHOUT_EFFECT = {"int8_mask": "`int8_mask` concerns mergekit's memory use only and has no effect here"}


def is_step(value: Any, name: str) -> bool:
    """Whether a model is written as a step: by its name, or by the folder in which mergekit would have left it."""
    if not isinstance(value, str):
        return False
    model = value.partition("+")[0]  # without an adapter
    left = model.startswith(("./", "../")) and Path(model).name == name and not Path(model).exists()
    return model == name or left


class RecipeChecker:
    """Collects the problems of one document, then either raises them all or gives the recipe."""

    def __init__(self, document: Document, folder: Path | None, steps: Mapping[str, Recipe] | None = None) -> None:
        self.document, self.folder, self.steps = document, folder, steps or {}
        self.problems: Problems = []
        self.warnings: list[str] = []
        self.inputs = InputChecker(self.problems, self.warnings)

    def recipe(self) -> Recipe:
        """The recipe. Raises RecipeError with every problem and its line."""
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
        lora = self._lora(schema, parts)
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
            slices=() if whole else tuple(parts), steps=self.steps, lora=lora, place=self.folder,
        )  # fmt: skip

    def _lora(self, schema: RecipeSchema | None, parts: Sequence[Slice]) -> LoraSchema | None:
        """How an adapter is written, where one is: whole models are merged then, and steps are not written."""
        for name, step in self.steps.items():
            if step.lora:
                self.problems.append(((), f"the step {name!r} has an `output`, but no step is written: remove it"))
        lora = schema.output.lora if schema and schema.output else None
        if lora and any(part.module is not None or part.layers is not None for part in parts):
            self.problems.append((("output",), "an adapter fits one model: `output: lora` takes `models`, whole"))
        return lora

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

    def _texts(self, at: Place, raw: Any) -> tuple[DataSpec, ...]:
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

    def _one_layout(self, path: Place, holder: dict, keys: tuple[str, ...]) -> None:
        given = [key for key in keys if holder.get(key) is not None]
        if len(given) != 1:
            what = " and ".join(f"`{key}`" for key in given) or "none of them"
            listed = ", ".join(f"`{key}`" for key in keys)
            self.problems.append(((*path, *given[1:2]), f"give one of {listed}; there is {what}"))

    def _slices(
        self, path: Place, holder: dict, module: str | None, method: Method | None, base: ModelRef | None,
        shared: Mapping[str, Setting],
    ) -> Iterator[Slice]:  # fmt: skip
        listed, slices = holder.get("models"), holder.get("slices")
        if isinstance(listed, list):
            at = (*path, "models")
            sources = self._sources(at, listed, method)
            if method and len(sources) == len(listed) > 0 and (base or not self.document.data.get("base_model")):
                sources = self.inputs.whole(method, sources, base)
                self.inputs.complete(at, method, sources, shared, base)
                apart = method.space == "task_vectors"
                yield Slice(tuple(sources), Source(base) if base and apart else None, shared, module)
        for index, raw in enumerate(slices if isinstance(slices, list) else []):
            if isinstance(raw, dict):
                found = self._slice((*path, "slices", index), raw, module, method, base, shared)
                yield from [found] if found else []

    def _slice(
        self, path: Place, raw: dict, module: str | None, method: Method | None, base: ModelRef | None,
        shared: Mapping[str, Setting],
    ) -> Slice | None:  # fmt: skip
        at = (*path, "sources")
        listed: Any = raw.get("sources")
        sources = self._sources(at, listed, method)
        own = self._settings((*path, "parameters"), raw.get("parameters"), method, per_model_only=False)
        base = self._ref((*path, "base_model"), raw.get("base_model")) or base
        if method and method.base == "none" and raw.get("base_model") is not None:
            self.problems.append(((*path, "base_model"), f"a slice of {method.name} has no `base_model`: remove it"))
        if not method or not isinstance(listed, list) or len(sources) < len(listed) or not sources:
            return None
        spans = [source.layers for source in sources if source.layers]
        lengths = sorted({end - first for first, end in spans})
        if len(spans) < len(sources):
            return None  # the schema has said what is wrong with a layer_range
        if len(lengths) > 1 or lengths[0] <= 0 or min(spans)[0] < 0:
            told = ", ".join(f"[{first}, {end}]" for first, end in spans)
            why = "all sources of a slice have as many layers" if len(lengths) > 1 else "[first, end) holds no layer"
            why = "layers are counted from 0" if min(spans)[0] < 0 else why
            self.problems.append((at, f"layer_range {told}: {why}"))
            return None
        kept, taken = self.inputs.of_slice(at, method, sources, base)
        settings = _over(own, shared)
        self.inputs.complete(at, method, kept, settings, base)
        return Slice(tuple(kept), taken, settings, module)

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
            warnings=tuple(dict.fromkeys(self.warnings)), steps=self.steps, mixture=mixture, place=self.folder,
        )  # fmt: skip

    def _schema(self, data: dict) -> RecipeSchema | None:
        try:
            return RecipeSchema.model_validate(data)
        except ValidationError as error:
            self.problems += schema_problems(error, data)
            return None

    def _method(self, data: dict) -> Method | None:
        name, methods = data.get("merge_method"), registry()
        if isinstance(name, str) and name not in methods:
            known = ", ".join(sorted(methods))
            what = f"no merge method {name!r}{nearest(name, methods)}; there are: {known}"
            self.problems.append((("merge_method",), what))
        return methods.get(name) if isinstance(name, str) else None

    def _ref(self, path: Place, raw: Any) -> ModelRef | None:
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
            step = ". If another recipe makes it, put that before this one in the file, with a `name` and `---` between"
            self.problems.append((path, f"{error}{step if text.startswith(('./', '../')) else ''}"))
            return None

    def _parse(self, text: str) -> ModelRef:
        step = next((name for name in self.steps if is_step(text, name)), None)
        if step is None:
            return ModelRef.parse(text, self.folder)
        ref, adapter = ModelRef(step, step=step), text.partition("+")[2]
        return ref.with_adapter(ModelRef.parse(adapter, self.folder)) if adapter else ref

    def _sources(self, at: Place, listed: Any, method: Method | None) -> list[Source]:
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

    def _settings(self, path: Place, raw: Any, method: Method | None, *, per_model_only: bool) -> dict[str, Setting]:
        if method is None or not isinstance(raw, dict):
            return {}
        found = {}
        for name, value in raw.items():
            parameter = method.parameters.get(name)
            if parameter is None and name in _WITHOUT_EFFECT:
                self.warnings.append(_WITHOUT_EFFECT[name])
            elif parameter is None:
                has = f"it has {', '.join(method.parameters)}" if method.parameters else "it has none"
                hint = nearest(str(name), method.parameters) or f": remove it ({has})"
                self.problems.append(((*path, name), f"{method.name} has no parameter {name!r}{hint}"))
            elif per_model_only and not parameter.per_model:
                self.problems.append(
                    ((*path, name), f"{name!r} is shared by all models: move it to the recipe's own `parameters`")
                )
            else:
                below: Problems = []
                setting = parse_setting(value, parameter, below)
                self.problems += [((*path, name, *at), message) for at, message in below]
                found[name] = setting or Setting(())  # a wrong value is not a missing one
        return found


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
