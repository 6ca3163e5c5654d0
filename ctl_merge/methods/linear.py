"""Weighted averaging of weights (model soups)."""

from __future__ import annotations

from ctl_merge.deferred import Tensor
from ctl_merge.methods.combine import anchored_sum, cancel, weight_sum, weighted_mean
from ctl_merge.methods.fused import Fused, anchored
from ctl_merge.methods.parameters import Normalize, Parameters, PerModel, Weight
from ctl_merge.methods.registry import merge_method


def weights_cancel(parameters: Parameters, flag: str = "normalize") -> str | None:
    """The objection to weights that sum to zero where the sum is a divisor, which the parameter `flag` decides."""
    if parameters[flag] and cancel(parameters["weight"]):
        return f"the weights sum to zero, and `{flag}` divides by their sum: change a weight or set {flag}: false"
    return None


def _fused(*, weight: Tensor, normalize: bool, **_: object) -> Fused:
    return anchored(weight / weight_sum(weight), 1.0) if normalize else anchored(weight, weight_sum(weight))


@merge_method(space="weights", base="optional", linear=True, check=weights_cancel, fused=_fused, paper="2203.05482")
def linear(tensors: Tensor, *, weight: PerModel[Weight], normalize: Normalize = True) -> Tensor:
    """Weighted average Σ w x / Σ w; without `normalize` the weighted sum.

    tensors (models, *shape), weight (models, 1, ...) -> (*shape). A base model that the recipe names is an ordinary
    input here and needs a weight. Model soups, arXiv 2203.05482.
    """
    if normalize:
        return weighted_mean(tensors, weight)
    return anchored_sum(tensors, weight.flatten().tolist(), weight_sum(weight))
