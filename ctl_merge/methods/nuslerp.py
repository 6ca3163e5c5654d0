"""NuSLERP: the arc between two weighted models or task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ctl_merge.deferred import Tensor, library, torch
from ctl_merge.methods.angles import cosine as angle_cosine
from ctl_merge.methods.angles import cosines, gram, whole_tensor
from ctl_merge.methods.combine import weighted_sum
from ctl_merge.methods.fused import Fused, summed
from ctl_merge.methods.parameters import Parameters, PerModel, Weight
from ctl_merge.methods.registry import Grain, Measure, Scope, merge_method

# sin² of the angle below which there is a straight line. Towards 0 arc and chord are the same to rounding long before;
# towards 180° no arc is the shortest, and one over the sine would enlarge the rounding of the cosine without bound.
COLLINEAR = 1e-12
_NO_WEIGHT = 1e-6  # mergekit's: where the weights sum to less, both count the same

Flatten = Annotated[bool, Field(description="one angle a tensor; false: one for every vector of the last dimension")]
RowWise = Annotated[bool, Field(description="without flattening, vectors of the first dimension, not the last")]


def arc_factors(cos: Any, t: float) -> tuple[Any, Any]:
    """What both ends of an arc are multiplied with at place t: cos (*shape) of the angle -> two of (*shape)."""
    own, straight = library(cos), 1 - cos * cos <= COLLINEAR
    angle = own.arccos(own.where(straight, 0.0, cos))
    first, second = (own.sin(share * angle) / own.sin(angle) for share in (1 - t, t))
    return own.where(straight, 1 - t, first), own.where(straight, t, second)


def _grain(parameters: Parameters) -> Grain:
    if parameters["nuslerp_flatten"]:
        return "element"
    return "tensor" if parameters["nuslerp_row_wise"] else "row"


def _scope(parameters: Parameters) -> Scope | None:
    return whole_tensor(parameters) if parameters["nuslerp_flatten"] else None


def _count_straight(results: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    found = [float(result["cosine"]) for result in results.values() if result]
    straight = sum(1 - cos * cos <= COLLINEAR for cos in found)
    return f"{straight} of {len(found)} tensors were interpolated linearly, as they are parallel" if straight else None


def _place(weight: Tensor | np.ndarray) -> float:
    weights = weight.flatten().tolist()
    total = sum(weights)
    return 0.5 if abs(total) < _NO_WEIGHT else weights[1] / total


def _fused(*, weight: np.ndarray, cosine: np.ndarray, **_: object) -> Fused:
    return summed(np.stack(arc_factors(cosine, _place(weight))))


@merge_method(
    space="task_vectors",
    base="optional",
    models=(2, 2),
    grain=_grain,
    measures={"cosine": Measure(gram, angle_cosine, _scope, compiled="gram")},
    report=_count_straight,
    fused=_fused,
)
def nuslerp(
    tensors: Tensor,
    *,
    weight: PerModel[Weight],
    nuslerp_flatten: Flatten = True,
    nuslerp_row_wise: RowWise = False,
    cosine: Tensor | np.ndarray | None = None,
) -> Tensor:
    """The point on the arc between two task vectors, or two models without a base, at w_1 / (w_0 + w_1).

    tensors (2, *shape), weight (2, 1, ...) -> (*shape). `cosine` as in `slerp`. Without `nuslerp_flatten` each vector
    along the last dimension (a row of a matrix) has its own angle; `nuslerp_row_wise` takes those along the first (a
    column of a matrix): the name is mergekit's. Parallel and opposite tensors are interpolated linearly; weights that
    sum to zero count the same.
    """
    first, second = tensors
    if not nuslerp_flatten:
        along = _cosines_along(first, second, 0 if nuslerp_row_wise else -1)
        of_first, of_second = arc_factors(along, _place(weight))
        return (first * of_first).add_(second * of_second)
    if cosine is None:
        cosine = angle_cosine(gram(tensors).cpu(), first.numel())
    return weighted_sum(tensors, np.stack(arc_factors(np.array(float(cosine)), _place(weight))))


def _cosines_along(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Cosines between the vectors along a dimension, which is kept with size 1."""
    pairs = ((first, first), (first, second), (second, second))
    squared, mixed, other = ((a * b).sum(dim, keepdim=True) for a, b in pairs)
    products = torch.stack([torch.stack([squared, mixed]), torch.stack([mixed, other])])
    return cosines(products)[0, 1]
