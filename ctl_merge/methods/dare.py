"""DARE: drop entries at random, rescale the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ctl_merge.deferred import Tensor
from ctl_merge.methods.agreement import merge_agreeing
from ctl_merge.methods.combine import safe_divisor, weight_sum, weighted_sum
from ctl_merge.methods.fused import Fused, agreeing
from ctl_merge.methods.linear import weights_cancel
from ctl_merge.methods.parameters import Density, Normalize, PerModel, Scale, Weight, column
from ctl_merge.methods.registry import merge_method
from ctl_merge.methods.rescale import Rescale, l1_ratio, restore_l1
from ctl_merge.methods.task_arithmetic import scaled_sum


def _drop(deltas: Tensor, *, density: Tensor, noise: Tensor, **_: object) -> Tensor:
    """Entries whose number falls below the density, the others zero."""
    # 1 where noise < density, else 0: the difference of two floats is zero only where they are equal.
    return (column(density, noise) - noise).clamp_(min=0).sign_().to(deltas.dtype).mul_(deltas)


L1_RATIO = l1_ratio(_drop)


def drop_and_rescale(
    deltas: Tensor, density: Tensor, rescale: bool | str, noise: Tensor, l1_ratio: Tensor | None = None
) -> Tensor:
    """Keep each entry with probability `density`, drop the rest, rescale what is kept.

    deltas, noise (models, *shape), density (models, 1, ...) -> (models, *shape). An entry is kept where its number
    falls below the density.
    """
    kept = _drop(deltas, density=density, noise=noise)
    if rescale == "l1":
        return restore_l1(deltas, kept, l1_ratio)
    return kept / column(safe_divisor(density), deltas) if rescale else kept


def _fused_drop(merge: Fused | None, density: Tensor, rescale: bool | str) -> Fused | None:
    if merge is None or rescale == "l1":
        return None
    chance = density.flatten().tolist()
    return replace(merge, chance=chance, divisors=[share or 1.0 for share in chance] if rescale else None)


def _fused(*, density: Tensor, rescale: bool | str, **others: Any) -> Fused | None:
    return _fused_drop(scaled_sum(**others), density, rescale)


def _fused_ties(
    *, weight: Tensor, density: Tensor, normalize: bool, rescale: bool | str, lambda_: float, **_: object
) -> Fused | None:
    merge = agreeing(weight, divide="weights" if normalize else "none", scale=lambda_)
    return _fused_drop(merge, density, rescale)


@merge_method(space="task_vectors", measures=L1_RATIO, check=weights_cancel, fused=_fused, paper="2311.03099")
def dare_linear(
    deltas: Tensor,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = 1.0,
    normalize: Normalize = False,
    rescale: Rescale = True,
    lambda_: Scale = 1.0,
    noise: Tensor,
    l1_ratio: Tensor | None = None,
) -> Tensor:
    """Drop entries of the task vectors at random, rescale, then task arithmetic.

    deltas (models, *shape), noise the same shape, uniform in [0, 1); weight, density (models, 1, ...) -> (*shape).
    `rescale: true` divides by the density (arXiv 2311.03099); `l1` restores each tensor's L1 norm, as mergekit does:
    equal in expectation for large tensors, wild for small ones.
    """
    kept = drop_and_rescale(deltas, density, rescale, noise, l1_ratio)
    divisor = weight_sum(weight) if normalize else 1.0
    return weighted_sum(kept, weight * (lambda_ / divisor))


@merge_method(space="task_vectors", measures=L1_RATIO, fused=_fused_ties, paper="2311.03099")
def dare_ties(
    deltas: Tensor,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = 1.0,
    normalize: Normalize = False,
    rescale: Rescale = True,
    lambda_: Scale = 1.0,
    noise: Tensor,
    l1_ratio: Tensor | None = None,
) -> Tensor:
    """Drop entries of the task vectors at random, rescale, then TIES' sign election.

    Arguments as `dare_linear`; `normalize` divides by the sum of the agreeing weights.
    """
    kept = drop_and_rescale(deltas, density, rescale, noise, l1_ratio)
    return lambda_ * merge_agreeing(kept, weight, divide="weights" if normalize else "none")
