"""Model Breadcrumbs: drop the largest and smallest entries."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.agreement import merge_agreeing
from ctl_merge.methods.combine import weight_sum, weighted_sum
from ctl_merge.methods.fused import Fused, agreeing
from ctl_merge.methods.linear import weights_cancel
from ctl_merge.methods.order import kth_largest, magnitudes, order_statistics
from ctl_merge.methods.parameters import Density, Fraction, Normalize, Parameters, PerModel, Scale, Weight
from ctl_merge.methods.registry import Scope, merge_method
from ctl_merge.methods.rescale import RestoreNorm, l1_ratio, restore_l1
from ctl_merge.methods.sparsify import above, fused_trim
from ctl_merge.methods.task_arithmetic import scaled_sum

Gamma = Annotated[Fraction, Field(description="share of the task vector's entries, the largest, that is dropped")]


def band_ranks(numel: int, *, density: Tensor, gamma: Tensor, **_: object) -> list[list[int]]:
    """The ranks of the largest and the least magnitude that each model keeps, 0 where it keeps none: (models, 2)."""
    found = []
    for share, outliers in zip(density.flatten().tolist(), gamma.flatten().tolist(), strict=True):
        kept = int(share * numel)
        dropped = min(int(outliers * numel), numel - kept)
        found.append([dropped + 1, dropped + kept] if kept else [0, 0])
    return found


def _band_scope(parameters: Parameters) -> Scope | None:
    return None if all(density == 1.0 for density in parameters["density"]) else "tensor"


def _norm_scope(parameters: Parameters) -> Scope | None:
    return "tensor" if parameters["rescale"] else None


def keep_band(deltas: Tensor, *, density: Tensor, gamma: Tensor, band: Tensor | None = None, **_: object) -> Tensor:
    """Task vectors with the entries above and below the band set to zero; a density of 1 keeps all.

    deltas (models, *shape), density, gamma (models, 1, ...), band (models, 2) -> (models, *shape).
    """
    shares = density.flatten().tolist()
    if all(share == 1.0 for share in shares) or deltas[0].numel() == 0:
        return deltas
    if band is None:
        band = kth_largest(deltas.abs(), band_ranks(deltas[0].numel(), density=density, gamma=gamma))
    outliers = _outliers(band).tolist()
    kept = [
        delta if share == 1.0 else above(delta, least) - above(delta, outlier)
        for delta, share, least, outlier in zip(deltas, shares, band[:, 1].tolist(), outliers, strict=True)
    ]
    return torch.stack(kept)


def _outliers(band: Tensor | np.ndarray) -> np.ndarray:
    """The next float32 after the largest that is kept: from there on everything is an outlier."""
    return np.nextafter(np.asarray(band)[:, 0], np.float32(np.inf))


def _fused_band(merge: Fused | None, density: Tensor, rescale: bool, band: Tensor | None) -> Fused | None:
    if rescale or band is None:
        return None if rescale else merge
    return fused_trim(merge, density, band[:, 1], _outliers(band))


def _fused(*, density: Tensor, rescale: bool, band: Tensor | None = None, **others: Any) -> Fused | None:
    return _fused_band(scaled_sum(**others), density, rescale, band)


def _fused_ties(
    *, weight: Tensor, density: Tensor, normalize: bool, rescale: bool, lambda_: float, band: Tensor | None = None,
    **_: object,
) -> Fused | None:  # fmt: skip
    merge = agreeing(weight, divide="weights" if normalize else "none", scale=lambda_)
    return _fused_band(merge, density, rescale, band)


MEASURES = {
    **order_statistics("band", magnitudes, band_ranks, _band_scope, count=2),
    **l1_ratio(keep_band, _norm_scope),
}


@merge_method(space="task_vectors", measures=MEASURES, check=weights_cancel, fused=_fused, paper="2312.06795")
def breadcrumbs(
    deltas: Tensor,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = 1.0,
    gamma: PerModel[Gamma] = 0.01,
    normalize: Normalize = False,
    rescale: RestoreNorm = False,
    lambda_: Scale = 1.0,
    band: Tensor | None = None,
    l1_ratio: Tensor | None = None,
) -> Tensor:
    """Drop each task vector's largest and smallest entries, then task arithmetic.

    deltas (models, *shape), weight, density, gamma (models, 1, ...) -> (*shape). Of the N entries of a tensor the
    t = ⌊γ N⌋ largest magnitudes are dropped, the next k = ⌊density N⌋ are kept, with all that equal the first or the
    last of them, and the rest is dropped; k comes first where t + k > N, and k = 0 keeps nothing. A density of 1 keeps
    all, whatever γ. These are mergekit's rules; the paper (arXiv 2312.06795) gives shares to drop from both ends.

    `band` (models, 2): the largest and the least magnitude that is kept, computed from `deltas` if missing.
    """
    kept = keep_band(deltas, density=density, gamma=gamma, band=band)
    kept = restore_l1(deltas, kept, l1_ratio) if rescale else kept
    divisor = weight_sum(weight) if normalize else 1.0
    return weighted_sum(kept, weight * (lambda_ / divisor))


@merge_method(space="task_vectors", measures=MEASURES, fused=_fused_ties, paper="2312.06795")
def breadcrumbs_ties(
    deltas: Tensor,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = 1.0,
    gamma: PerModel[Gamma] = 0.01,
    normalize: Normalize = False,
    rescale: RestoreNorm = False,
    lambda_: Scale = 1.0,
    band: Tensor | None = None,
    l1_ratio: Tensor | None = None,
) -> Tensor:
    """Drop each task vector's largest and smallest entries, then TIES' sign election.

    Arguments as `breadcrumbs`; `normalize` divides by the sum of the agreeing weights.
    """
    kept = keep_band(deltas, density=density, gamma=gamma, band=band)
    kept = restore_l1(deltas, kept, l1_ratio) if rescale else kept
    return lambda_ * merge_agreeing(kept, weight, divide="weights" if normalize else "none")
