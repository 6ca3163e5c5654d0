"""From Gram matrices to the probe's numbers.

Sources of a site: base F_0, parents F_1..F_k, then per merge its features F_m and, where it was run, its ghost
B_m(I). With the merge's coefficients c on task vectors, I = F_0 + Σ c_i (F_i - F_0) and dev = F_m - I. All numbers
follow from inner products of such combinations. Zhou et al., ICML 2024 (arXiv 2402.03660) for cos and coef.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
DRAWS = 1000
RESOLUTION = 1e-13  # squared distance of features that float32 cannot tell apart, against their squared norm


def unit(index: int, size: int) -> Array:
    """The combination that is one source."""
    return np.eye(size)[index]


def interpolation(coefficients: Array, size: int) -> Array:
    """I as a combination of the sources: (1 - Σc) F_0 + Σ c_i F_i."""
    found = np.zeros(size)
    found[0] = 1 - coefficients.sum()
    found[1 : 1 + len(coefficients)] = coefficients
    return found


def inner(gram: Array, a: Array, b: Array) -> Array:
    """<a, b> for combinations of the sources: gram (..., M, M) -> (...)."""
    return np.einsum("m,...mn,n->...", a, gram, b)


def cosine(gram: Array, a: Array, b: Array) -> Array:
    """cos of two combinations; NaN where one of them is zero."""
    norms = np.sqrt(inner(gram, a, a) * inner(gram, b, b))
    return np.divide(inner(gram, a, b), norms, out=np.full_like(norms, np.nan), where=norms > 0)


def disagreement(gram: Array, coefficients: Array) -> Array:
    """Σ |α_i| ‖F_i - F̄‖², F̄ = Σ α_i F_i / Σ α_i = I, over base and parents with α_0 = 1 - Σ c.

    For a convex combination of two parents it is α(1-α) ‖F_i - F_j‖². Absolute values keep it a size where the
    coefficients extrapolate (task arithmetic has α_0 < 0). 0 where it is below what the features resolve.
    """
    size = gram.shape[-1]
    centre = interpolation(coefficients, size)
    shares = centre[: 1 + len(coefficients)]
    found = sum(abs(a) * inner(gram, unit(i, size) - centre, unit(i, size) - centre) for i, a in enumerate(shares))
    largest = np.diagonal(gram, axis1=-2, axis2=-1)[..., : len(shares)].max(-1)
    return np.where(found > RESOLUTION * largest, found, 0.0)


def ratio(numerator: Array, denominator: Array) -> Array:
    """sqrt(numerator / denominator); NaN where the parents agree (0 / 0 is neither linear nor not)."""
    numerator, denominator = np.maximum(numerator, 0), np.asarray(denominator)
    missing = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    return np.sqrt(np.divide(numerator, denominator, out=missing, where=denominator > 0))


def least_squares(gram: Array, target: Array, count: int) -> tuple[Array, float]:
    """ĉ = argmin ‖target - F_0 - Σ c_i (F_i - F_0)‖² and its R², from a Gram (M, M); parents are sources 1..count."""
    size = gram.shape[-1]
    deltas = [unit(i, size) - unit(0, size) for i in range(1, count + 1)]
    wanted = target - unit(0, size)
    normal = np.array([[inner(gram, a, b) for b in deltas] for a in deltas])
    right = np.array([inner(gram, a, wanted) for a in deltas])
    total = float(inner(gram, wanted, wanted))
    coefficients = np.linalg.lstsq(normal, right, rcond=1e-10)[0]
    left = total - 2 * coefficients @ right + coefficients @ normal @ coefficients
    return coefficients, float(np.clip(1 - left / total, 0, 1)) if total > 0 else float("nan")


@dataclass(frozen=True)
class SiteMetrics:
    """The numbers of one merge at one site, over the sequences of one data set."""

    nonlinearity: float  # R: how large dev is against the parents' disagreement
    nonlinearity_interval: tuple[float, float]
    nonlinearity_robust: float  # without the massive dimensions
    cos: float  # E cos(F_m, I) over sequences, flattened over tokens (the paper's)
    cos_token: float  # the same per token
    coef: float  # E <F_m, I> / ‖I‖²
    cos_parents: float  # E cos(F_i, F_j), mean over pairs
    cos_to_parents: list[float]
    effective_feature: list[float]  # ĉ in feature space
    explained_feature: float  # its R²
    local: float | None  # ‖B_m(I) - I'‖ against the disagreement: what the block creates
    propagated: float | None  # ‖F_m - B_m(I)‖: what it inherits and amplifies
    relative_deviation: float  # ‖dev‖ / ‖I‖


def site_metrics(
    gram: Array, robust: Array, token_cosine: float, coefficients: Array, merged: int, ghost: int | None,
    generator: np.random.Generator,
) -> SiteMetrics:  # fmt: skip
    """All numbers of a merge from the Grams of N sequences: gram, robust (N, M, M); `merged`, `ghost`: sources."""
    size, count = gram.shape[-1], len(coefficients)
    centre, own = interpolation(coefficients, size), unit(merged, size)
    deviation, apart = inner(gram, own - centre, own - centre), disagreement(gram, coefficients)
    draws = generator.integers(0, len(gram), (DRAWS, len(gram)))
    resampled = ratio(deviation[draws].sum(1), apart[draws].sum(1))
    finite = resampled[np.isfinite(resampled)]
    low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
    parents = [unit(i, size) for i in range(1, count + 1)]
    pairs = [cosine(gram, a, b).mean() for i, a in enumerate(parents) for b in parents[i + 1 :]]
    feature, explained = least_squares(gram.sum(0), own, count)

    def against(part: Array) -> float:
        return float(ratio(inner(gram, part, part).sum(), apart.sum()))

    robust_deviation = inner(robust, own - centre, own - centre).sum()
    return SiteMetrics(
        nonlinearity=float(ratio(deviation.sum(), apart.sum())), nonlinearity_interval=(float(low), float(high)),
        nonlinearity_robust=float(ratio(robust_deviation, disagreement(robust, coefficients).sum())),
        cos=float(cosine(gram, own, centre).mean()), cos_token=token_cosine,
        coef=float((inner(gram, own, centre) / inner(gram, centre, centre)).mean()),
        cos_parents=float(np.mean(pairs)) if pairs else float("nan"),
        cos_to_parents=[float(cosine(gram, own, parent).mean()) for parent in parents],
        effective_feature=feature.tolist(), explained_feature=explained,
        local=against(unit(ghost, size) - centre) if ghost is not None else None,
        propagated=against(own - unit(ghost, size)) if ghost is not None else None,
        relative_deviation=float(np.sqrt(max(deviation.sum(), 0) / inner(gram, centre, centre).sum())),
    )  # fmt: skip
