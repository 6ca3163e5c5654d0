"""Isotropic merging: the merged task vector with a flat spectrum."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.matrices import Triples, leading, matrix_by_matrix, orthogonalized, rounding
from ctl_merge.methods.parameters import Fraction, Scale
from ctl_merge.methods.registry import merge_method

Common = Annotated[Fraction, Field(description="share of the singular directions that is taken from the sum")]


@merge_method(space="task_vectors", grain="tensor", paper="2502.04959")
def iso_c(deltas: Tensor, *, lambda_: Scale = 1.0) -> Tensor:
    """The sum of the task vectors with all its singular values replaced by their mean.

    deltas (models, *shape) -> (*shape). Singular values that are zero stay so and do not enter the mean. What is no
    matrix is averaged (see `matrix_by_matrix`). Takes one exact float64 SVD, and eight times the matrix in memory.
    arXiv 2502.04959.
    """
    return lambda_ * matrix_by_matrix(deltas, _merge_common)


@merge_method(space="task_vectors", grain="tensor", paper="2502.04959")
def iso_cts(deltas: Tensor, *, common_space_fraction: Common = 0.8, lambda_: Scale = 1.0) -> Tensor:
    """`iso_c` whose least singular directions give place to the leading ones of each task vector's remainder.

    deltas (models, *shape) -> (*shape). The remainder is what a task vector has outside the column space of the
    `common_space_fraction` of leading directions of the sum. All directions are made orthogonal to each other as in
    `tsv`, and all get the mean of their singular values. Zero singular values have no directions. What is no matrix
    is averaged. Takes one exact float64 SVD for each task vector and three more, and some twenty times the matrix in
    memory. arXiv 2502.04959.
    """
    return lambda_ * matrix_by_matrix(deltas, partial(_merge_both, fraction=common_space_fraction))


def _merge_common(deltas: Tensor) -> Tensor:
    left, values, right = leading(deltas.sum(0), min(deltas.shape[1:]), rounding(deltas))
    return values.mean() * (left @ right.T) if len(values) else torch.zeros_like(deltas[0])


def _merge_both(deltas: Tensor, fraction: float) -> Tensor:
    floor, common, specific = rounding(deltas), *_sizes(min(deltas.shape[1:]), len(deltas), fraction)
    shared = leading(deltas.sum(0), common, floor)
    parts: list[Triples] = [shared]
    parts += [leading(delta - shared.left @ (shared.left.T @ delta), specific, floor) for delta in deltas]
    values = torch.cat([part.values for part in parts])
    if not len(values):
        return torch.zeros_like(deltas[0])
    left = orthogonalized(torch.cat([part.left for part in parts], dim=1))
    right = orthogonalized(torch.cat([part.right for part in parts], dim=1))
    return values.mean() * (left @ right.T)


def _sizes(rank: int, models: int, fraction: float) -> tuple[int, int]:
    """How many directions come from the sum, and how many from each task vector: together all of `rank`."""
    specific = min(round((rank - int(rank * fraction)) / models), rank // models)
    return rank - models * specific, specific
