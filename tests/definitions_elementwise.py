"""Definitions of the methods that work entry by entry, in float64 from the papers and mergekit's documented rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from definitions import Array, Row, elect_and_merge, weighted

# (base or None, models (n, *shape), noise (n, *shape) or None, parameters) -> (*shape)


def _single(values: Array) -> Array:
    """Rounded to float32, in which the package compares."""
    return np.asarray(values).astype(np.float32)


def _ratio(above: Array | float, below: Array | float) -> Array:
    """above / below, and 0 where below is 0."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=np.asarray(below) != 0)


def _descending(values: Array) -> Array:
    return np.sort(_single(values), axis=None)[::-1]


# ---- DELLA


def keep_probabilities(delta: Array, density: float, epsilon: float) -> Array:
    """MAGPRUNE: rank the magnitudes of each row; equal ones get the mean of their ranks, a lone one the middle."""
    if density in (0.0, 1.0) or not delta.size:
        return np.full(delta.shape, density)
    rows = _single(np.abs(delta)).reshape(-1, delta.shape[-1] if delta.ndim else 1)
    found = np.full(rows.shape, density)
    for row, probabilities in zip(rows, found, strict=True):
        for i, magnitude in enumerate(row if len(row) > 1 else []):
            smaller, equal = int((row < magnitude).sum()), int((row == magnitude).sum())
            rank = smaller + (equal - 1) / 2
            probabilities[i] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
    return found.reshape(delta.shape)


def _prune(deltas: Array, noise: Array, density: Sequence[float], epsilon: Sequence[float], rescale: bool | str):
    found = []
    for delta, numbers, share, spread in zip(deltas, noise, density, epsilon, strict=True):
        probability = keep_probabilities(delta, share, spread)
        kept = np.where(numbers < probability, delta, 0.0)
        if rescale == "l1":
            kept = kept * (np.abs(delta).sum() / np.abs(kept).sum() if kept.any() else 1.0)
        elif rescale:
            kept = _ratio(kept, probability)
        found.append(kept)
    return np.stack(found)


def della(
    base: Array, models: Array, noise: Array, *, weight: Sequence[float], density: Sequence[float],
    epsilon: Sequence[float], normalize: bool = True, rescale: bool | str = True, lambda_: float = 1.0,
) -> Array:  # fmt: skip
    """arXiv 2406.11617: drop by rank, divide by the probability, elect, average."""
    kept = _prune(models - base, noise, density, epsilon, rescale)
    return base + lambda_ * elect_and_merge(kept, weight, "weighted", "weights" if normalize else "none")


def della_linear(
    base: Array, models: Array, noise: Array, *, weight: Sequence[float], density: Sequence[float],
    epsilon: Sequence[float], normalize: bool = False, rescale: bool | str = True, lambda_: float = 1.0,
) -> Array:  # fmt: skip
    """The same without election."""
    kept = _prune(models - base, noise, density, epsilon, rescale)
    return base + lambda_ * weighted(kept, weight) / (sum(weight) if normalize else 1.0)


# ---- Model Breadcrumbs


def keep_middle(delta: Array, density: float, gamma: float) -> Array:
    """Without the ⌊γ N⌋ largest, the next ⌊density N⌋, and what equals one of them in magnitude."""
    if density == 1.0:
        return delta
    kept = int(density * delta.size)
    dropped = min(int(gamma * delta.size), delta.size - kept)
    if kept == 0:
        return np.zeros_like(delta)
    inside = _descending(np.abs(delta))[dropped : dropped + kept]
    magnitude = _single(np.abs(delta))
    return np.where((magnitude <= inside[0]) & (magnitude >= inside[-1]), delta, 0.0)


def _crumbs(deltas: Array, density: Sequence[float], gamma: Sequence[float], rescale: bool) -> Array:
    kept = np.stack([keep_middle(*row) for row in zip(deltas, density, gamma, strict=True)])
    if rescale:
        norms = [(np.abs(d).sum(), np.abs(k).sum()) for d, k in zip(deltas, kept, strict=True)]
        kept = np.stack([k * (b / a if a else 1.0) for k, (b, a) in zip(kept, norms, strict=True)])
    return kept


