"""Task singular vectors: leading singular triples, decorrelated."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.matrices import leading, matrix_by_matrix, orthogonalized, rounding
from ctl_merge.methods.parameters import Scale
from ctl_merge.methods.registry import merge_method

Count = Annotated[
    int | None, Field(ge=1, description="singular triples a task vector; min(rows, columns) / models if unset")
]


@merge_method(space="task_vectors", grain="tensor", paper="2412.00081")
def tsv(deltas: Tensor, *, k: Count = None, lambda_: Scale = 1.0) -> Tensor:
    """Sum of the leading singular triples of each task vector, after their vectors are made orthogonal to each other.

    deltas (models, *shape) -> (*shape). Of each matrix d_i = U_i S_i V_iᵀ the k largest triples are kept; all U_i side
    by side are replaced by their polar factor, all V_i likewise: λ U S Vᵀ. arXiv 2412.00081. What is no matrix is
    averaged (see `matrix_by_matrix`), and so is a matrix with fewer rows or columns than there are task vectors.
    Singular values of zero have no vectors, and those that equal the k-th are all kept. Takes one exact float64 SVD
    for each task vector and two more, and fifteen times the matrix in memory: of 2048 × 2048 four seconds each on a CPU
    core, eight times as long for twice the sides.
    """
    return lambda_ * matrix_by_matrix(deltas, partial(_merge, k=k))


def _merge(deltas: Tensor, k: int | None) -> Tensor:
    most = min(deltas.shape[1:]) // len(deltas) if k is None else k
    if most == 0:
        return deltas.mean(0)
    floor = rounding(deltas)
    tasks = [leading(delta, most, floor) for delta in deltas]
    left = orthogonalized(torch.cat([task.left for task in tasks], dim=1))
    right = orthogonalized(torch.cat([task.right for task in tasks], dim=1))
    return (left * torch.cat([task.values for task in tasks])) @ right.T
