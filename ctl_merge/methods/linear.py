"""Weighted averaging of weights (model soups)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctl_merge.methods.parameters import Normalize, Parameters, PerModel, Weight
from ctl_merge.methods.registry import merge_method


def weights_cancel(parameters: Parameters, flag: str = "normalize") -> str | None:
    """The objection to weights that sum to zero where the sum is a divisor, which the parameter `flag` decides."""
    weights = parameters["weight"]
    if parameters[flag] and abs(math.fsum(weights)) <= 1e-9 * math.fsum(map(abs, weights)):
        return f"the weights sum to zero, and `{flag}` divides by their sum: change a weight or set {flag}: false"
    return None


@merge_method(space="weights", base="optional", check=weights_cancel, paper="2203.05482")
def linear(tensors: Tensor, *, weight: PerModel[Weight], normalize: Normalize = True) -> Tensor:
    """Weighted average Σ w x / Σ w; without `normalize` the weighted sum.

    tensors (models, *shape), weight (models, 1, ...) -> (*shape). A base model that the recipe names is an ordinary
    input here and needs a weight. Model soups, arXiv 2203.05482.
    """
    total = weight.sum(0, keepdim=True)
    if normalize:
        weight, total = weight / total, torch.ones_like(total)
    # Anchored at one model, so that copies of one model average to it bit for bit whatever the weights; and at the
    # heaviest, so that large numbers in a model of little weight round nothing away.
    factors = weight.flatten().tolist()
    anchor = max(range(len(factors)), key=lambda index: abs(factors[index]))
    merged = tensors[anchor] * total.item()
    for index, factor in enumerate(factors):
        if index != anchor:
            merged.add_(tensors[index] - tensors[anchor], alpha=factor)
    return merged