def breadcrumbs(
    base: Array, models: Array, noise: Array | None, *, weight: Sequence[float], density: Sequence[float],
    gamma: Sequence[float], normalize: bool = False, rescale: bool = False, lambda_: float = 1.0,
) -> Array:  # fmt: skip
    """arXiv 2312.06795 in mergekit's parameters."""
    kept = _crumbs(models - base, density, gamma, rescale)
    return base + lambda_ * weighted(kept, weight) / (sum(weight) if normalize else 1.0)


def breadcrumbs_ties(
    base: Array, models: Array, noise: Array | None, *, weight: Sequence[float], density: Sequence[float],
    gamma: Sequence[float], normalize: bool = False, rescale: bool = False, lambda_: float = 1.0,
) -> Array:  # fmt: skip
    """The same with the election of TIES."""
    kept = _crumbs(models - base, density, gamma, rescale)
    return base + lambda_ * elect_and_merge(kept, weight, "weighted", "weights" if normalize else "none")


# ---- selection by variance or ownership


def sce(base: Array, models: Array, noise: Array | None, *, select_topk: float = 1.0) -> Array:
    """arXiv 2408.07990: select by variance, weight by the mean square of what is selected, erase minority signs."""
    deltas = models - base
    spread = _single(np.std(deltas, axis=0)) * np.any(deltas != deltas[0], axis=0)  # no rounding where all are equal
    if select_topk < 1 and deltas[0].size:
        k = int(select_topk * np.count_nonzero(spread))
        deltas = deltas * (spread >= _descending(spread)[k - 1]) if k else np.zeros_like(deltas)
    energy = (deltas**2).reshape(len(deltas), -1).sum(1)
    weights = energy / energy.sum() if energy.sum() > 0 else np.full(len(deltas), 1 / len(deltas))
    sign = np.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agrees = np.sign(deltas) == sign
    shares = np.stack([np.where(a, w, 0.0) for a, w in zip(agrees, weights, strict=True)])
    return base + _ratio((deltas * shares).sum(0), shares.sum(0))


def ram(base: Array, models: Array, noise: Array | None, *, epsilon: float = 1e-5) -> Array:
    """arXiv 2601.13572: each entry is the mean over the models that changed it."""
    deltas = models - base
    changed = np.abs(deltas) > epsilon
    return base + _ratio(np.where(changed, deltas, 0.0).sum(0), changed.sum(0))


def ramplus_tl(
    base: Array, models: Array, noise: Array | None, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5
) -> Array:
    """RAM+, counted over one tensor: what a model alone changed grows with how much of its changes is shared."""
    deltas = models - base
    changed = np.abs(deltas) > epsilon
    owners, merged = changed.sum(0), np.zeros_like(base)
    for delta, mine in zip(deltas, changed, strict=True):
        own, shared = int((mine & (owners == 1)).sum()), int((mine & (owners > 1)).sum())
        scale = 1 + r * min(shared / own, alpha) if own else 1.0
        merged = merged + np.where(mine & (owners == 1), scale * delta, 0.0)
        merged = merged + _ratio(np.where(mine & (owners > 1), delta, 0.0), owners)
    return base + merged


# ---- two models


def nearswap(base: Array, models: Array, noise: Array | None, *, t: float) -> Array:
    """Interpolation with weight min(t / |b - x|, 1), 1 where they are equal."""
    distance = np.abs(models[0] - base)
    share = np.minimum(np.where(distance > 0, _ratio(t, distance), 1.0), 1.0)
    return share * models[0] + (1 - share) * base


