"""Metrics: plain functions of sums, and as classes of `evaluate`.

`evaluate.load` needs the Hub for the simplest metric; these classes need nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

Array = np.ndarray
_Z = 1.959963984540054  # of a 95 % interval


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share `right` of `count`."""
    centre = right + _Z * _Z / (2 * count)
    half = _Z * math.sqrt(right * (1 - right) / count + _Z * _Z / (4 * count * count))
    scale = 1 + _Z * _Z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, arXiv 2107.03374, in its numerically stable form. Raises ValueError where k > n.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {samples}, of which {right} are right")
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(samples - right + 1, samples + 1))


def calibration_error(bins: Array) -> Array:
    """Expected calibration error: Σ_b (n_b / n) |accuracy_b - confidence_b|, bins (..., 3, B) -> (...).

    The three sums of each bin: how many predictions, their confidences, how many were right.
    """
    count, confidence, right = bins[..., 0, :], bins[..., 1, :], bins[..., 2, :]
    return np.abs(right - confidence).sum(-1) / count.sum(-1)


def same_answer(given: str, wanted: str, pattern: str | None = None) -> bool:
    """Whether two answers are equal but for space around them; of a pattern its last match in each counts."""
    found = [_extracted(text, pattern) for text in (given, wanted)]
    return found[0] is not None and found[0] == found[1]


def _extracted(text: str, pattern: str | None) -> str | None:
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    return (last.group(1) if last.re.groups else last.group()).strip()


def _info(description: str, **features: str) -> evaluate.MetricInfo:
    named = {name: datasets.Value(kind) for name, kind in features.items()}
    return evaluate.MetricInfo(description=description, citation="", features=datasets.Features(named))


class TokenLoss(evaluate.Metric):
    """Mean loss in nats per token, and perplexity, of sequences by their summed loss and their tokens."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Nats per token, and perplexity.", predictions="float64", references="int64")

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        loss = math.fsum(predictions) / sum(references)
        return {"loss": loss, "perplexity": math.exp(loss)}


class ExactMatch(evaluate.Metric):
    """The share of answers that are right, with its 95 % interval."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of equal answers.", predictions="string", references="string")

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], pattern: str | None = None
    ) -> dict[str, Any]:
        right = [same_answer(*pair, pattern) for pair in zip(predictions, references, strict=True)]
        share = sum(right) / len(right)
        return {"exact_match": share, "interval": wilson(share, len(right))}


class ChoiceAccuracy(evaluate.Metric):
    """The share of questions whose right choice was chosen, with its 95 % interval."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of right choices.", predictions="int64", references="int64")

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
        share = sum(map(int.__eq__, map(int, predictions), map(int, references))) / len(references)
        return {"accuracy": share, "interval": wilson(share, len(references))}


class PassAtK(evaluate.Metric):
    """pass@k of problems by how many samples each has, and how many of them are right."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Unbiased pass@k.", predictions="int64", references="int64")

    def _compute(self, predictions: Sequence[int], references: Sequence[int], k: int = 1) -> dict[str, float]:
        found = [pass_at_k(int(n), int(c), k) for c, n in zip(predictions, references, strict=True)]
        return {f"pass@{k}": math.fsum(found) / len(found)}


class CalibrationError(evaluate.Metric):
    """Expected calibration error of confidences, by whether each prediction was right."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Expected calibration error.", predictions="float64", references="int64")

    def _compute(self, predictions: Sequence[float], references: Sequence[int], bins: int = 15) -> dict[str, float]:
        confidence, right = np.asarray(predictions), np.asarray(references)
        place = np.minimum((confidence * bins).astype(int), bins - 1)
        sums = [np.bincount(place, weights, bins) for weights in (np.ones_like(confidence), confidence, right)]
        return {"calibration_error": float(calibration_error(np.stack(sums)))}
