"""What a mixture-of-experts recipe says, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ctl_merge.deferred import Tensor
from ctl_merge.methods.registry import Method, no_objection
from ctl_merge.reference import ModelRef

GateMode = Literal["hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"]
GATE_MODES: tuple[str, ...] = get_args(GateMode)
RANDOM = ("random", "uniform_random")


@dataclass(frozen=True)
class Expert:
    """A dense model whose feed-forward weights become one expert of every layer.

    `noise_scale`: standard deviation of the noise that is added to them. `residual_scale`: factor of what the expert
    adds to the residual stream.
    """

    ref: ModelRef
    positive: tuple[str, ...] = ()  # texts that this expert is for
    negative: tuple[str, ...] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """Dense models side by side. `architecture`: the beginning of the name of a family of `moe_families`, or None."""

    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...]  # used for every token, whatever the router chooses
    gate_mode: GateMode
    experts_per_token: int
    architecture: str | None

    @property
    def everyone(self) -> tuple[Expert, ...]:
        return (*self.experts, *self.shared)

    @property
    def from_prompts(self) -> bool:
        """Whether gates are made of prompts, not of random numbers."""
        return self.gate_mode not in RANDOM


def assemble(tensors: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """One model's tensor as it is, or the sum of it and its noise, each times its `scale`.

    tensors (1 or 2, *shape), scale (1 or 2, 1, ...) -> (*shape).
    """
    return tensors[0] if scale is None else (tensors * scale.to(tensors)).sum(0)


# No row of the registry: what it does depends on the tensor's place, which no recipe says of single tensors.
METHOD = Method(
    name="moe", function=assemble, space="weights", base="required", models=(1, None), random=False, measures={},
    parameters={}, check=no_objection, report=None, paper=None,
    summary="Dense models side by side as a mixture of experts: each gives its feed-forward weights, the base the "
    "rest, and a router chooses experts for every token.",
)  # fmt: skip


def scales(expert: Expert, on_residual: bool) -> Mapping[str, tuple[float, ...]]:
    """The parameters of one of an expert's tensors, for `assemble`."""
    factor = expert.residual_scale if on_residual else 1.0
    if expert.noise_scale:
        return {"scale": (factor, factor * expert.noise_scale)}
    return {"scale": (factor,)} if factor != 1.0 else {}
