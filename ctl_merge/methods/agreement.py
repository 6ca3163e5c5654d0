"""Elect a sign per entry, average what agrees."""

from __future__ import annotations

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.combine import safe_divisor, weighted_sum
from ctl_merge.methods.parameters import column


def election(kept: Tensor, weight: Tensor, elect: str) -> Tensor:
    """What the elected sign is the sign of: kept (models, *shape) -> (*shape)."""
    if elect == "weighted":
        return weighted_sum(kept, weight)
    return weighted_sum(kept if elect == "unweighted" else kept.sign(), torch.ones(len(kept)))


def merge_agreeing(
    kept: Tensor, weight: Tensor, *, elect: str = "weighted", divide: str = "weights", majority: Tensor | None = None
) -> Tensor:
    """Per entry, elect a sign and average the task vectors that have it.

    kept (models, *shape), weight (models, 1, ...) -> (*shape). `elect` and `divide` as `ties` has them. A vote of
    exactly zero counts as `majority`'s sign, as + without one.
    """
    vote = election(kept, weight, elect)
    if bool((weight > 0).all()) and (majority is None or float(majority) > 0):
        return _merge_agreeing_fast(kept, weight, vote, divide)
    return merge_agreeing_plain(kept, weight, vote, elect, divide, majority)


def merge_agreeing_plain(
    kept: Tensor, weight: Tensor, vote: Tensor, elect: str, divide: str, majority: Tensor | None
) -> Tensor:
    """The definition, for any weights."""
    weight = column(weight, kept)
    if majority is not None:
        vote = torch.where(vote == 0, majority.to(vote), vote)
    # In mergekit's order the weight enters before the sign is compared, so a negative weight turns a vote around.
    ballots = kept * weight if elect == "weighted" else kept
    agree = torch.where(vote >= 0, ballots > 0, ballots < 0)
    merged = torch.where(agree, kept * weight, 0.0).sum(0)
    if divide == "none":
        return merged
    share = weight if divide == "weights" else torch.ones_like(weight)
    return merged / safe_divisor(torch.where(agree, share, 0.0).sum(0))


def _merge_agreeing_fast(kept: Tensor, weight: Tensor, vote: Tensor, divide: str) -> Tensor:
    """The same for positive weights: products with ±1 and clamps are exact and vectorised, torch.where is neither."""
    sign = torch.copysign(torch.ones_like(vote), vote + 0.0)  # + 0.0 makes of -0.0 a zero that counts as +
    agreeing = (kept * sign).clamp_(min=0).add_(0.0)  # which of two zeros is the larger, processors decide each its way
    merged = weighted_sum(agreeing, weight).mul_(sign)
    if divide == "none":
        return merged
    share = weight if divide == "weights" else torch.ones_like(weight)
    # Where none agrees both sums are zero; the least weight as a floor then gives 0.
    return merged.div_(weighted_sum(agreeing.sign_(), share).clamp_(min=float(share.min())))
