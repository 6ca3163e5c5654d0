"""Weighted sums of stacked tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ctl_merge.deferred import Tensor, library, torch
from ctl_merge.methods.parameters import Parameters


def weighted_sum(tensors: Tensor, weight: Tensor | np.ndarray) -> Tensor:
    """Σ w_i t_i over the first axis: tensors (models, *shape), weight (models, 1, ...) -> (*shape).

    One pass per model over memory that a chunk keeps in cache; a broadcast product would write a second stack first.
    """
    factors = weight.flatten().tolist()
    total = torch.mul(tensors[0], factors[0])
    scaled = torch.empty_like(total)
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        # Not `add_(tensor, alpha=factor)`: whether that rounds once or twice depends on the processor.
        total.add_(torch.mul(tensor, factor, out=scaled))
    return total


def weight_sum(weight: Any) -> float:
    """Σ w, rounded once: in whatever order, and by whatever library, the same."""
    return math.fsum(weight.flatten().tolist())


def anchored_sum(tensors: Tensor, factors: Sequence[float], total: float) -> Tensor:
    """Σ f_i t_i, where Σ f_i is `total`: tensors (models, *shape) -> (*shape).

    Anchored at one model, so that copies of one model average to it bit for bit whatever the factors; and at the
    heaviest, so that large numbers in a model of little weight round nothing away.
    """
    anchor = max(range(len(factors)), key=lambda index: abs(factors[index]))
    merged = tensors[anchor] * total
    apart = torch.empty_like(merged)
    for index, factor in enumerate(factors):
        if index != anchor:
            merged.add_(torch.sub(tensors[index], tensors[anchor], out=apart).mul_(factor))
    return merged


def weighted_mean(tensors: Tensor, weight: Tensor) -> Tensor:
    """Σ w t / Σ w over the first axis: tensors (models, *shape), weight (models, 1, ...) -> (*shape)."""
    return anchored_sum(tensors, (weight / weight_sum(weight)).flatten().tolist(), 1.0)


def cancel(weights: Sequence[float]) -> bool:
    """Whether weights sum to zero, but for rounding."""
    return abs(math.fsum(weights)) <= 1e-9 * math.fsum(map(abs, weights))


def dividing(parameters: Parameters) -> str | None:
    """The objection to weights that sum to zero, in methods that always divide by their sum."""
    return "the weights sum to zero, and are divided by: change a weight" if cancel(parameters["weight"]) else None


def safe_divisor(divisor: Any) -> Any:
    """`divisor` with its zeros replaced by one, so that 0 / 0 gives 0."""
    return library(divisor).where(divisor == 0, 1.0, divisor)
