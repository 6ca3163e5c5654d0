"""Task arithmetic: weighted task vectors on the base."""

from __future__ import annotations

from ctl_merge.deferred import Tensor
from ctl_merge.methods.combine import weight_sum, weighted_sum
from ctl_merge.methods.fused import Fused, summed
from ctl_merge.methods.linear import weights_cancel
from ctl_merge.methods.parameters import Normalize, PerModel, Scale, Weight
from ctl_merge.methods.registry import merge_method


def scaled_sum(*, weight: Tensor, normalize: bool, lambda_: float, **_: object) -> Fused:
    """λ Σ w d, divided by Σ w if `normalize`, for the compiled loop."""
    return summed(weight * (lambda_ / (weight_sum(weight) if normalize else 1.0)))


@merge_method(space="task_vectors", linear=True, check=weights_cancel, fused=scaled_sum, paper="2212.04089")
def task_arithmetic(
    deltas: Tensor, *, weight: PerModel[Weight], normalize: Normalize = False, lambda_: Scale = 1.0
) -> Tensor:
    """Base plus λ Σ w d, d the task vectors; `normalize` divides by Σ w.

    deltas (models, *shape), weight (models, 1, ...) -> (*shape). arXiv 2212.04089.
    """
    divisor = weight_sum(weight) if normalize else 1.0
    return weighted_sum(deltas, weight * (lambda_ / divisor))
