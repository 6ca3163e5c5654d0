"""Recipe and headers, decided tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ctl_merge.architecture import ModuleMap, ties_embeddings
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.correspondence import Correspondence, correspond
from ctl_merge.errors import MismatchError
from ctl_merge.header import MERGEABLE, TensorSpec, dtype_code
from ctl_merge.layers import layer_places, natural
from ctl_merge.methods import Method, Parameter
from ctl_merge.model_config import vocab_size, with_changes
from ctl_merge.recipe import Recipe, Source
from ctl_merge.reference import ModelRef
from ctl_merge.restacked_config import Path
from ctl_merge.slices import Part, Stacked, cut
from ctl_merge.source_vocabularies import Table
from ctl_merge.token_rows import Input
from ctl_merge.vocabulary import OutputVocabulary, plan_vocabulary


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How one tensor of the output comes about."""

    name: str
    spec: TensorSpec  # of the output
    operation: Literal["merge", "copy"]
    inputs: tuple[Input, ...]  # of a copy: the one that is copied, then those that must equal it
    base: Input | None
    parameters: Mapping[str, Any]  # per-model ones as tuples in the order of `inputs`

    @property
    def everyone(self) -> tuple[Input, ...]:
        """Every model's part, the base's last."""
        return (*self.inputs, self.base) if self.base else self.inputs


