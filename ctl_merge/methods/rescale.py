"""Restore a task vector's L1 norm after dropping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.combine import safe_divisor
from ctl_merge.methods.parameters import Parameters, column
from ctl_merge.methods.registry import Measure, Scope

Rescale = Annotated[
    bool | Literal["l1"],
    Field(description="true: divide what is kept by its probability (the paper); l1: to the L1 norm before (mergekit)"),
]
RestoreNorm = Annotated[bool, Field(description="scale what is kept to the L1 norm before")]


def _where_asked_for(parameters: Parameters) -> Scope | None:
    return "tensor" if parameters["rescale"] == "l1" else None


def l1_ratio(
    kept: Callable[..., Tensor], scope: Callable[[Parameters], Scope | None] = _where_asked_for
) -> dict[str, Measure]:
    """The measure `l1_ratio`: each tensor's L1 norm before over that after `kept(deltas, **arguments)`, (models, 1)."""

    def accumulate(deltas: Tensor, **arguments: object) -> Tensor:
        return l1_norms(deltas, kept(deltas, **arguments))

    def conclude(norms: Tensor, numel: int, **_: object) -> Tensor:
        return norm_ratio(norms)

    return {"l1_ratio": Measure(accumulate, conclude, scope)}


def l1_norms(deltas: Tensor, kept: Tensor) -> Tensor:
    """Before and after, float64: (models, *shape) twice -> (models, 2)."""
    return torch.stack([t.flatten(1).abs().sum(1, dtype=torch.float64) for t in (deltas, kept)], dim=1)


def norm_ratio(norms: Tensor) -> Tensor:
    """Norm before over norm after; 1 where nothing is left: (models, 1)."""
    return torch.where(norms[:, 1] > 0, norms[:, 0] / safe_divisor(norms[:, 1]), 1.0).unsqueeze(1)


def restore_l1(deltas: Tensor, kept: Tensor, ratio: Tensor | None) -> Tensor:
    """`kept` (models, *shape) times the measured ratio, or that of these very tensors if none is given."""
    if ratio is None:
        ratio = norm_ratio(l1_norms(deltas, kept))
    return kept * column(ratio.view(-1, *[1] * (deltas.ndim - 1)), deltas)
