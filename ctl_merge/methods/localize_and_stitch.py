"""Localize-and-Stitch: largest changes of each model, averaged where shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, FiniteFloat

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.order import kth_largest, magnitudes, order_statistics
from ctl_merge.methods.parameters import Parameters
from ctl_merge.methods.registry import Scope, merge_method
from ctl_merge.methods.sparsify import above, kept_count

Sparsity = Annotated[
    FiniteFloat, Field(gt=0, le=1, description="share of a model's entries that is kept: the largest of |d|")
]


def _ranks(numel: int, *, sparsity: float, **_: object) -> list[list[int]]:
    """The rank of the least magnitude that is kept, the same for every model: (1, 1)."""
    return [[kept_count(sparsity, numel)]]


def _whole_model(parameters: Parameters) -> Scope | None:
    return None if parameters["sparsity"] == 1.0 else "model"


def _say_cuts(results: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    found = next((result["cut"] for result in results.values() if "cut" in result), None)
    if found is None:
        return None
    return "entries are kept from |d| = " + ", ".join(f"{cut:.4g}" for cut in found.flatten().tolist())


@merge_method(
    space="task_vectors",
    measures=order_statistics("cut", magnitudes, _ranks, _whole_model),
    report=_say_cuts,
    paper="2408.13656",
)
def localize_and_stitch(deltas: Tensor, *, sparsity: Sparsity = 0.1, cut: Tensor | None = None) -> Tensor:
    """Keep the largest entries of each whole task vector, average each entry over the models that keep it.

    deltas (models, *shape) -> (*shape). Of the N entries of a model the k = max(1, ⌊sparsity N⌋) largest magnitudes are
    kept, and all that equal the k-th; an entry that a model did not change it does not keep. This is the dataless
    localization of arXiv 2408.13656.

    `cut` (models, 1): the k-th largest magnitude, measured over the model; computed from `deltas` if missing.
    """
    if cut is None and sparsity < 1 and deltas[0].numel():
        cut = kth_largest(deltas.abs(), _ranks(deltas[0].numel(), sparsity=sparsity))
    cuts = [0.0] * len(deltas) if cut is None else cut.flatten().tolist()
    kept = torch.stack([above(delta, least) for delta, least in zip(deltas, cuts, strict=True)])
    keepers = kept.sign().abs_().sum(0).clamp_(min=1)
    return kept.sum(0).div_(keepers)