@dataclass(frozen=True)
class Plan:
    """A merge, decided. `decisions` and `warnings` say in words what a reader should know."""

    recipe: Recipe
    tensors: Mapping[str, TensorPlan]
    tied: Mapping[str, str]  # output tensors that hold the same as another one where every input ties them
    decisions: tuple[str, ...]
    warnings: tuple[str, ...]
    vocabulary: OutputVocabulary = field(default_factory=OutputVocabulary)
    changes: Mapping[Path, object] = field(default_factory=dict)  # what the first model's config needs for the output

    @property
    def method(self) -> Method:
        return self.recipe.method

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The output's tensors, in the order of the layers."""
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    def fit(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The first model's config with the output's depth and vocabulary."""
        return self.vocabulary.fit(with_changes(config, self.changes))

    def settled(self, name: str, decision: str, leave: bool = False) -> Plan:
        """The plan with the open decision on a tensor replaced, now that the weights are known; `leave`: without it."""
        kept = {n: tensor for n, tensor in self.tensors.items() if not (leave and n == name)}
        others = tuple(line for line in self.decisions if not line.startswith(f"{name} is tied to "))
        return replace(self, tensors=kept, decisions=(*others, decision))


def make_plan(recipe: Recipe, checkpoints: Mapping[ModelRef, FileCheckpoint]) -> Plan:
    """Decide a merge from the headers of its checkpoints.

    Raises MismatchError where the checkpoints do not fit together, naming model, tensor and both values.
    """
    stacked = cut(recipe, checkpoints) if recipe.slices else Stacked((Part(recipe, checkpoints, None),))
    shared: dict[tuple, Mapping[str, Any]] = {}
    tensors: dict[str, TensorPlan] = {}
    tied: dict[str, str] = {}
    decisions, warnings = list(stacked.decisions), list(recipe.warnings)
    for checkpoint in checkpoints.values():
        decisions += checkpoint.decisions
        warnings += checkpoint.warnings
    matched = [(part, correspond(part.recipe, part.views)) for part in stacked.parts]
    tables = [table for _, found in matched for table in _tables(recipe, checkpoints, found)]
    vocabulary = plan_vocabulary(recipe, checkpoints, tables, vocab_size(checkpoints[recipe.refs[0]].config))
    for part, found in matched:
        config = part.views[part.recipe.refs[0]].config
        places = part.places or layer_places(found.inputs, config)
        builder = _Builder(part, found, vocabulary, places, shared)
        tensors |= {name: builder.tensor(name) for name in found.inputs}
        tied |= found.tied
        decisions += found.decisions
        warnings += found.warnings
    tensors = {name: tensors[name] for name in sorted(tensors, key=natural)}
    if len(stacked.parts) > 1:
        tied |= _ties_across(checkpoints[recipe.refs[0]].config, tensors)
    decisions += [*_texts(recipe), *vocabulary.decisions, *_dtype_decisions(recipe, tensors)]
    warnings += [*vocabulary.warnings, *_check_whole_model(recipe, tensors)]
    return Plan(
        recipe, tensors, tied, tuple(dict.fromkeys(decisions)), tuple(dict.fromkeys(warnings)), vocabulary,
        stacked.changes,
    )  # fmt: skip


def _tables(recipe: Recipe, checkpoints: Mapping[ModelRef, FileCheckpoint], found: Correspondence) -> Iterator[Table]:
    """The tables with one row a token, with the parts of all models of the recipe: tokens are decided for all slices.

    A model that does not go into a table's slice, and lacks it, counts as having the first one's.
    """
    for name, axis in found.axes.items():
        parts = {part.model: part for part in found.inputs[name].values()}
        first = next(iter(parts.values()))
        for ref in (ref for ref in recipe.refs if ref not in parts):
            parts[ref] = Input(ref, first.tensor) if first.tensor in checkpoints[ref].tensors else first
        parts = {ref: parts[ref] for ref in recipe.refs}
        shapes = {ref: checkpoints[part.model].tensors[part.tensor].shape for ref, part in parts.items()}
        shape = found.specs[name].shape
        rows = {ref: shape[axis] for ref, shape in shapes.items()}
        yield Table(name, parts, rows, math.prod(shape[:axis] + shape[axis + 1 :]))


def _ties_across(config: Mapping[str, Any], tensors: Mapping[str, TensorPlan]) -> dict[str, str]:
    """Tensors that the config ties although different slices give each of them."""
    if not ties_embeddings(config):
        return {}
    modules = ModuleMap(config)
    stored = {parameter: name for name, parameter in modules.parameters(tensors).items()}
    return {stored[t]: stored[s] for t, s in modules.tied().items() if t in stored and s in stored}


class _Builder:
    """Decides the tensors of one part. `shared`: parameter values so far, as most tensors have the same."""

    def __init__(
        self, part: Part, found: Correspondence, vocabulary: OutputVocabulary, places: Mapping[str, float],
        shared: dict[tuple, Mapping[str, Any]],
    ) -> None:  # fmt: skip
        self.recipe, self.found, self.vocabulary, self.places = part.recipe, found, vocabulary, places
        self._shared = shared

    def tensor(self, name: str) -> TensorPlan:
        recipe, first = self.recipe, self.recipe.refs[0]
        spec, everyone = self.found.specs[name], self.found.inputs[name]
        if name in self.vocabulary.sizes:
            maps, axis = self.vocabulary.rows[name], self.found.axes[name]
            everyone = {ref: replace(part, rows=maps.get(part.model)) for ref, part in everyone.items()}
            shape = (*spec.shape[:axis], self.vocabulary.sizes[name], *spec.shape[axis + 1 :])
            spec = TensorSpec(spec.dtype, shape)
        if name in self.found.computed:
            return TensorPlan(name, spec, "copy", (everyone[first],), None, {})
        self._check_dtypes(name)
        if spec.dtype not in MERGEABLE:
            others = tuple(part for ref, part in everyone.items() if ref != first)
            return TensorPlan(name, spec, "copy", (everyone[first], *others), None, {})
        if recipe.dtype:
            spec = TensorSpec(dtype_code(recipe.dtype), spec.shape)
        inputs = tuple(everyone[source.ref] for source in recipe.models)
        base = everyone[recipe.base] if recipe.base and recipe.method.space == "task_vectors" else None
        parameters = self._parameters(name, inputs)
        objection = recipe.method.check(parameters)
        if objection:
            raise MismatchError(f"{name}: {objection}")
        return TensorPlan(name, spec, "merge", inputs, base, parameters)

    def _check_dtypes(self, name: str) -> None:
        kinds = self.found.kinds[name]
        if len({kind if kind not in MERGEABLE else "float" for kind in kinds.values()}) > 1:
            listed = ", ".join(f"{ref}: {kind}" for ref, kind in kinds.items())
            raise MismatchError(f"{name} has dtypes that cannot be merged ({listed}): convert the odd one")
        low = {ref: kind for ref, kind in kinds.items() if kind.startswith("F") and kind not in MERGEABLE}
        quantised = next(iter(low), None)
        if quantised:
            raise MismatchError(f"{quantised}: {name} is quantised ({kinds[quantised]}): name the unquantised model")

    def _parameters(self, name: str, inputs: tuple[Input, ...]) -> Mapping[str, Any]:
        place = self.places.get(name, 0.0)
        values = {
            parameter.keyword: self._value(parameter, name, inputs, place)
            for parameter in self.recipe.method.parameters.values()
        }
        return self._shared.setdefault(tuple(values.items()), values)  # most tensors have the same: one dict for all

    def _value(self, parameter: Parameter, name: str, inputs: tuple[Input, ...], place: float) -> Any:
        if parameter.per_model:
            sources = zip(self.recipe.models, inputs, strict=True)
            return tuple(self._resolve(parameter, part.tensor, place, source) for source, part in sources)
        return self._resolve(parameter, name, place, None)

    def _resolve(self, parameter: Parameter, tensor: str, place: float, source: Source | None) -> Any:
        """The value by precedence: the model's own, the recipe's, the default."""
        for settings in (source.settings if source else {}, self.recipe.settings):
            setting = settings.get(parameter.name)
            if setting and setting.matches(tensor):
                return setting.at(tensor, place)
        if parameter.required:
            owner = f" of {source.ref}" if source else ""
            raise MismatchError(
                f"no filter of `{parameter.name}`{owner} matches the tensor {tensor}, and there is no default: "
                "add a last choice without a filter"
            )
        return parameter.default


def _texts(recipe: Recipe) -> list[str]:
    """What the method measures on text, in words."""
    if recipe.data is None:
        return []
    what = {"gram": "what linear layers read", "fisher": "squared gradients"}[str(recipe.method.statistic)]
    reader = {"base": f", by {recipe.base}", "merged": ", block by block behind what is merged", "expert": ""}
    sources = [source for part in recipe.slices for source in part.models] or recipe.models
    named = {s.ref: ", ".join(spec.name for spec in s.texts or recipe.texts) for s in sources}
    size = f"{recipe.data.sequences} windows of {recipe.data.length} tokens"
    listed = "; ".join(f"{ref} on {texts}" for ref, texts in named.items())
    return [f"{what} is measured on at most {size} of each text{reader[recipe.data.inputs]}: {listed}"]


def _dtype_decisions(recipe: Recipe, tensors: Mapping[str, TensorPlan]) -> list[str]:
    """What happens to dtypes, in words."""
    outputs = sorted({t.spec.dtype for t in tensors.values() if t.operation == "merge"})
    kept = "as asked for" if recipe.dtype else f"each tensor's own in {recipe.refs[0]}"
    copied = sum(t.operation == "copy" for t in tensors.values())
    found = [f"written as {', '.join(outputs)} ({kept})"] if outputs else []
    if copied:
        found.append(f"{copied} tensors that are not floating point are copied; all models must agree on them")
    return found


def _check_whole_model(recipe: Recipe, tensors: Mapping[str, TensorPlan]) -> list[str]:
    """Statistics of the whole model need parameters that are the same everywhere; warn of a trim that trims nothing."""
    merged = [tensor for tensor in tensors.values() if tensor.operation == "merge"]
    scopes = [recipe.method.scopes(tensor.parameters) for tensor in merged]
    if any("model" in scope.values() for scope in scopes) and len({id(t.parameters) for t in merged}) > 1:
        trim = "trim" in recipe.method.parameters
        raise MismatchError(
            f"a statistic of the whole model ({'`trim: model`' if trim else recipe.method.name}) needs parameters that "
            f"are the same for every tensor: remove gradients and filters{', or use `trim: tensor`' if trim else ''}"
        )
    density = recipe.method.parameters.get("density")
    if density and density.per_model and {d for tensor in merged for d in tensor.parameters["density"]} == {1.0}:
        return [
            f"`density` is 1.0 everywhere: {recipe.method.name} keeps every entry, so nothing is trimmed or dropped"
        ]
    return []


def parameter_ranges(plan: Plan) -> dict[str, Any]:
    """Each parameter's value, or its range where it varies over tensors; per-model ones as a list."""
    merged = [t for t in plan.tensors.values() if t.operation == "merge"]
    used = {(id(t.parameters), tuple(p.model for p in t.inputs)): t for t in merged}.values()
    found: dict[str, Any] = {}
    for name, parameter in plan.method.parameters.items():
        values = [t.parameters[parameter.keyword] for t in used]
        if not parameter.per_model:
            columns = [tuple(values)]
        elif not plan.recipe.slices:
            columns = list(zip(*values, strict=True))
        else:  # not every model goes into every slice
            pairs = [
                (p.model, v) for t, own in zip(used, values, strict=True) for p, v in zip(t.inputs, own, strict=True)
            ]
            columns = [tuple(v for ref, v in pairs if ref == source.ref) for source in plan.recipe.models]
        described = [_range(column) if column else None for column in columns]
        found[name] = described if parameter.per_model else described[0] if described else None
    return found


def _range(values: tuple[Any, ...]) -> Any:
    distinct = sorted(set(values), key=str)
    if len(distinct) == 1:
        return distinct[0]
    numbers = [v for v in values if isinstance(v, int | float)]
    return f"{min(numbers):g} to {max(numbers):g}" if numbers else ", ".join(map(str, distinct))