def arcee_fusion(base: Array, models: Array, noise: Array | None) -> Array:
    """Important entries by change times divergence of the row's softmax, above median + 1.5 quartile distances."""
    other = models[0]
    if not base.size:
        return base
    rows = [x.reshape(-1, x.shape[-1] if x.ndim else 1) for x in (other, base)]
    exponentials = [np.exp(x - x.max(1, keepdims=True)) for x in rows]
    p, q = (e / e.sum(1, keepdims=True) + 1e-8 for e in exponentials)
    divergence = np.maximum((p * np.log(p / q)).sum(1, keepdims=True), 0.0)
    importance = _single(np.abs(rows[0] - rows[1]) * divergence).astype(np.float64)
    ordered = np.sort(importance, axis=None)
    first, median, third = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where((importance >= median + 1.5 * (third - first)).reshape(base.shape), other, base)


# ---- whole models: all tensors are one vector


def localize_and_stitch(base: Array, models: Array, noise: Array | None, *, sparsity: float = 0.1) -> Array:
    """arXiv 2408.13656, dataless: masks of the largest magnitudes, each divided by how many masks an entry is in."""
    deltas = models - base
    k = max(1, int(sparsity * base.size))
    masks = np.stack([(_single(np.abs(d)) >= _descending(np.abs(d))[k - 1]) & (d != 0) for d in deltas])
    return base + sum(_ratio(mask.astype(np.float64), masks.sum(0)) * d for mask, d in zip(masks, deltas, strict=True))


def metagpt(base: Array, models: Array, noise: Array | None) -> Array:
    """arXiv 2406.11385: coefficients proportional to the squared norms of the task vectors."""
    squares = [np.sum((model - base) ** 2) for model in models]
    return base + sum(_ratio(s, sum(squares)) * (model - base) for s, model in zip(squares, models, strict=True))


def pcb(base: Array, models: Array, noise: Array | None, *, ratio: float = 0.1, lambda_: float = 1.0) -> Array:
    """arXiv 2410.02396 as its authors' code has it: clamp, score within and between, normalise, average."""
    deltas = models - base
    total, n, size = deltas.sum(0), len(deltas), base.size
    merged, weights = np.zeros_like(base), np.zeros_like(base)
    for delta in deltas:
        ascending = _descending(np.abs(delta))[::-1].astype(np.float64)
        low, high = ascending[int(size * 1e-4)], ascending[max(int(size * (1 - 1e-4) - 1), 0)]
        magnitude = np.clip(np.abs(delta), low, high)
        within = np.exp(n * _ratio(magnitude - low, high - low) ** 2)
        score = _single(within * np.tanh(delta * total)).astype(np.float64)
        ascending = np.sort(score)
        cut = ascending[min(int(size * (1 - ratio)), size - 1)]
        weight = _ratio(np.maximum(score - cut, 0.0), ascending[-1] - cut)
        merged = merged + weight * np.sign(delta) * magnitude
        weights = weights + weight
    return base + lambda_ * _ratio(merged, weights)


def consensus(
    base: Array, models: Array, noise: Array | None, *, tall_lambda: Sequence[float], k: int = 2, lambda_: float = 1.0
) -> Array:
    """arXiv 2405.07813: the sum of the task vectors, in the entries that at least k TALL masks have."""
    total = (models - base).sum(0)
    masks = [np.abs(m - base) > s * np.abs(base + total - m) for m, s in zip(models, tall_lambda, strict=True)]
    return base + lambda_ * np.where(sum(mask.astype(int) for mask in masks) >= k, total, 0.0)


# ---- the table

_W = (0.5137, 0.2911, 0.1873)
_SIGNED = (0.6137, 0.5211, -0.2973)
_AVERAGE = (0.7, 0.4, 0.3)
_ALL = (1.0, 1.0, 1.0)
_ELECTION = "the election adds only the copy whose ballot is positive: a model and its negation do not cancel"
_NO_WEIGHTS = {"cancel": "no weights", "zero weight": "no weights"}
_ONE_MODEL = {**_NO_WEIGHTS, "symmetric": "one model besides the base"}
_DELLA = {"weight": _SIGNED, "density": (0.5, 0.7, 1.0), "epsilon": (0.15, 0.2973, 0.15)}
_CRUMBS = {"weight": _SIGNED, "density": (0.5, 0.83, 1.0), "gamma": (0.05, 0.3, 0.2)}

