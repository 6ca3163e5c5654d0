"""One model's weights as they are, or scaled."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor
from ctl_merge.methods.fused import Fused, summed
from ctl_merge.methods.parameters import PerModel, column
from ctl_merge.methods.registry import merge_method

Factor = Annotated[FiniteFloat, Field(description="factor of the tensor")]


def _fused(*, scale: Tensor, **_: object) -> Fused:
    return summed(scale)


@merge_method(space="weights", models=(1, 1), linear=True, fused=_fused)
def passthrough(tensors: Tensor, *, scale: PerModel[Factor] = 1.0) -> Tensor:
    """The one input, times `scale`.

    tensors (1, *shape), scale (1, 1, ...) -> (*shape).
    """
    return (tensors * column(scale, tensors))[0]
