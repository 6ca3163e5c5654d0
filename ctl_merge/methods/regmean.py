"""RegMean and LOT: least squares on what linear layers read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.combine import dividing, weighted_mean, weighted_sum
from ctl_merge.methods.parameters import Fraction, PerModel, Scale, Weight
from ctl_merge.methods.registry import merge_method

_SINGULAR = 1e-10  # eigenvalues below this share of the largest count as zero
Alpha = Annotated[Fraction, Field(description="factor on the entries of each Gram beside its diagonal")]
Ridge = Annotated[
    FiniteFloat, Field(ge=0, description="added to the Gram's diagonal, as a share of the diagonal's mean")
]


@merge_method(space="weights", grain="tensor", statistic="gram", check=dividing, paper="2212.09849")
def regmean(
    tensors: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    alpha: Alpha = 0.9,
    ridge: Ridge = 0.0,
    gram: Tensor | None = None,
) -> Tensor:
    """Of each linear layer, the weights whose outputs are nearest to every model's on what that model reads.

    tensors (models, out, in), gram (models, in, in) -> (out, in): (Σ w W G)(Σ w G)⁻¹ with G = XᵀX / tokens over the
    inputs X (tokens, in) of the layer in each model on its own text, all but the diagonal of G times `alpha`. Jin et
    al., ICLR 2023. Tensors that are no linear layer's weight (`gram` is None) are averaged by `weight`. Where an input
    direction is in no model's text and `ridge` is 0, the solution nearest to the plain average is taken; the official
    code inverts and fails there.
    """
    average = weighted_mean(tensors, weight)
    if gram is None or not average.numel():
        return average
    # As a correction of the average: what the texts say nothing of stays the average's.
    return average + _fitted(tensors, average, weight, _shrunk(gram, alpha), ridge)


@merge_method(space="task_vectors", grain="tensor", statistic="gram", check=dividing, paper="2505.23859")
def lot(
    deltas: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    ridge: Ridge = 0.01,
    lambda_: Scale = 1.0,
    gram: Tensor | None = None,
) -> Tensor:
    """Of each linear layer, the task vector whose effect is nearest to every expert's on what that expert reads.

    deltas (models, out, in), gram (models, in, in) -> (out, in): λ (Σ w τ G)(Σ w G + r I)⁻¹, G = XᵀX as in `regmean`
    and r the `ridge` times the mean of Σ w G's diagonal: the least Σ w ‖(τ - τᵢ) Xᵢ‖² with the smallest τ. Task
    vectors of other tensors (`gram` is None) are averaged. Unlike `regmean` it falls back to the base where the
    texts say nothing.
    """
    average = weighted_mean(deltas, weight)
    if gram is None or not average.numel():
        return lambda_ * average
    return lambda_ * (average + _fitted(deltas, average, weight, gram, ridge, shrink=True))


def _shrunk(gram: Tensor, alpha: float) -> Tensor:
    diagonal = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    return alpha * gram + (1 - alpha) * diagonal


def _fitted(
    parts: Tensor, average: Tensor, weight: Tensor, gram: Tensor, ridge: float, *, shrink: bool = False
) -> Tensor:
    """(Σ w (P - A) G - s r A)(Σ w G + r I)⁻¹, what is to be added to the average A.

    parts (models, out, in), average (out, in), gram (models, in, in) -> (out, in). The ridge r pulls the sum to zero
    if it is to `shrink` (s = 1), else to the average.
    """
    factors = weight.flatten().tolist()
    total = weighted_sum(gram, weight)
    added = ridge * float(total.diagonal().mean())
    right = -added * average if shrink else torch.zeros_like(average)
    for factor, part, own in zip(factors, parts, gram, strict=True):
        right += factor * ((part - average) @ own)
    total.diagonal().add_(added)
    return _solve(total, right)


def _solve(total: Tensor, right: Tensor) -> Tensor:
    """right total⁻¹ for a Gram (in, in); where it is singular, by its pseudo-inverse."""
    factor, failed = torch.linalg.cholesky_ex(total)
    diagonal = factor.diagonal()
    if not failed and diagonal.min() > 1e-5 * diagonal.max():
        return torch.cholesky_solve(right.mT, factor).mT
    values, vectors = torch.linalg.eigh(total)
    kept = values > _SINGULAR * values[-1].clamp_min(0)
    inverse = torch.where(kept, 1.0, 0.0) / torch.where(kept, values, 1.0)
    return (right @ vectors * inverse) @ vectors.mT
