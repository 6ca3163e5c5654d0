"""What a definition of a merge method is: the row of one method, and arithmetic that several definitions share.

A family of methods has its definitions and rows in a file `definitions_*.py`; `references.py` collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """What the tests need to know of one method; per-model parameters are tuples, one value a model.

    `cases`: parameter sets that are compared with the definition. `average`: parameters with which the method is an
    average of three models (of however many it takes), so that copies merge to themselves. `exempt`: laws that do not
    hold, each with the reason. `whole_model`: its statistics run over all tensors, as they do with `trim: model`.
    """

    definition: Callable[..., Array]  # on one tensor, or on all of them as one vector, see `whole_model`
    cases: tuple[Mapping[str, Any], ...]
    average: Mapping[str, Any]
    exempt: Mapping[str, str] = field(default_factory=dict)
    whole_model: bool = False


def keep_largest(delta: Array, density: float) -> Array:
    """The k = max(1, ⌊density N⌋) entries of largest magnitude and all that equal the k-th; others become 0.

    Magnitudes are compared as float32, so that the order is the same whatever the arithmetic.
    """
    if density in (0.0, 1.0) or delta.size == 0:
        return delta * density
    magnitude = np.abs(delta).astype(np.float32)
    k = max(1, int(density * delta.size))
    kth_largest = np.sort(magnitude, axis=None)[-k]
    return np.where(magnitude >= kth_largest, delta, 0.0)


def elect_and_merge(kept: Array, weight: Sequence[float], elect: str, divide: str) -> Array:
    """The sign with more mass (`count`: with more votes), and the mean or sum of the entries that have it."""
    ballots = np.stack([d * w for d, w in zip(kept, weight, strict=True)]) if elect == "weighted" else kept
    elected = np.sign(np.sign(kept).sum(0) if elect == "count" else ballots.sum(0))
    # The paper gives an entry without majority the sign that most entries elected; mergekit gives it +.
    overall = -1.0 if elect == "unweighted" and elected.sum() < 0 else 1.0
    elected = np.where(elected == 0, overall, elected)
    total, divisor = np.zeros_like(elected), np.zeros_like(elected)
    for delta, ballot, w in zip(kept, ballots, weight, strict=True):
        agrees = np.sign(ballot) == elected
        total += np.where(agrees, delta * w, 0.0)
        divisor += np.where(agrees, w if divide == "weights" else 1.0, 0.0)
    return total if divide == "none" else total / np.where(divisor == 0, 1.0, divisor)


def weighted(arrays: Array, weight: Sequence[float]) -> Array:
    return sum((w * a for w, a in zip(weight, arrays, strict=True)), np.zeros(arrays.shape[1:]))
