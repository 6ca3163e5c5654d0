"""Spherical linear interpolation between two models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor
from ctl_merge.methods.angles import cosine as angle_cosine
from ctl_merge.methods.angles import gram, whole_tensor
from ctl_merge.methods.combine import weighted_sum
from ctl_merge.methods.fused import Fused, summed
from ctl_merge.methods.registry import Measure, merge_method

# Above this cosine the arc and the chord are the same to rounding, and sin(angle) divides by almost nothing.
PARALLEL = 0.9995

Place = Annotated[FiniteFloat, Field(description="place between the base (0) and the other model (1)")]


def _count_fallbacks(results: Mapping[str, Mapping[str, Tensor]]) -> str:
    cosines = [float(result["cosine"]) for result in results.values() if result]
    fell_back = sum(abs(cos) > PARALLEL for cos in cosines)
    return (
        f"{fell_back} of {len(cosines)} tensors were interpolated linearly, as their angle is too small for an arc "
        f"(|cos| > {PARALLEL})"
    )


def _arc_factors(cos: float, t: float) -> np.ndarray:
    angle = math.acos(cos)
    return np.array([math.sin(share * angle) / math.sin(angle) for share in (1 - t, t)])


def _fused(*, t: float, cosine: np.ndarray, **_: object) -> Fused:
    cos = float(cosine)
    return Fused([1 - t, t], anchor=0) if abs(cos) > PARALLEL else summed(_arc_factors(cos, t))


@merge_method(
    space="weights",
    base="required",
    models=(2, 2),
    measures={"cosine": Measure(gram, angle_cosine, whole_tensor, compiled="gram")},
    report=_count_fallbacks,
    fused=_fused,
)
def slerp(tensors: Tensor, *, t: Place, cosine: Tensor | np.ndarray | None = None) -> Tensor:
    """The point at `t` on the arc from the base (t = 0) to the other model (t = 1), tensor by tensor.

    tensors (2, *shape), base first -> (*shape). `cosine`: of the angle between the two whole tensors; computed from
    `tensors` if not given. The angle is that of the normalised tensors, the combination is of the tensors themselves.
    Where |cos| > 0.9995, which is almost everywhere for finetunes of one base, it is linear interpolation.
    """
    if cosine is None:
        cosine = angle_cosine(gram(tensors).cpu(), tensors[0].numel())
    first, second = tensors
    cos = float(cosine)
    if abs(cos) > PARALLEL:
        return first + t * (second - first)
    return weighted_sum(tensors, _arc_factors(cos, t))
