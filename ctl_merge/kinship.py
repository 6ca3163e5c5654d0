"""How near models are, by a sample of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ctl_merge.checkpoint import CHUNK, Checkpoint
from ctl_merge.deferred import torch
from ctl_merge.header import MERGEABLE

_TENSORS = 8  # of which a chunk each is read
STRAIGHT = 0.4  # the cosine between two task vectors beyond which a corner is no base
_CLEARER = 0.15  # by how much the second best corner must be worse


@dataclass(frozen=True)
class Kinship:
    """Inner products of the sampled weights of some models, float64 (models, models), none of which are all zero.

    `keys`: whose they are.
    """

    keys: tuple[str, ...]
    gram: np.ndarray

    def cosine(self, one: int, other: int) -> float:
        """Of the weights themselves: near 1 for models of one origin."""
        return float(self.gram[one, other] / np.sqrt(self.gram[one, one] * self.gram[other, other]))

    def distance(self, one: int, other: int) -> float:
        """‖x_one - x_other‖ / ‖x_other‖."""
        square = self.gram[one, one] + self.gram[other, other] - 2 * self.gram[one, other]
        return float(np.sqrt(max(square, 0.0) / self.gram[other, other]))

    def corner(self, at: int) -> float:
        """The largest cosine between two differences from a model: about 0 if it is the base of the others, 1/2 where
        all three are finetunes of another one; 1 with a copy of it among them.
        """
        others = [i for i in range(len(self.gram)) if i != at]
        found = [self._angle(at, i, j) for place, i in enumerate(others) for j in others[place + 1 :]]
        return max(found, default=1.0)

    def _angle(self, at: int, one: int, other: int) -> float:
        gram = self.gram
        product = gram[one, other] - gram[one, at] - gram[at, other] + gram[at, at]
        size = self.distance(one, at) * self.distance(other, at) * gram[at, at]
        return float(product / size) if size > 0 else 1.0

    def nearest(self) -> int:
        """The model at which differences from it come nearest to right angles."""
        return min(range(len(self.gram)), key=self.corner)

    def centre(self) -> int | None:
        """The model that the others were trained from, where that is clear: three or more are needed."""
        corners = sorted(self.corner(at) for at in range(len(self.gram)))
        if len(corners) < 3 or corners[0] > STRAIGHT or corners[1] < corners[0] + _CLEARER:
            return None
        return self.nearest()


def sample_kinship(models: Mapping[str, Checkpoint]) -> Kinship | None:
    """Read the beginnings of a few matrices that all models have in one shape; None where that tells nothing."""
    checkpoints = list(models.values())
    first = checkpoints[0]
    common = [
        name
        for name, spec in first.tensors.items()
        if len(spec.shape) >= 2 and spec.numel
        and all(
            name in c.tensors and c.tensors[name].shape == spec.shape and c.tensors[name].dtype in MERGEABLE
            for c in checkpoints
        )
    ]  # fmt: skip
    if not common or len(checkpoints) < 2:
        return None
    chosen = [common[place] for place in sorted({i * len(common) // _TENSORS for i in range(_TENSORS)})]
    gram = torch.zeros(len(checkpoints), len(checkpoints), dtype=torch.float64)
    for name in chosen:
        rows = torch.empty(len(checkpoints), min(first.tensors[name].numel, CHUNK), dtype=torch.float64)
        for row, checkpoint in zip(rows, checkpoints, strict=True):
            checkpoint.read_into(name, row)
        gram += rows @ rows.T
    known = bool(torch.isfinite(gram).all()) and bool((gram.diagonal() > 0).all())
    return Kinship(tuple(models), gram.numpy()) if known else None
