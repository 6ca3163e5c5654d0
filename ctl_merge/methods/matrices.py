"""Singular values, numerical rank, polar factors; matrices in a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ctl_merge.deferred import Tensor, torch

# Of the backward error of a float64 SVD, eps times the larger side times the norm.
_SAFETY = 8


class Triples(NamedTuple):
    """Singular triples of a matrix (rows, columns): its part Σ values_i left_i right_iᵀ."""

    left: Tensor  # (rows, k)
    values: Tensor  # (k,), descending
    right: Tensor  # (columns, k)


def matrix_by_matrix(deltas: Tensor, merge: Callable[[Tensor], Tensor]) -> Tensor:
    """`merge` on the matrices of a stack (models, *shape), the mean of what is none: -> (*shape).

    A tensor of two axes is a matrix. One of three is as many matrices as its first axis is long, as experts are
    stored; a checkpoint that stores them apart gives the same. Vectors, numbers and kernels of convolutions (four axes
    and more) are averaged, as the papers' code does. NaN or infinity in a matrix makes all of it NaN.
    """
    if deltas.ndim not in (3, 4):
        return deltas.mean(0)
    if deltas.ndim == 4:
        matrices = [matrix_by_matrix(matrix, merge) for matrix in deltas.unbind(1)]
        return torch.stack(matrices) if matrices else deltas.mean(0)
    if not deltas.numel() or not torch.isfinite(deltas).all():
        return torch.full_like(deltas[0], torch.nan)
    return merge(deltas)


def rounding(deltas: Tensor) -> float:
    """Below this, singular values of sums and projections of the matrices (models, rows, columns) are rounding."""
    eps = torch.finfo(deltas.dtype).eps
    return _SAFETY * eps * max(deltas.shape[1:]) * float(torch.linalg.vector_norm(deltas))


def leading(matrix: Tensor, most: int, floor: float) -> Triples:
    """The `most` largest singular values above `floor`, all that equal the last of them, and their vectors.

    With the equal ones the result of a merge is the same whatever basis of their common space an SVD returns; vectors
    of singular values that are zero are arbitrary, so there are none.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    cut = values[min(most, len(values)) - 1] - floor if most else torch.inf
    kept = (values > floor) & (values >= cut)
    return Triples(left[:, kept], values[kept], right[kept].T)


def orthogonalized(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, the polar factor: (rows, k) -> (rows, k).

    Dependent columns span fewer dimensions; the factor is then an isometry of what they span, and zero elsewhere.
    """
    floor = _SAFETY * torch.finfo(columns.dtype).eps * max(columns.shape, default=0) * max(1, columns.shape[1]) ** 0.5
    left, _, right = leading(columns, columns.shape[1], floor)
    return left @ right.T
