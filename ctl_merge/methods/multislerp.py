"""Multi-SLERP: a barycentre of directions, at the mean length."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor
from ctl_merge.methods.angles import gram, lengths, whole_tensor
from ctl_merge.methods.combine import safe_divisor, weighted_sum
from ctl_merge.methods.fused import Fused, summed
from ctl_merge.methods.linear import weights_cancel
from ctl_merge.methods.parameters import PerModel, Weight
from ctl_merge.methods.registry import Measure, merge_method

# Inner products of unit vectors in float64 tell no length below this from zero.
_NOTHING = 1e-7

NormalizeWeights = Annotated[bool, Field(description="divide the weights by their sum")]
Epsilon = Annotated[FiniteFloat, Field(ge=0, description="length of the mean direction that counts as zero")]


def _mix(products: Any, numel: int, *, weight: Any, normalize_weights: bool, eps: float, **_: object) -> np.ndarray:
    """What each tensor is multiplied with, then 1 if that is a straight line, else 0: (models + 1,)."""
    products, weights = np.asarray(products), np.array(weight.flatten().tolist())
    norms = lengths(products)
    if len(weights) == 1:
        return np.array([1.0, 0.0])
    if normalize_weights:
        weights = weights / weights.sum()
    of_units = weights / safe_divisor(norms + eps)
    # The tangent vectors at the mean direction m = Σ w u / |Σ w u| are u - (u·m) m. Their weighted sum is
    # Σ w u - |Σ w u| m = 0, so the barycentre on the tangent space is its origin: m itself.
    length = np.sqrt((of_units @ products @ of_units).clip(0))
    straight = bool(length < max(eps, _NOTHING))
    factors = weights if straight else of_units * ((weights @ norms) / length)
    return np.append(factors, float(straight))


def _count_straight(results: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    found = [bool(result["mix"][-1]) for result in results.values() if result]
    if not any(found):
        return None
    return f"the weighted directions of {sum(found)} of {len(found)} tensors cancel: those were added linearly"


def _fused(*, mix: np.ndarray, **_: object) -> Fused:
    return summed(mix[:-1])


@merge_method(
    space="task_vectors",
    base="optional",
    measures={"mix": Measure(gram, _mix, whole_tensor, compiled="gram")},
    check=partial(weights_cancel, flag="normalize_weights"),
    fused=_fused,
    report=_count_straight,
)
def multislerp(
    tensors: Tensor,
    *,
    weight: PerModel[Weight],
    normalize_weights: NormalizeWeights = True,
    eps: Epsilon = 1e-8,
    mix: Tensor | np.ndarray | None = None,
) -> Tensor:
    """The weighted mean direction of the task vectors, or of the models without a base, at their mean length.

    tensors (models, *shape), weight (models, 1, ...) -> (*shape): Σ w u / |Σ w u| · Σ w |d|, u = d / (|d| + eps). This
    is the barycentre that mergekit seeks in the tangent space at Σ w u: it is the point itself. Where the weighted
    directions cancel it is Σ w d; one model alone is returned whatever its weight. `mix`: factors of the tensors,
    computed from `tensors` if not given.
    """
    if mix is None:
        products = gram(tensors).cpu()
        mix = _mix(products, tensors[0].numel(), weight=weight, normalize_weights=normalize_weights, eps=eps)
    return weighted_sum(tensors, mix[:-1])
