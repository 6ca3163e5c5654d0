"""NearSwap: move towards the other model by a step."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor
from ctl_merge.methods.registry import merge_method

Step = Annotated[
    FiniteFloat, Field(ge=0, description="how far an entry moves at most; where the models are nearer, all the way")
]


@merge_method(space="task_vectors", models=(1, 1))
def nearswap(deltas: Tensor, *, t: Step) -> Tensor:
    """The base, each entry moved towards the other model by at most `t`.

    deltas (1, *shape) -> (*shape). mergekit writes it as an interpolation with weight min(t / |d|, 1), which is the
    same step; it bounds |d| by 1e-6 from below there, so that with t below 1e-6 it moves less than t.
    """
    return deltas[0].clamp(-t, t)
