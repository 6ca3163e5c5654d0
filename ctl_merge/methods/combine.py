"""Weighted sums of stacked tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sum(tensors: Tensor, weight: Tensor) -> Tensor:
    """Σ w_i t_i over the first axis: tensors (models, *shape), weight (models, 1, ...) -> (*shape).

    One pass per model over memory that a chunk keeps in cache; a broadcast product would write a second stack first.
    """
    factors = weight.flatten().tolist()
    total = torch.mul(tensors[0], factors[0])
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        total.add_(tensor, alpha=factor)
    return total


def safe_divisor(divisor: Tensor) -> Tensor:
    """`divisor` with its zeros replaced by one, so that 0 / 0 gives 0."""
    return torch.where(divisor == 0, 1.0, divisor)
