"""The table of methods, filled in by `@merge_method`.

Third parties add methods through the entry-point group `ctl_merge.methods`: the entry point names a module that uses
the decorator.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import TypeAdapter

from ctl_merge.deferred import Tensor
from ctl_merge.errors import RecipeError
from ctl_merge.methods.parameters import PER_MODEL, Parameter, Parameters

Scope = Literal["tensor", "model"]
Grain = Literal["element", "row", "tensor"]
Statistic = Literal["gram", "fisher"]
Loop = Literal["count_upper", "count_lower", "gram", "energy"]


@dataclass(frozen=True)
class Measure:
    """A statistic of more than one chunk: a map over chunks, summed, then concluded.

    `accumulate(tensors, **arguments) -> Tensor` maps a chunk, shaped as the method gets it, to an additive state;
    states are summed over all chunks of the scope, in a fixed order. `conclude(state, numel, **arguments)` turns the
    sum into the value, a tensor or an array, that the method receives as a tensor under the measure's name. Both
    receive the method's parameters and the results of the measures before it, as keywords; all are arrays where the
    state is one, of a compiled loop. `scope(parameters)` says over what the sum runs;
    None: not needed.
    """

    accumulate: Callable[..., Tensor]
    conclude: Callable[..., Tensor | np.ndarray]
    scope: Callable[[Parameters], Scope | None]
    state: tuple[int, ...] = ()  # shape of a model's part of the state, where it is worth counting: of int64
    # The compiled loop that does the same, maybe for some parameters only.
    compiled: Loop | Callable[[Parameters], Loop | None] | None = None

    def loop(self, parameters: Parameters) -> Loop | None:
        """The compiled loop that does the same with these parameters."""
        return self.compiled(parameters) if callable(self.compiled) else self.compiled

    @property
    def state_bytes(self) -> int:
        """Of a model's part of the state."""
        return 8 * math.prod(self.state) if self.state else 0

    def zeros(self, models: int) -> np.ndarray:
        """The state before a compiled loop has counted anything."""
        return np.zeros((models, *self.state), np.int64)


@dataclass(frozen=True)
class Method:
    """One row of the registry."""

    name: str
    function: Callable[..., Tensor]
    space: Literal["weights", "task_vectors"]
    base: Literal["required", "optional", "none"]
    models: tuple[int, int | None]  # least and most tensors in the stack
    random: bool  # takes `noise`, uniform in [0, 1), one number per entry
    measures: Mapping[str, Measure]
    parameters: Mapping[str, Parameter]
    check: Callable[[Parameters], str | None]
    report: Callable[[Mapping[str, Mapping[str, Tensor]]], str | None] | None
    paper: str | None
    grain: Grain | Callable[[Parameters], Grain] = "element"
    statistic: Statistic | None = None  # taken of each model on its own text, and passed under this name
    fused: Callable[..., Any] | None = None  # the same as numbers for a compiled loop: `ctl_merge.methods.fused`
    linear: bool = False  # the result is Σ c x, its c the same whatever the stack, but for what is measured
    summary: str = field(default="")

    def grain_for(self, parameters: Parameters) -> Grain:
        """On what the method may be called with these parameters."""
        return self.grain(parameters) if callable(self.grain) else self.grain

    def scopes(self, parameters: Parameters) -> dict[str, Scope]:
        """The measures that these parameters call for, each with its scope, in the order in which they are taken."""
        found = {name: measure.scope(parameters) for name, measure in self.measures.items()}
        return {name: scope for name, scope in found.items() if scope is not None}


_REGISTRY: dict[str, Method] = {}
_ENTRY_POINTS = "ctl_merge.methods"


def no_objection(parameters: Parameters) -> str | None:
    """The check of a method whose parameters need none beyond their types."""
    return None


def merge_method(
    *,
    space: Literal["weights", "task_vectors"],
    base: Literal["required", "optional", "none"] | None = None,
    models: tuple[int, int | None] = (1, None),
    grain: Grain | Callable[[Parameters], Grain] = "element",
    statistic: Statistic | None = None,
    linear: bool = False,
    measures: Mapping[str, Measure] | None = None,
    check: Callable[[Parameters], str | None] = no_objection,
    report: Callable[[Mapping[str, Mapping[str, Tensor]]], str | None] | None = None,
    fused: Callable[..., Any] | None = None,
    paper: str | None = None,
    name: str | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a pure function of stacked float64 tensors as a merge method, and return it unchanged.

    The first argument is the stack (models, *shape): of task vectors (x_i - base) if `space` says so, the engine then
    adds the base to the result; else of weights, the base first if the method requires one. A method of task vectors
    whose base is optional receives the weights themselves where the recipe names none. Keyword-only arguments are
    the parameters; `noise` and the measures' names are filled in by the engine. `grain` says on what it may be called:
    any chunk of a tensor's entries; whole rows (models, rows, width), a row being the last axis, all of a vector, or a
    number; or only whole tensors; a function of the parameters where it depends on them. `statistic`: what the engine
    measures of each model on its own text and passes under that name (None for tensors that have none): "gram", the
    mean of x xᵀ over the inputs x of a linear layer, (models, in, in), the layer's weight then being (models, out, in);
    "fisher", the mean squared gradient, as large as the stack. `linear`: the result is Σ c_i x_i entry by entry, with
    factors that depend on the parameters and the measures alone. `check(parameters)` returns an objection or None;
    `report(results of the measures by tensor)` what a reader of the manifest should know, or None;
    `fused(parameters and results of measures)` the same merge for the compiled loop, as a `Fused`, or None.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        key = name or function.__name__
        if key in _REGISTRY:
            raise ValueError(f"merge method {key!r} is registered twice")
        keywords = inspect.signature(function).parameters
        engine_made = {"noise", "gram", "fisher", *(measures or {})}
        _REGISTRY[key] = Method(
            name=key, function=function, space=space, grain=grain, models=models, paper=paper, check=check,
            report=report, statistic=statistic, linear=linear, fused=fused,
            base=base or ("required" if space == "task_vectors" else "none"),
            random="noise" in keywords, measures=measures or {},
            parameters={p.name: p for p in _declared(function) if p.name not in engine_made},
            summary=(inspect.getdoc(function) or "").partition("\n")[0],
        )  # fmt: skip
        return function

    return register


def _declared(function: Callable[..., Tensor]) -> list[Parameter]:
    hints = get_type_hints(function, include_extras=True)
    found = []
    for keyword in inspect.signature(function).parameters.values():
        if keyword.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints[keyword.name]
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        found.append(
            Parameter(
                name="lambda" if keyword.name == "lambda_" else keyword.name,
                type=hint,
                default=Parameter.REQUIRED if keyword.default is keyword.empty else keyword.default,
                per_model=PER_MODEL in marks,
                description=_description(hint),
            )
        )
    return found


def _description(hint: Any) -> str:
    try:
        return TypeAdapter(hint).json_schema().get("description", "")
    except Exception:  # a Tensor, which the engine fills in: no schema, and none needed
        return ""


def registry() -> Mapping[str, Method]:
    """All merge methods by name: the built-in ones and those of installed entry points."""
    from ctl_merge.methods import builtin  # noqa: F401  fills the table

    _load_plugins()
    return _REGISTRY


@cache
def _load_plugins() -> None:
    for point in entry_points(group=_ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            raise RecipeError(
                f"the installed plugin {point.name!r} ({point.value}) does not load: {error}. "
                "Update or uninstall the package that provides it."
            ) from error
