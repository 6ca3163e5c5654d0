"""RAM: entries that one model changed stay whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.combine import safe_divisor
from ctl_merge.methods.parameters import Parameters
from ctl_merge.methods.registry import Measure, Scope, merge_method

Threshold = Annotated[FiniteFloat, Field(ge=0, description="a model changed an entry if |d| is above it")]
Rate = Annotated[FiniteFloat, Field(description="a model's own entries are scaled by 1 + r min(shared / own, alpha)")]
Ceiling = Annotated[FiniteFloat, Field(ge=0, description="ratio of shared to own entries from which the scale is flat")]


def _changed(deltas: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """1 where a model changed an entry, else 0, (models, *shape), and how many models did, (*shape)."""
    changed = (deltas.abs() > epsilon).to(deltas.dtype)
    return changed, changed.sum(0)


def _count(deltas: Tensor, *, epsilon: float, **_: object) -> Tensor:
    """How many of a model's changed entries others changed too, and how many not: (models, 2)."""
    changed, owners = _changed(deltas.flatten(1), epsilon)
    alone = changed @ (owners == 1).to(changed.dtype)
    return torch.stack([changed.sum(1) - alone, alone], dim=1)


def _boost(counts: Tensor, numel: int, *, r: float, alpha: float, **_: object) -> Tensor:
    """1 + r · min(shared / own, α): (models,). A model without own entries has nothing to scale."""
    shared, own = counts.unbind(1)
    return 1 + r * (shared * own.sign() / safe_divisor(own)).clamp(max=alpha)


def _per_tensor(parameters: Parameters) -> Scope | None:
    return "tensor"


def _say_boosts(results: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    found = [result["boost"] for result in results.values() if result]
    if not found:
        return None
    means = ", ".join(f"{mean:.4g}" for mean in torch.stack(found).mean(0).tolist())
    return f"factors of the models' own entries, the mean over tensors: {means}"


@merge_method(space="task_vectors", paper="2601.13572")
def ram(deltas: Tensor, *, epsilon: Threshold = 1e-5) -> Tensor:
    """Average each entry over the models that changed it by more than ε.

    deltas (models, *shape) -> (*shape). arXiv 2601.13572.
    """
    changed, owners = _changed(deltas, epsilon)
    return changed.mul_(deltas).sum(0).div_(owners.clamp_(min=1))


@merge_method(
    space="task_vectors",
    measures={"boost": Measure(_count, _boost, _per_tensor)},
    report=_say_boosts,
    paper="2601.13572",
)
def ramplus_tl(
    deltas: Tensor, *, r: Rate = 0.1, alpha: Ceiling = 0.2, epsilon: Threshold = 1e-5, boost: Tensor | None = None
) -> Tensor:
    """As RAM, and entries that one model alone changed are scaled up by how much it shares with others.

    deltas (models, *shape) -> (*shape). The scale is 1 + r min(shared / own, α), counted over the tensor: `boost`
    (models,), computed from `deltas` if missing. arXiv 2601.13572 in mergekit's tensor-local form.
    """
    if boost is None:
        boost = _boost(_count(deltas, epsilon=epsilon), deltas[0].numel(), r=r, alpha=alpha)
    changed, owners = _changed(deltas, epsilon)
    scale = boost.to(deltas).view(-1, *[1] * (deltas.ndim - 1)) - 1
    # An entry with one owner has 1 / 1 + (scale - 1), one with several 1 / owners.
    factor = (owners == 1).to(deltas.dtype) * scale + 1 / owners.clamp(min=1)
    return changed.mul_(deltas).mul_(factor).sum(0)
