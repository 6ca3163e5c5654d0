"""Definitions of the methods that measure models on text, from their papers; see `definitions.py`.

Their statistics are made up here: `gram_of` and `fisher_of` stand in for what texts would give.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from definitions import Array, Row, weighted

MADE_UP = "made-up"  # the text of recipes whose models get made-up statistics


def gram_of(model: str, tensor: str, width: int) -> Array:
    """A Gram of 3 · width made-up inputs of a layer, (width, width)."""
    inputs = _generator(model, tensor).normal(size=(3 * width, width))
    return inputs.T @ inputs / len(inputs)


def has_gram(shape: Sequence[int]) -> bool:
    """Whether a tensor counts as a linear layer's weight here: a matrix, and not so wide that its Gram is too large."""
    return len(shape) == 2 and shape[-1] <= 1024


def fisher_of(model: str, tensor: str, shape: Sequence[int]) -> Array:
    """Made-up squared gradients, of the tensor's shape."""
    return _generator(model, tensor).normal(size=shape) ** 2


def _generator(model: str, tensor: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(f"{model}/{tensor}".encode()).digest()))


class MadeUp:
    """The evidence that a merge would take of its models: Grams for matrices, Fisher information for all."""

    def __init__(self, kind: str, shapes: Mapping[str, Sequence[int]]) -> None:
        self.kind, self.shapes = kind, shapes

    def of(self, ref, tensor: str, start: int = 0, count: int | None = None):
        shape = self.shapes[tensor]
        if self.kind == "fisher":
            return torch.from_numpy(fisher_of(ref.short, tensor, shape).ravel()[start : start + count])
        return torch.from_numpy(gram_of(ref.short, tensor, shape[-1])) if has_gram(shape) else None

    def transposed(self, ref, tensor: str) -> bool:
        return False


def regmean(
    base: Array | None, models: Array, grams: Array | None, *, weight: Sequence[float], alpha: float = 0.9,
    ridge: float = 0.0,
) -> Array:  # fmt: skip
    """arXiv 2212.09849, equation 2 with shrunken off-diagonals, for weights (out, in)."""
    if grams is None:
        return weighted(models, weight) / sum(weight)
    width = grams.shape[-1]
    shrunk = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in grams]
    total = weighted(np.stack(shrunk), weight)
    average = weighted(models, weight) / sum(weight)
    right = sum(w * (m - average) @ g for w, m, g in zip(weight, models, shrunk, strict=True))
    # The ridge pulls towards the average.
    return average + right @ np.linalg.inv(total + ridge * np.diag(total).mean() * np.eye(width))


def lot(
    base: Array, models: Array, grams: Array | None, *, weight: Sequence[float], ridge: float = 0.01,
    lambda_: float = 1.0,
) -> Array:  # fmt: skip
    """arXiv 2505.23859: least squares on task vectors, with a ridge."""
    deltas = models - base
    if grams is None:
        return base + lambda_ * weighted(deltas, weight) / sum(weight)
    total = weighted(grams, weight)
    total = total + ridge * np.diag(total).mean() * np.eye(grams.shape[-1])
    return base + lambda_ * sum(w * d @ g for w, d, g in zip(weight, deltas, grams, strict=True)) @ np.linalg.inv(total)


def fisher(base: Array | None, models: Array, fishers: Array, *, weight: Sequence[float]) -> Array:
    """arXiv 2111.09832, equation 3."""
    return weighted(models * fishers, weight) / weighted(fishers, weight)


_W = (0.5137, 0.2911, 0.1873)
_DIVISOR = {"cancel": "the sum of the weights is a divisor", "zero weight": "the sum of the weights is a divisor"}

ROWS: Mapping[str, Row] = {
    "regmean": Row(
        regmean,
        cases=({"weight": _W}, {"weight": _W, "alpha": 0.5, "ridge": 0.1}),
        average={"weight": (0.7, 0.4, 0.3)},
        exempt=_DIVISOR,
    ),
    "lot": Row(
        lot,
        cases=({"weight": _W}, {"weight": _W, "lambda": 0.7, "ridge": 0.2}),
        average={"weight": (0.7, 0.4, 0.3), "ridge": 0.0},
        exempt=_DIVISOR,
    ),
    "fisher": Row(fisher, cases=({"weight": _W},), average={"weight": (0.7, 0.4, 0.3)}, exempt=_DIVISOR),
}
