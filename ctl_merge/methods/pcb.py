"""PCB: parameters compete within and between task vectors."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor
from ctl_merge.methods.combine import safe_divisor
from ctl_merge.methods.order import kth_largest, magnitudes, order_statistics
from ctl_merge.methods.parameters import Parameters, Scale, column
from ctl_merge.methods.registry import Scope, merge_method

Ratio = Annotated[FiniteFloat, Field(gt=0, le=1, description="share of a task vector's entries that is kept, by score")]
_EXTREME = 1e-4  # share of the entries, at either end, whose magnitude is clamped


def _from_below(index: int, numel: int) -> int:
    """The rank from above of what has that index in ascending order."""
    return numel - min(max(index, 0), numel - 1)


def _bound_ranks(numel: int, **_: object) -> list[list[int]]:
    """Of the least and the largest magnitude after clamping: (1, 2)."""
    low, high = int(numel * _EXTREME), int(numel * (1 - _EXTREME) - 1)
    return [[_from_below(low, numel), _from_below(high, numel)]]


def _score_ranks(numel: int, *, ratio: float, **_: object) -> list[list[int]]:
    """Of the score from which on entries are kept, and of the largest: (1, 2)."""
    return [[_from_below(int(numel * (1 - ratio)), numel), 1]]


def score(deltas: Tensor, *, bounds: Tensor, **_: object) -> Tensor:
    """How an entry does in the competition: within its task vector by magnitude, against the others by agreement.

    deltas (models, *shape), bounds (models, 2) -> (models, *shape), rounded to float32, in which cuts are made.
    """
    low, high = _columns(bounds, deltas)
    place = (magnitudes(deltas).clamp(low, high) - low) / safe_divisor(high - low)
    within = place.square_().mul_(len(deltas)).exp_()
    return (deltas * deltas.sum(0)).tanh_().mul_(within).float()


def _columns(pair: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Two measured values a model, (models, 2), as columns."""
    wide = column(pair, deltas).view(-1, 2, *[1] * (deltas.ndim - 1))
    return wide[:, 0], wide[:, 1]


def _whole_model(parameters: Parameters) -> Scope | None:
    return "model"


MEASURES = {
    **order_statistics("bounds", magnitudes, _bound_ranks, _whole_model, count=2),
    **order_statistics("scores", score, _score_ranks, _whole_model, signed=True, count=2),
}


@merge_method(space="task_vectors", measures=MEASURES, paper="2410.02396")
def pcb(
    deltas: Tensor,
    *,
    ratio: Ratio = 0.1,
    lambda_: Scale = 1.0,
    bounds: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """Weight each entry by how it does against the rest of its task vector and against the other models.

    deltas (models, *shape) -> (*shape). With |d| clamped at its 0.01 % quantiles from both ends to s, the score of an
    entry is exp(n norm(s)²) · tanh(d Σ d), n models, norm to [0, 1]. The share `ratio` of highest scores is kept, with
    weights that grow linearly from 0 at the least to 1 at the largest, and the entry is Σ weight sign(d) s / Σ weight:
    what the authors' code for arXiv 2410.02396 computes, over whole models.

    `bounds` (models, 2): of |d|, `scores` (models, 2): the least that is kept and the largest; measured over the model,
    computed from `deltas` if missing.
    """
    numel = deltas[0].numel()
    if bounds is None:
        bounds = kth_largest(magnitudes(deltas), _bound_ranks(numel))
    found = score(deltas, bounds=bounds)
    if scores is None:
        scores = kth_largest(found, _score_ranks(numel, ratio=ratio))
    least, most = _columns(scores, deltas)
    weight = (found.to(deltas.dtype) - least).clamp_(min=0).div_(safe_divisor(most - least))
    low, high = _columns(bounds, deltas)
    clamped = magnitudes(deltas).clamp(low, high).mul_(deltas.sign())
    return clamped.mul_(weight).sum(0).mul_(lambda_).div_(safe_divisor(weight.sum(0)))
