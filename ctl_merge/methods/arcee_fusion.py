"""Arcee Fusion: take over the important entries."""

from __future__ import annotations

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.order import kth_largest, order_statistics
from ctl_merge.methods.parameters import Parameters
from ctl_merge.methods.registry import Scope, merge_method

_FLOOR = 1e-8  # added to the probabilities, mergekit's


def importance(tensors: Tensor, **_: object) -> Tensor:
    """|x - b| times the Kullback-Leibler divergence of the row's softmax from the base's: (2, *shape) -> (1, *shape).

    Rounded to float32, in which the quantiles are taken.
    """
    p, q = torch.softmax(tensors.flip(0), dim=-1).add_(_FLOOR)
    # Rounding may make a divergence of almost nothing negative.
    divergence = (p * (p / q).log_()).sum(-1, keepdim=True).clamp_(min=0)
    return (tensors[1] - tensors[0]).abs_().mul_(divergence).float().unsqueeze(0)


def _quartile_ranks(numel: int, **_: object) -> list[list[int]]:
    """From above, the ranks of the three quartiles, the lower of two neighbours: (1, 3)."""
    return [[numel - quarter * (numel - 1) // 4 for quarter in (1, 2, 3)]]


def _per_tensor(parameters: Parameters) -> Scope | None:
    return "tensor"


@merge_method(
    space="weights",
    base="required",
    models=(2, 2),
    grain="row",
    measures=order_statistics("quartiles", importance, _quartile_ranks, _per_tensor, count=3),
)
def arcee_fusion(tensors: Tensor, *, quartiles: Tensor | None = None) -> Tensor:
    """The other model's entries where they are unusually important, the base's elsewhere.

    tensors (2, rows, width), base first -> (rows, width). The importance of an entry is |x - b| times the
    Kullback-Leibler divergence between the softmax of its row in x and in b (the last axis; a vector is one row), 1e-8
    added to either. It is unusual from the median plus 1.5 times the distance between the quartiles on, over the
    tensor. mergekit takes the quartiles of a million entries drawn at random where there are more; here they are exact.

    `quartiles` (1, 3): measured over the tensor; computed from `tensors` if missing.
    """
    found = importance(tensors)
    if quartiles is None:
        quartiles = kth_largest(found, _quartile_ranks(found[0].numel()))
    first, median, third = quartiles[0].double().tolist()
    unusual = found[0].to(tensors.dtype) >= median + 1.5 * (third - first)
    base, other = tensors
    return (other - base).mul_(unusual).add_(base)
