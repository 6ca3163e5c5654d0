"""Consensus merging: entries that several models need."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.parameters import Parameters, PerModel, Scale, column
from ctl_merge.methods.registry import merge_method

Agreeing = Annotated[int, Field(ge=0, description="how many models must need an entry for it to be kept")]
MaskScale = Annotated[FiniteFloat, Field(ge=0, description="the greater, the fewer entries the model's mask has")]


def _too_many(parameters: Parameters) -> str | None:
    models = len(parameters["tall_lambda"])
    if parameters["k"] > models:
        return f"k = {parameters['k']} models cannot need an entry where there are {models}: set k from 0 to {models}"
    return None


@merge_method(space="task_vectors", check=_too_many, paper="2405.07813")
def consensus(
    deltas: Tensor, *, k: Agreeing = 2, tall_lambda: PerModel[MaskScale] = 0.4, lambda_: Scale = 1.0
) -> Tensor:
    """Add up the task vectors where at least `k` models need the sum.

    deltas (models, *shape), tall_lambda (models, 1, ...) -> (*shape). A model needs an entry, is in its TALL mask,
    where |d_i| > tall_lambda |Σ d - d_i|: where the sum is nearer to it than the base is, by that factor. The paper
    chooses tall_lambda from 0.2 to 0.6 on validation data, and λ too (arXiv 2405.07813).
    """
    total = deltas.sum(0)
    needed = torch.zeros_like(total)
    for delta, scale in zip(deltas, column(tall_lambda, deltas).flatten().tolist(), strict=True):
        needed += delta.abs() > (total - delta).abs_().mul_(scale)
    return total.mul_(lambda_).mul_(needed >= k)
