"""TIES: trim, elect a sign, merge what agrees."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.agreement import election, merge_agreeing
from ctl_merge.methods.fused import Fused, agreeing
from ctl_merge.methods.parameters import Density, Normalize, Parameters, PerModel, Scale, Weight
from ctl_merge.methods.registry import Measure, Scope, merge_method
from ctl_merge.methods.rescale import RestoreNorm, l1_ratio, restore_l1
from ctl_merge.methods.sparsify import MAGNITUDE_CUT, fused_trim, trim, trim_scope

Trim = Annotated[
    Literal["tensor", "model"],
    Field(description="what the density is a share of: each tensor (mergekit), or the whole task vector (the paper)"),
]
Elect = Annotated[
    Literal["weighted", "unweighted", "count"],
    Field(description="sign of Σ w d (mergekit), of Σ d (the paper), or of the majority of signs"),
]
Divide = Annotated[
    Literal["weights", "count", "none"],
    Field(description="divide by the weights of the agreeing models (mergekit), their number (the paper), or nothing"),
]


def _kept(deltas: Tensor, *, density: Tensor, cut: Tensor | None = None, **_: object) -> Tensor:
    return trim(deltas, density, cut)


def _norm_scope(parameters: Parameters) -> Scope | None:
    """Where nothing is trimmed, the norm is what it was."""
    return trim_scope(parameters) if parameters["rescale"] else None


def _count_signs(
    deltas: Tensor, *, weight: Tensor, density: Tensor, elect: str, rescale: bool, cut: Tensor | None = None,
    l1_ratio: Tensor | None = None, **_: object,
) -> Tensor:  # fmt: skip
    """Elected signs, positive minus negative: (models, n) -> (1,)."""
    kept = trim(deltas, density, cut)
    kept = restore_l1(deltas, kept, l1_ratio) if rescale else kept
    return election(kept, weight, elect).sign().sum(dtype=torch.float64).view(1)


def _majority(balance: Tensor, numel: int, **_: object) -> Tensor:
    return torch.where(balance >= 0, 1.0, -1.0)


def _majority_scope(parameters: Parameters) -> Scope | None:
    return parameters["trim"] if parameters["elect"] == "unweighted" else None


def _fused(
    *, weight: Tensor, density: Tensor, normalize: bool, rescale: bool, lambda_: float, elect: str, divide: str,
    cut: Tensor | None = None, majority: Tensor | None = None, **_: object,
) -> Fused | None:  # fmt: skip
    merge = agreeing(weight, elect, divide if normalize else "none", majority, lambda_)
    return None if rescale else fused_trim(merge, density, cut)


@merge_method(
    space="task_vectors",
    fused=_fused,
    measures={
        **MAGNITUDE_CUT,
        **l1_ratio(_kept, _norm_scope),
        "majority": Measure(_count_signs, _majority, _majority_scope),
    },
    paper="2306.01708",
)
def ties(
    deltas: Tensor,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = 1.0,
    normalize: Normalize = True,
    rescale: RestoreNorm = False,
    lambda_: Scale = 1.0,
    trim: Trim = "tensor",
    elect: Elect = "weighted",
    divide: Divide = "weights",
    cut: Tensor | None = None,
    l1_ratio: Tensor | None = None,
    majority: Tensor | None = None,
) -> Tensor:
    """Trim each task vector, elect a sign per entry, average the entries that agree.

    deltas (models, *shape), weight and density (models, 1, ...) -> (*shape). The k = max(1, ⌊density N⌋) largest
    magnitudes are kept, and all that equal the k-th. Defaults are mergekit's: N counts a tensor, the sign is that of
    the weighted sum (zero counts as +), the divisor is the sum of the agreeing weights, λ scales the result. The
    paper's (arXiv 2306.01708) is `trim: model`, `elect: unweighted`, `divide: count`: N counts the whole model, and a
    vote of zero takes the sign that most entries elected. `normalize: false` is `divide: none`. `rescale` restores the
    L1 norm that the scope of `trim` had before.

    `cut`, `l1_ratio` (models, 1), `majority` (1,): measured over the scope of `trim`; the first two are computed from
    `deltas` if missing.
    """
    kept = _trim(deltas, density, cut)
    kept = restore_l1(deltas, kept, l1_ratio) if rescale else kept
    return lambda_ * merge_agreeing(
        kept, weight, elect=elect, divide=divide if normalize else "none", majority=majority
    )


_trim = trim  # the recipe's parameter has the function's name
