"""mergekit's methods: the parameters that configurations draw, and how both results are judged. One row a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

REQUIRED = object()
Draw = Callable[[Random], Any]


@dataclass(frozen=True)
class Knob:
    """A parameter. `own`: each model has a value of its own; `whole`: a whole number, of which there is no gradient."""

    draw: Draw
    default: Any = REQUIRED
    own: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Spec:
    """A method. `models`: how many besides a base; `base`: `origin` (what task vectors are differences from, or an end
    of the arc), `maybe` (the same, if a base is given), `input` (a base that is given is an ordinary input), `none`.

    `slack`: how many units of float32 (2⁻²⁴ of the largest operand) float32 arithmetic may be off; `norms`: it takes
    norms of whole tensors, whose error in float32 grows with the number of entries; `arcs`: and arc cosines, whose
    error grows with one over the angle. `random`: compared in distribution.
    """

    knobs: Mapping[str, Knob] = field(default_factory=dict)
    models: tuple[int, int] = (2, 4)
    base: Literal["origin", "maybe", "input", "none"] = "origin"
    slack: float = 32.0
    norms: bool = False
    arcs: bool = False
    random: bool = False


def between(low: float, high: float) -> Draw:
    """Mostly four digits; now and then one digit, as people write."""
    return lambda rng: round(rng.uniform(low, high), rng.choice((4, 4, 4, 1)))


def one_of(*values: Any) -> Draw:
    return lambda rng: rng.choice(values)


def _weight(rng: Random) -> float:
    """Positive, seldom negative; those have a fifth digit, so that weights do not cancel."""
    found = _positive(rng)
    return -(found + 3e-5) if rng.random() < 0.07 else found


def _positive(rng: Random) -> float:
    return round(rng.uniform(0.2, 1.4), rng.choice((4, 4, 1)))


def _density(rng: Random) -> float:
    return rng.choice((1.0, 0.0)) if rng.random() < 0.08 else round(rng.uniform(0.05, 0.95), rng.choice((3, 1)))


_FLAG = one_of(True, False)
WEIGHT = {"weight": Knob(_weight, own=True)}
_POSITIVE = {"weight": Knob(_positive, own=True)}
LAMBDA = {"lambda": Knob(between(0.3, 1.6), 1.0)}
DENSITY = {"density": Knob(_density, 1.0, own=True)}


def _normalize(default: bool) -> dict[str, Knob]:
    return {"normalize": Knob(_FLAG, default)}


_CRUMBS = {"gamma": Knob(between(0.0, 0.2), 0.01, own=True), "rescale": Knob(_FLAG, False)}
_SOME_DENSITY = {"density": Knob(lambda rng: round(rng.uniform(0.3, 0.7), 3), 1.0, own=True)}
_EPSILON = {"epsilon": Knob(lambda rng: round(rng.uniform(0.05, 0.2), 3), 0.15, own=True)}
_RESCALE = {"rescale": Knob(_FLAG, True)}
_RAM = {"epsilon": Knob(one_of(1e-5, 1e-4, 1e-3, "1e-3"), 1e-5)}
_TIES = {**WEIGHT, **DENSITY, **LAMBDA}
_DARE = {**WEIGHT, **_SOME_DENSITY, **LAMBDA, **_RESCALE, **_normalize(False)}

METHODS: Mapping[str, Spec] = {
    "linear": Spec({**_POSITIVE, **_normalize(True)}, models=(1, 4), base="input"),
    "passthrough": Spec({"scale": Knob(between(-1.5, 1.5), 1.0, own=True)}, models=(1, 1), base="none"),
    "slerp": Spec({"t": Knob(between(0.0, 1.0))}, models=(1, 1), slack=64.0, norms=True),
    "nuslerp": Spec(
        {**_POSITIVE, "nuslerp_flatten": Knob(_FLAG, True), "nuslerp_row_wise": Knob(_FLAG, False)},
        models=(2, 2), base="maybe", slack=64.0, norms=True,
    ),
    "multislerp": Spec(
        {**_POSITIVE, "normalize_weights": Knob(_FLAG, True), "eps": Knob(one_of(1e-8, "1e-6"), 1e-8)},
        base="maybe", slack=64.0, norms=True,
    ),
    "karcher": Spec(
        {"max_iter": Knob(one_of(1, 5, 10, 20), 10, whole=True), "tol": Knob(one_of(1e-5, "1e-7"), 1e-5)},
        base="input", slack=64.0, norms=True, arcs=True,
    ),
    "task_arithmetic": Spec({**WEIGHT, **LAMBDA, **_normalize(False)}, models=(1, 4)),
    "ties": Spec({**_TIES, **_normalize(True), "rescale": Knob(_FLAG, False)}, models=(1, 4)),
    "breadcrumbs": Spec({**_TIES, **_CRUMBS, **_normalize(False)}, models=(1, 4)),
    "breadcrumbs_ties": Spec({**_TIES, **_CRUMBS, **_normalize(False)}, models=(1, 4)),
    "sce": Spec({"select_topk": Knob(between(0.1, 1.0), 1.0)}, models=(1, 4)),
    "ram": Spec(_RAM, models=(1, 4)),
    "ramplus_tl": Spec(
        {**_RAM, "r": Knob(between(0.0, 0.5), 0.1), "alpha": Knob(between(0.0, 0.5), 0.2)}, models=(1, 4)
    ),
    "model_stock": Spec({"filter_wise": Knob(_FLAG, False)}, models=(2, 4), slack=64.0, norms=True),
    "nearswap": Spec({"t": Knob(one_of(1e-4, 1e-3, "3e-3", 0.01))}, models=(1, 1)),
    "arcee_fusion": Spec(models=(1, 1)),
    "dare_linear": Spec(_DARE, models=(1, 3), random=True),
    "dare_ties": Spec(_DARE, models=(1, 3), random=True),
    "della": Spec({**_DARE, **_normalize(True), **_EPSILON}, models=(1, 3), random=True),
    "della_linear": Spec({**_DARE, **_EPSILON}, models=(1, 3), random=True),
}  # fmt: skip
