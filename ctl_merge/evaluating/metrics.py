"""Metrics as classes of `evaluate`, of sums over items.

`evaluate.load` needs the Hub for the simplest metric; these classes need nothing. What an evaluation reports is what
they say: `items` are their sums for each item, and `kind.value` is the metric of any of them together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

Array = np.ndarray
BINS = 15  # of confidence, equally wide
_Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True)
class Kind:
    """A metric: whether more of it is better, and how sums over items become its value (the ratio of both).

    `share`: of items, whose interval is Wilson's where each is right or wrong. `summed`: whether mean and worst over
    data sets are of use.
    """

    title: str
    higher: bool
    share: bool = False
    summed: bool = True
    value: Callable[[Array, Array], Array] = np.divide


@dataclass(frozen=True)
class Measured:
    """Sums of one metric for each of N items: numerator (N, ...), denominator (N,)."""

    numerator: Array
    denominator: Array

    @classmethod
    def of(cls, numerator: Sequence[float] | Array, denominator: Sequence[float] | Array | None = None) -> Measured:
        above = np.asarray(numerator, dtype=float)
        return cls(above, np.ones(len(above)) if denominator is None else np.asarray(denominator, dtype=float))

    @property
    def each_right_or_wrong(self) -> bool:
        """Whether every item is one trial: pass@k of several samples is not."""
        return bool(np.isin(self.numerator, (0, 1)).all() and (self.denominator == 1).all())

    def whole(self, kind: Kind) -> float:
        """The metric of all items."""
        return float(kind.value(self.numerator.sum(0), self.denominator.sum()))


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


def binned(confidence: Array, right: Array, bins: int = BINS) -> Array:
    """The three sums of each bin for predictions of these confidences, right (1) or wrong (0): (n,) -> (3, bins)."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.stack([np.bincount(place, weights, bins) for weights in (np.ones_like(confidence), confidence, right)])


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


def _perplexity(nll: Array, tokens: Array) -> Array:
    return np.exp(nll / tokens)


def _binned_error(bins: Array, _: Array) -> Array:
    return calibration_error(bins)


class ItemMetric(evaluate.Metric):
    """A metric that follows from sums over items, so that every draw of items has its value too.

    `compute` gives the value under `key`, and its 95 % interval where it is a share of right and wrong ones.
    """

    key: ClassVar[str]
    kind: ClassVar[Kind]
    types: ClassVar[tuple[str, str]] = ("float64", "int64")  # of a prediction and a reference

    @classmethod
    def items(cls, predictions: Sequence[Any], references: Sequence[Any]) -> Measured:
        """The sums of each item; here `predictions` are sums over a sequence, and `references` its tokens."""
        return Measured.of(predictions, references)

    def _info(self) -> evaluate.MetricInfo:
        named = dict(zip(("predictions", "references"), map(datasets.Value, self.types), strict=True))
        return evaluate.MetricInfo(description=self.kind.title, citation="", features=datasets.Features(named))

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any], **how: Any) -> dict[str, Any]:
        found = self.items(predictions, references, **how)
        value = {self.key.format(**how): found.whole(self.kind)}
        if not (self.kind.share and found.each_right_or_wrong):
            return value
        return {**value, "interval": wilson(found.whole(self.kind), len(found.numerator))}


class TokenLoss(ItemMetric):
    """Mean loss in nats per token, of sequences by their summed loss and their tokens."""

    key, kind = "loss", Kind("loss, nats per token", higher=False)


class Perplexity(ItemMetric):
    """The exponential of the mean loss per token."""

    key, kind = "perplexity", Kind("perplexity", higher=False, summed=False, value=_perplexity)


class Agreement(ItemMetric):
    """How often the top token is another model's, of sequences by how often it is and their tokens."""

    key, kind = "agreement", Kind("how often the top token is the same", higher=True, summed=False)


class Divergence(ItemMetric):
    """Mean KL(other ‖ model) in nats per token, of sequences by its sum and their tokens."""

    key, kind = "kl", Kind("KL(other ‖ model), nats per token", higher=False, summed=False)


class CalibrationError(ItemMetric):
    """Expected calibration error of confidences, by whether each prediction was right."""

    key = "calibration_error"
    kind = Kind(f"calibration error of the next token, {BINS} bins", higher=False, value=_binned_error)

    @classmethod
    def items(cls, predictions: Sequence[float], references: Sequence[int], bins: int = BINS) -> Measured:
        pairs = zip(predictions, references, strict=True)
        return cls.of_bins([binned(np.array([confidence]), np.array([right]), bins) for confidence, right in pairs])

    @classmethod
    def of_bins(cls, bins: Sequence[Array]) -> Measured:
        """Of items that have several predictions each, as `binned` has them: (N, 3, B)."""
        return Measured.of(np.stack(bins), np.stack(bins)[:, 0].sum(-1))


class ExactMatch(ItemMetric):
    """The share of answers that are right."""

    key, kind, types = "exact_match", Kind("exact match", higher=True, share=True), ("string", "string")

    @classmethod
    def items(cls, predictions: Sequence[str], references: Sequence[str], pattern: str | None = None) -> Measured:
        return Measured.of([same_answer(*pair, pattern) for pair in zip(predictions, references, strict=True)])


class ChoiceAccuracy(ItemMetric):
    """The share of questions whose right choice was chosen, by the numbers of both."""

    key, types = "accuracy", ("int64", "int64")
    kind = Kind("accuracy of choices, by likelihood", higher=True, share=True)

    @classmethod
    def items(cls, predictions: Sequence[int], references: Sequence[int]) -> Measured:
        return Measured.of([chosen == right for chosen, right in zip(predictions, references, strict=True)])


class ChoiceAccuracyPerCharacter(ChoiceAccuracy):
    """The same, of choices by their likelihood for each character."""

    key = "accuracy_per_character"
    kind = Kind("accuracy of choices, by likelihood per character", higher=True, share=True)


class PassAtK(ItemMetric):
    """pass@k of problems by how many of their samples are right, and how many samples each has."""

    key, types = "pass@{k}", ("int64", "int64")
    kind = Kind("pass@k, by running the programs", higher=True, share=True)

    @classmethod
    def items(cls, predictions: Sequence[int], references: Sequence[int], *, k: int) -> Measured:  # type: ignore[override]
        return Measured.of([pass_at_k(n, right, k) for right, n in zip(predictions, references, strict=True)])


METRICS: dict[str, type[ItemMetric]] = {
    metric.key: metric
    for metric in (
        TokenLoss, Perplexity, ExactMatch, ChoiceAccuracy, ChoiceAccuracyPerCharacter, CalibrationError, Agreement,
        Divergence,
    )
}  # fmt: skip


def kind_of(metric: str) -> Kind:
    """The metric's kind; of `agreement:NAME` and `kl:NAME` the part before the colon, of pass@k by its name.

    The harness' metrics are taken for such of which more is better, but for those whose name says otherwise.
    """
    if metric.startswith("harness "):
        lower = any(word in metric for word in ("perplexity", "bits_per_byte", "loss", "brier"))
        return Kind(metric.removeprefix("harness "), higher=not lower)
    if metric.startswith("pass@"):
        return replace(PassAtK.kind, title=PassAtK.kind.title.replace("pass@k", metric))
    return METRICS[metric.partition(":")[0]].kind