ROWS: Mapping[str, Row] = {
    "della": Row(
        della,
        cases=(
            _DELLA,
            {**_DELLA, "rescale": "l1", "lambda": 0.7},
            {**_DELLA, "density": (0.3, 0.0, 0.15), "epsilon": (0.0, 0.15, 0.15), "rescale": False, "normalize": False},
        ),
        average={"weight": _AVERAGE, "density": _ALL, "epsilon": (0.15,) * 3},
        exempt={"cancel": _ELECTION},
    ),
    "della_linear": Row(
        della_linear,
        cases=(_DELLA, {**_DELLA, "rescale": "l1", "lambda": 0.7}, {**_DELLA, "rescale": False, "normalize": True}),
        average={"weight": _AVERAGE, "density": _ALL, "epsilon": (0.15,) * 3, "normalize": True},
    ),
    "breadcrumbs": Row(
        breadcrumbs,
        cases=(_CRUMBS, {**_CRUMBS, "rescale": True, "lambda": 0.7}, {**_CRUMBS, "normalize": True}),
        average={"weight": _AVERAGE, "density": _ALL, "gamma": _ALL, "normalize": True},
    ),
    "breadcrumbs_ties": Row(
        breadcrumbs_ties,
        cases=(_CRUMBS, {**_CRUMBS, "rescale": True, "lambda": 0.7}, {**_CRUMBS, "weight": _W, "normalize": True}),
        average={"weight": _AVERAGE, "density": _ALL, "gamma": _ALL, "normalize": True},
        exempt={"cancel": _ELECTION},
    ),
    "sce": Row(sce, cases=({"select_topk": 0.3}, {}, {"select_topk": 0.0}), average={}, exempt=_NO_WEIGHTS),
    "ram": Row(ram, cases=({"epsilon": 0.3}, {}), average={"epsilon": 0.0}, exempt=_NO_WEIGHTS),
    "ramplus_tl": Row(
        ramplus_tl,
        cases=({"epsilon": 0.3, "r": 0.5, "alpha": 3.0}, {"epsilon": 0.4}),
        average={"epsilon": 0.0},
        exempt=_NO_WEIGHTS,
    ),
    "nearswap": Row(nearswap, cases=({"t": 0.1137}, {"t": 0.0}), average={"t": 1e3}, exempt=_ONE_MODEL),
    "arcee_fusion": Row(
        arcee_fusion,
        cases=({},),
        average={},
        exempt={
            **_ONE_MODEL,
            "single": "two models, of which the base keeps the unimportant entries",
        },
    ),
    "localize_and_stitch": Row(
        localize_and_stitch,
        cases=({"sparsity": 0.3}, {}),
        average={"sparsity": 1.0},
        exempt=_NO_WEIGHTS,
        whole_model=True,
    ),
    "metagpt": Row(metagpt, cases=({},), average={}, exempt=_NO_WEIGHTS, whole_model=True),
    "pcb": Row(
        pcb,
        cases=({"ratio": 0.3, "lambda": 0.7}, {}),
        average={"ratio": 1.0},
        exempt={
            **_NO_WEIGHTS,
            "copies": "extreme entries are clamped, and the entry with the lowest score is always dropped",
            "single": "extreme entries are clamped, and the entry with the lowest score is always dropped",
        },
        whole_model=True,
    ),
    "consensus": Row(
        consensus,
        cases=({"tall_lambda": (0.4137, 0.3, 0.6173)}, {"tall_lambda": (0.7, 0.9, 0.8), "k": 3, "lambda": 0.3137}),
        average={"tall_lambda": (0.4, 0.3, 0.2), "lambda": 1 / 3},
        exempt={
            **_NO_WEIGHTS,
            "single": "λ = 1/3 makes the sum of three copies an average, and k = 2 masks are needed",
        },
    ),
}
