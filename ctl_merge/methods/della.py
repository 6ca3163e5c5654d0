"""DELLA: drop at random, small magnitudes more often."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.agreement import merge_agreeing
from ctl_merge.methods.combine import weight_sum, weighted_sum
from ctl_merge.methods.fused import Fused, agreeing
from ctl_merge.methods.linear import weights_cancel
from ctl_merge.methods.parameters import Density, Normalize, Parameters, PerModel, Scale, Weight
from ctl_merge.methods.registry import merge_method
from ctl_merge.methods.rescale import Rescale, l1_ratio, restore_l1
from ctl_merge.methods.task_arithmetic import scaled_sum

Epsilon = Annotated[
    FiniteFloat,
    Field(ge=0, le=0.5, description="a row's smallest entry is kept with probability density - epsilon, its largest +"),
]
_STEP = 2.0**-24  # between the random numbers: no smaller probability can be told from none


def rank_in_row(deltas: Tensor) -> Tensor:
    """Each entry's place by magnitude in its row, 0 the smallest and 1 the largest: (rows, width), float64.

    Magnitudes are compared in float32. Equal ones share their mean place, so that nothing depends on the order of a
    sort and the mean over a row is a half; an entry alone in its row has a half.
    """
    width = deltas.shape[1]
    if width == 1:
        return torch.full_like(deltas, 0.5)
    # One integer holds magnitude and position, which makes of a sort an argsort; NumPy's is thirty times torch's.
    keys = deltas.abs().float().view(torch.int32).long() << 32 | torch.arange(width, device=deltas.device)
    keys = torch.from_numpy(np.sort(keys.numpy(), axis=1)) if keys.device.type == "cpu" else keys.sort(1).values
    places = _places(keys >> 32).div_(width - 1)
    return torch.empty_like(places).scatter_(1, keys & 0xFFFFFFFF, places)


def _places(values: Tensor) -> Tensor:
    """In sorted rows, each entry's index, or the mean index of those that equal it: (rows, width) float64."""
    rows, width = values.shape
    begins = torch.ones_like(values, dtype=torch.bool)
    begins[:, 1:] = values[:, 1:] != values[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    lengths = torch.diff(starts, append=starts.new_tensor([rows * width]))
    means = (starts % width).double() + (lengths - 1).double() / 2
    return means.repeat_interleave(lengths, output_size=rows * width).view(rows, width)


def keep_probability(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """From density - ε to density + ε, linear in the place within the row; a density of 0 or 1 is that of all entries.

    delta (..., width) -> the same shape.
    """
    if density in (0.0, 1.0):
        return torch.full_like(delta, density)
    ranks = rank_in_row(delta.reshape(-1, delta.shape[-1] if delta.ndim else 1)).view(delta.shape)
    return ranks.mul_(2 * epsilon).add_(density - epsilon)


def prune(
    deltas: Tensor, *, density: Tensor, epsilon: Tensor, noise: Tensor, rescale: bool | str = False, **_: object
) -> Tensor:
    """Keep the entries whose number falls below their probability; `rescale: true` divides them by it.

    deltas, noise (models, *shape), density, epsilon (models, 1, ...) -> (models, *shape).
    """
    found, shares, spreads = torch.empty_like(deltas), density.flatten().tolist(), epsilon.flatten().tolist()
    for kept, delta, share, spread, numbers in zip(found, deltas, shares, spreads, noise, strict=True):
        probability = keep_probability(delta, share, spread)
        # 1 where noise < probability, else 0: the difference of two floats is zero only where they are equal.
        torch.sub(probability, numbers, out=kept)
        kept.clamp_(min=0).sign_().mul_(delta)
        if rescale is True:
            kept.div_(probability.clamp_(min=_STEP))
    return found


def beyond_certainty(parameters: Parameters) -> str | None:
    """The objection to an epsilon that leaves [0, 1]."""
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        most = min(density, 1 - density)
        if 0 < density < 1 and epsilon > most + 1e-9:
            return (
                f"density {density:g} ± epsilon {epsilon:g} leaves [0, 1]: with this density, set epsilon from 0 to "
                f"{most:g}"
            )
    return None


def _linear_objections(parameters: Parameters) -> str | None:
    return weights_cancel(parameters) or beyond_certainty(parameters)


L1_RATIO = l1_ratio(prune)


def prune_and_rescale(
    deltas: Tensor, density: Tensor, epsilon: Tensor, rescale: bool | str, noise: Tensor, l1_ratio: Tensor | None
) -> Tensor:
    kept = prune(deltas, density=density, epsilon=epsilon, noise=noise, rescale=rescale)
    return restore_l1(deltas, kept, l1_ratio) if rescale == "l1" else kept


def _fused_prune(merge: Fused | None, density: Tensor, epsilon: Tensor, rescale: bool | str) -> Fused | None:
    if merge is None or rescale == "l1":
        return None
    pairs = list(zip(density.flatten().tolist(), epsilon.flatten().tolist(), strict=True))
    least = [share if share in (0.0, 1.0) else share - spread for share, spread in pairs]
    spreads = [0.0 if share in (0.0, 1.0) else 2 * spread for share, spread in pairs]
    return replace(merge, chance=least, spread=spreads, by_chance=bool(rescale))


def _fused(*, density: Tensor, epsilon: Tensor, rescale: bool | str, **others: Any) -> Fused | None:
    return _fused_prune(scaled_sum(**others), density, epsilon, rescale)


def _fused_agreeing(
    *, weight: Tensor, density: Tensor, epsilon: Tensor, normalize: bool, rescale: bool | str, lambda_: float, **_: Any
) -> Fused | None:
    merge = agreeing(weight, divide="weights" if normalize else "none", scale=lambda_)
    return _fused_prune(merge, density, epsilon, rescale)


@merge_method(
    space="task_vectors", grain="row", measures=L1_RATIO, check=beyond_certainty, fused=_fused_agreeing,
    paper="2406.11617",
)  # fmt: skip
def della(
    deltas: Tensor,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = 1.0,
    epsilon: PerModel[Epsilon] = 0.15,
    normalize: Normalize = True,
    rescale: Rescale = True,
    lambda_: Scale = 1.0,
    noise: Tensor,
    l1_ratio: Tensor | None = None,
) -> Tensor:
    """Drop entries at random, small ones of a row more often, rescale, then TIES' sign election.

    deltas (models, rows, width), noise the same shape, uniform in [0, 1); weight, density, epsilon (models, 1, ...) ->
    (rows, width). An entry's probability to be kept is linear in its magnitude's rank within its row (the last axis;
    a vector is one row), from density - ε to density + ε; ε is mergekit's, half of the paper's (arXiv 2406.11617). A
    density of 0 or 1 drops or keeps all. `rescale: true` divides each entry by its own probability, as the paper does;
    `l1` restores each tensor's L1 norm, as mergekit does. `normalize` divides by the sum of the agreeing weights.
    mergekit ranks along the second axis of tensors with more than two, and fails on rows of one entry, which are kept
    with probability `density` here; equal magnitudes, ordered by its sort, share their mean rank here.
    """
    kept = prune_and_rescale(deltas, density, epsilon, rescale, noise, l1_ratio)
    return lambda_ * merge_agreeing(kept, weight, divide="weights" if normalize else "none")


@merge_method(
    space="task_vectors", grain="row", measures=L1_RATIO, check=_linear_objections, fused=_fused, paper="2406.11617"
)
def della_linear(
    deltas: Tensor,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = 1.0,
    epsilon: PerModel[Epsilon] = 0.15,
    normalize: Normalize = False,
    rescale: Rescale = True,
    lambda_: Scale = 1.0,
    noise: Tensor,
    l1_ratio: Tensor | None = None,
) -> Tensor:
    """Drop entries at random, small ones of a row more often, rescale, then task arithmetic.

    Arguments as `della`; `normalize` divides by the sum of all weights.
    """
    kept = prune_and_rescale(deltas, density, epsilon, rescale, noise, l1_ratio)
    divisor = weight_sum(weight) if normalize else 1.0
    return weighted_sum(kept, weight * (lambda_ / divisor))
