"""Karcher mean: the mean direction on the sphere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor
from ctl_merge.methods.angles import cosines, gram, lengths, whole_tensor
from ctl_merge.methods.combine import safe_divisor, weighted_sum
from ctl_merge.methods.fused import Fused, summed
from ctl_merge.methods.registry import Measure, merge_method

MaxIter = Annotated[int, Field(ge=0, description="steps at most")]
Tolerance = Annotated[FiniteFloat, Field(ge=0, description="step length, in radians, that ends the iteration")]


def _mix(products: Any, numel: int, *, max_iter: int, tol: float, **_: object) -> np.ndarray:
    """What each tensor is multiplied with, then 1 if the last step was longer than `tol`: (models + 1,)."""
    products = np.asarray(products)
    norms = lengths(products)
    present = norms != 0  # a zero tensor has no direction, but counts in the mean length
    if not present.any():
        return np.zeros(len(norms) + 1)
    place, converged = _mean_direction(cosines(products)[present][:, present], max_iter, tol)
    factors = np.zeros_like(norms)
    factors[present] = place
    factors *= norms.mean() / safe_divisor(norms)
    return np.append(factors, float(not converged))


def _mean_direction(cos: np.ndarray, max_iter: int, tol: float) -> tuple[np.ndarray, bool]:
    """The Karcher mean of unit vectors as a combination of them, from their cosines: (models,), and if it is reached.

    Every iterate lies in the span of the inputs, so inner products tell all that the iteration needs.
    """

    def length(combination: np.ndarray) -> float:
        return math.sqrt(max(0.0, float(combination @ cos @ combination)))

    place = np.full_like(cos[0], 1 / len(cos))
    start = length(place)
    place = place / start if start >= tol and start > 0 else np.eye(len(cos))[0]
    for _ in range(max_iter):
        towards = (cos @ place).clip(-1.0, 1.0)
        angles = np.arccos(towards)
        # A vector where the mean is needs no step, and to one at the antipode no direction is the nearest.
        pulls = (angles > tol) & (angles < math.pi - tol)
        pull = np.where(pulls, angles / safe_divisor(np.sin(angles)), 0.0) / len(cos)
        tangent = pull - (pull @ towards) * place
        step = length(tangent)
        if step <= tol:
            return place, True
        place = math.cos(step) * place + (math.sin(step) / step) * tangent
        place = place / length(place)
    return place, False


def _count_unfinished(results: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    found = [bool(result["mix"][-1]) for result in results.values() if result]
    return f"{sum(found)} of {len(found)} tensors took all of `max_iter` steps" if any(found) else None


def _fused(*, mix: np.ndarray, **_: object) -> Fused:
    return summed(mix[:-1])


@merge_method(
    space="weights",
    base="optional",
    measures={"mix": Measure(gram, _mix, whole_tensor, compiled="gram")},
    fused=_fused,
    report=_count_unfinished,
    paper="2603.04972",
)
def karcher(
    tensors: Tensor, *, max_iter: MaxIter = 10, tol: Tolerance = 1e-5, mix: Tensor | np.ndarray | None = None
) -> Tensor:
    """The point of the sphere with the least sum of squared angles to the tensors' directions, times their mean length.

    tensors (models, *shape) -> (*shape). A base model that the recipe names is an ordinary input. Found by Riemannian
    gradient steps from the direction of the mean. Zero tensors have no direction. arXiv 2603.04972. `mix`: factors of
    the tensors, computed from `tensors` if not given.
    """
    if mix is None:
        mix = _mix(gram(tensors).cpu(), tensors[0].numel(), max_iter=max_iter, tol=tol)
    return weighted_sum(tensors, mix[:-1])
