"""Model Stock: towards the base where task vectors disagree."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ctl_merge.deferred import Tensor, library, torch
from ctl_merge.methods.angles import cosines, gram, whole_tensor
from ctl_merge.methods.combine import weighted_sum
from ctl_merge.methods.fused import Fused
from ctl_merge.methods.parameters import Parameters
from ctl_merge.methods.registry import Grain, Measure, Scope, merge_method

_SINGULAR = 1e-6  # mergekit's: the smallest denominator of t that is divided by

FilterWise = Annotated[bool, Field(description="one t for every vector of the last dimension, not one a tensor")]
Clamp = Annotated[bool, Field(description="keep the base where t is negative (mergekit steps away from the mean)")]


def _ratio(products: Any, numel: int, *, clamp: bool, **_: object) -> Any:
    """t, from inner products of the task vectors: (models, models, *rest) -> (*rest), of the same library."""
    own, models, found = library(products), len(products), cosines(products)
    pairs = [found[pair] for pair in combinations(range(models), 2)]
    mean = sum(pairs[1:], pairs[0]) / len(pairs)
    denominator = 1 + (models - 1) * mean
    singular = abs(denominator) < _SINGULAR
    t = own.where(singular, 0.0, models * mean / own.where(singular, 1.0, denominator))
    return t.clip(0.0) if clamp else t


def _grain(parameters: Parameters) -> Grain:
    return "row" if parameters["filter_wise"] else "element"


def _scope(parameters: Parameters) -> Scope | None:
    return None if parameters["filter_wise"] else whole_tensor(parameters)


def _say_range(results: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    found = [float(result["t"]) for result in results.values() if result]
    if not found:
        return None
    said = f"t, the share of the mean task vector, is {min(found):.3g} to {max(found):.3g} over {len(found)} tensors"
    below = sum(t < 0 for t in found)
    return said + (f"; it is negative in {below}: `clamp: true` keeps the base there" if below else "")


def _fused(*, t: np.ndarray, models: int, **_: object) -> Fused:
    return Fused([float(t) / models] * models)


@merge_method(
    space="task_vectors",
    models=(2, None),
    grain=_grain,
    measures={"t": Measure(gram, _ratio, _scope, compiled="gram")},
    report=_say_range,
    fused=_fused,
    paper="2403.19522",
)
def model_stock(
    deltas: Tensor, *, filter_wise: FilterWise = False, clamp: Clamp = False, t: Tensor | None = None
) -> Tensor:
    """Base plus t times the mean task vector, t = n c / (1 + (n - 1) c), c the mean cosine of pairs of task vectors.

    deltas (models, *shape) -> (*shape). arXiv 2403.19522. t is at most 1; task vectors that oppose each other make it
    negative without bound, and where they cancel it is 0. `filter_wise`: one t for every vector along the last
    dimension. `t`: computed from `deltas` if not given.
    """
    models = len(deltas)
    if filter_wise:
        rows = deltas if deltas.ndim > 1 else deltas.unsqueeze(1)
        t = _ratio(torch.einsum("i...k,j...k->ij...", rows, rows), 0, clamp=clamp)
        return deltas.mean(0) * (t.unsqueeze(-1) if deltas.ndim > 1 else t)
    if t is None:
        t = _ratio(gram(deltas), deltas[0].numel(), clamp=clamp)
    return weighted_sum(deltas, (t / models).expand(models))
