"""WUDI: least interference with each task vector, closed form."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.matrices import matrix_by_matrix
from ctl_merge.methods.registry import merge_method

Ridge = Annotated[
    FiniteFloat, Field(gt=0, description="pull to the mean task vector, relative to the mean eigenvalue of Σ G")
]


@merge_method(space="task_vectors", grain="tensor", paper="2503.08099")
def wudi(deltas: Tensor, *, ridge: Ridge = 1e-6) -> Tensor:
    """The task vector τ that differs least from each d_i on the inputs that d_i responds to.

    deltas (models, *shape) -> (*shape). Least Σ ‖(τ - d_i) d_iᵀ‖² / ‖d_i‖² + ρ ‖τ - mean d‖²: with G_i = d_iᵀ d_i /
    ‖d_i‖² it is τ = m + Σ (d_i - m) G_i (Σ G_i + ρ)⁻¹, m the mean, where arXiv 2503.08099 runs 300 steps of Adam
    without ρ; as ρ vanishes τ becomes (Σ d_i G_i)(Σ G_i)†. ρ is `ridge` times the mean eigenvalue of Σ G_i. What is
    no matrix is averaged (see `matrix_by_matrix`). Solves a square system of the smaller of columns and models · rows.
    """
    return matrix_by_matrix(deltas, partial(_merge, ridge=ridge))


def _merge(deltas: Tensor, ridge: float) -> Tensor:
    mean = deltas.mean(0)
    deltas = deltas[torch.linalg.vector_norm(deltas, dim=(1, 2)) > 0]
    if not len(deltas):
        return mean
    units = deltas / torch.linalg.vector_norm(deltas, dim=(1, 2), keepdim=True)
    columns = mean.shape[1]
    rho = ridge * len(deltas) / columns  # each G has trace one
    if len(deltas) * mean.shape[0] < columns:
        # The same by the push-through identity, with the rows of all task vectors in place of the columns.
        rows = units.flatten(0, 1)
        right = torch.cat([(delta - mean) @ unit.T for delta, unit in zip(deltas, units, strict=True)], dim=1)
        return mean + right @ torch.linalg.solve(_ridged(rows @ rows.T, rho), rows)
    total, right = mean.new_zeros(columns, columns), torch.zeros_like(mean)
    for delta, unit in zip(deltas, units, strict=True):
        inner = unit.T @ unit
        total += inner
        right += (delta - mean) @ inner
    return mean + torch.linalg.solve(_ridged(total, rho), right, left=False)


def _ridged(gram: Tensor, rho: float) -> Tensor:
    return gram + rho * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
