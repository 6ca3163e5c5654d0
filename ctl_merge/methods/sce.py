"""SCE: select by variance, weight by energy, erase minorities."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Annotated

import numpy as np
from pydantic import Field

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.agreement import merge_agreeing
from ctl_merge.methods.angles import energy, energy_shares
from ctl_merge.methods.fused import Fused, agreeing
from ctl_merge.methods.order import count_upper, kth_largest, locate, refinement
from ctl_merge.methods.parameters import Fraction, Parameters
from ctl_merge.methods.registry import Loop, Measure, Scope, merge_method

TopShare = Annotated[
    Fraction, Field(description="share of the entries in which the models differ that is kept, by their variance")
]


def deviation(deltas: Tensor, **_: object) -> Tensor:
    """Standard deviation over the models, entry by entry: (models, *shape) -> (1, *shape).

    From the differences of pairs, so that equal models have exactly 0; and not its square, which float32 could not
    hold for small weights.
    """
    total = torch.zeros_like(deltas[0])
    for one, other in combinations(deltas, 2):
        total += (one - other).square_()
    return total.sqrt_().div_(len(deltas)).unsqueeze(0)


def _count(deltas: Tensor, **_: object) -> Tensor:
    """The first count of the order statistic, and how many entries differ at all: (1, 32768 + 1)."""
    spread = deviation(deltas)
    return torch.cat([count_upper(spread), spread.float().count_nonzero().view(1, 1)], dim=1)


def _choose(counts: Tensor, numel: int, *, select_topk: float, **_: object) -> np.ndarray:
    return locate(counts[:, :-1], [[int(select_topk * int(counts[0, -1]))]])


def _selection_scope(parameters: Parameters) -> Scope | None:
    return None if parameters["select_topk"] == 1.0 else "tensor"


def _per_tensor(parameters: Parameters) -> Scope | None:
    return "tensor"


CUT = {
    "cut_bin": Measure(_count, _choose, _selection_scope),
    "cut": refinement("cut", deviation, _selection_scope),
}


def select(deltas: Tensor, cut: Tensor | None) -> Tensor:
    """Task vectors with the entries in which the models deviate less than the cut set to zero; no cut keeps all."""
    if cut is None:
        return deltas
    return deltas * (deviation(deltas).float() >= float(cut)).to(deltas.dtype)


def _energy(deltas: Tensor, *, cut: Tensor | None = None, **_: object) -> Tensor:
    """Σ d² over the selected entries: (models, n) -> (models,)."""
    return energy(select(deltas, cut))


def _loop(parameters: Parameters) -> Loop | None:
    return "energy" if _selection_scope(parameters) is None else None


def _say_shares(results: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    found = [result["share"].tolist() for result in results.values() if result]
    if not found:
        return None
    spans = ", ".join(f"{min(shares):.3g} to {max(shares):.3g}" for shares in zip(*found, strict=True))
    return f"weights of the models, from tensor to tensor: {spans}"


def _fused(*, cut: np.ndarray | None = None, share: np.ndarray, **_: object) -> Fused | None:
    return agreeing(share, elect="unweighted", divide="weights") if cut is None else None


@merge_method(
    space="task_vectors",
    measures={**CUT, "share": Measure(_energy, energy_shares, _per_tensor, compiled=_loop)},
    report=_say_shares,
    fused=_fused,
    paper="2408.07990",
)
def sce(
    deltas: Tensor, *, select_topk: TopShare = 1.0, cut: Tensor | None = None, share: Tensor | None = None
) -> Tensor:
    """Keep the entries in which the models vary most, elect a sign per entry, average by energy what agrees.

    deltas (models, *shape) -> (*shape). Of the entries in which the models differ the share `select_topk` of largest
    variance is kept, and all that equal the last of them; the weight of a model is its share of Σ d² over what is kept
    of the tensor; the sign is that of Σ d, zero counts as + (arXiv 2408.07990). mergekit takes equal weights where the
    mean of d² over a tensor, summed over models, is below 1e-6, which holds for most finetunes; here only where no
    entry differs from the base.

    `cut` (1, 1), `share` (models,): measured over the tensor; computed from `deltas` if missing.
    """
    if cut is None and select_topk < 1:
        spread = deviation(deltas)
        cut = kth_largest(spread, [[int(select_topk * int(spread.float().count_nonzero()))]])
    if share is None:
        share = energy_shares(_energy(deltas, cut=cut), deltas[0].numel())
    weight = share.view(-1, *[1] * (deltas.ndim - 1))
    return merge_agreeing(select(deltas, cut), weight, elect="unweighted", divide="weights")
