"""KnOTS: task vectors merged in their joint SVD's basis."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.agreement import merge_agreeing
from ctl_merge.methods.combine import cancel, weighted_sum
from ctl_merge.methods.matrices import leading, matrix_by_matrix, rounding
from ctl_merge.methods.parameters import Density, Parameters, PerModel, Scale, Weight
from ctl_merge.methods.registry import merge_method
from ctl_merge.methods.sparsify import trim
from ctl_merge.methods.ties import Divide, Elect

Inner = Annotated[
    Literal["ties", "linear"],
    Field(description="how the coordinates are merged: TIES, or their weighted sum or mean"),
]


def _weights_cancel(parameters: Parameters) -> str | None:
    """The objection to a weighted mean of weights that sum to zero."""
    mean = parameters["inner"] == "linear" and parameters["divide"] == "weights"
    if mean and cancel(parameters["weight"]):
        return "the weights sum to zero, and `divide: weights` divides by their sum: change a weight"
    return None


@merge_method(space="task_vectors", grain="tensor", check=_weights_cancel, paper="2410.19735")
def knots(
    deltas: Tensor, *, weight: PerModel[Weight] = 1.0, density: PerModel[Density] = 1.0, inner: Inner = "ties",
    elect: Elect = "unweighted", divide: Divide = "count", lambda_: Scale = 1.0,
) -> Tensor:  # fmt: skip
    """Merge the task vectors by TIES in the basis that one SVD of them all gives, then go back.

    deltas (models, *shape), weight and density (models, 1, ...) -> (*shape). Of matrices side by side,
    [d_1 … d_n] = U S [V_1 … V_n]ᵀ: the coordinates S V_iᵀ of each task vector are merged, and multiplied by U. Defaults
    are the paper's (arXiv 2410.19735). `density`: share of the coordinates of each matrix that is kept; `elect` and
    `divide` as `ties` has them. A model of weight zero does not enter the SVD. What is no matrix is merged as it is;
    matrices that are stored as one tensor one by one. With `inner: linear` the basis makes no difference. Takes one
    exact float64 SVD of (rows, models · columns), and some ten times the matrices in memory.
    """
    used = weight.flatten() != 0
    if not bool(used.any()):
        return torch.zeros_like(deltas[0])

    def merge(stack: Tensor) -> Tensor:
        return _merge(stack, weight.flatten()[used], density.flatten()[used], inner, elect, divide)

    deltas = deltas[used.to(deltas.device)]
    matrices = deltas.ndim in (3, 4)
    merged = matrix_by_matrix(deltas, partial(_in_joint_basis, merge=merge)) if matrices else merge(deltas)
    return lambda_ * merged


def _in_joint_basis(deltas: Tensor, merge: Callable[[Tensor], Tensor]) -> Tensor:
    models, rows, columns = deltas.shape
    side_by_side = deltas.transpose(0, 1).reshape(rows, models * columns)
    floor = rounding(deltas)
    joint = leading(side_by_side, min(side_by_side.shape), floor)
    coordinates = (joint.right * joint.values).T.reshape(-1, models, columns).transpose(0, 1)
    # What a task vector does not have of a direction is rounding, and would be counted as agreeing.
    return joint.left @ merge(torch.nn.functional.hardshrink(coordinates, floor))


def _merge(stack: Tensor, weights: Tensor, densities: Tensor, inner: str, elect: str, divide: str) -> Tensor:
    """One of the inner methods on a stack (models, *shape), all entries of which are alike."""
    flat, weight = stack.flatten(1) if stack.ndim > 1 else stack.view(-1, 1), weights.view(-1, 1)
    kept = trim(flat, densities.view(-1, 1), None)
    if inner == "ties":
        return merge_agreeing(kept, weight, elect=elect, divide=divide).view(stack.shape[1:])
    divisor = {"weights": float(weight.sum()), "count": float(len(stack)), "none": 1.0}[divide]
    return weighted_sum(kept, weight / divisor).view(stack.shape[1:])
