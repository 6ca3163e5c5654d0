"""From Gram matrices to the probe's numbers.

Sources of a site: base F_0, parents F_1..F_k, then per merge its features F_m and, where it was run, its ghost
B_m(I). With the merge's coefficients c on task vectors, I = F_0 + Σ c_i (F_i - F_0) and dev = F_m - I. All numbers
follow from inner products of such combinations. Zhou et al., ICML 2024 (arXiv 2402.03660) for cos and coef.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ctl_merge.probing.intervals import Draws

Array = np.ndarray
RESOLUTION = 1e-13  # squared distance of features that float32 cannot tell apart, against their squared norm


def unit(index: int, size: int) -> Array:
    """The combination that is one source."""
    return np.eye(size)[index]


def interpolation(coefficients: Array, size: int, parents: Sequence[int] | None = None) -> Array:
    """I as a combination of the sources: (1 - Σc) F_0 + Σ c_i F_i; `parents`: their places, 1..k by default."""
    found = np.zeros(size)
    found[0] = 1 - coefficients.sum()
    found[list(parents or range(1, 1 + len(coefficients)))] = coefficients
    return found


def inner(gram: Array, a: Array, b: Array) -> Array:
    """<a, b> for combinations of the sources: gram (..., M, M) -> (...)."""
    return gram.reshape(*gram.shape[:-2], -1) @ np.outer(a, b).ravel()


def cosine(gram: Array, a: Array, b: Array) -> Array:
    """cos of two combinations; NaN where one of them is zero."""
    norms = np.sqrt(inner(gram, a, a) * inner(gram, b, b))
    return np.divide(inner(gram, a, b), norms, out=np.full_like(norms, np.nan), where=norms > 0)


def disagreement(gram: Array, coefficients: Array, parents: Sequence[int] | None = None) -> Array:
    """Σ |α_i| ‖F_i - F̄‖², F̄ = Σ α_i F_i / Σ α_i = I, over base and parents with α_0 = 1 - Σ c.

    For a convex combination of two parents it is α(1-α) ‖F_i - F_j‖². Absolute values keep it a size where the
    coefficients extrapolate (task arithmetic has α_0 < 0). 0 where it is below what the features resolve.
    """
    size = gram.shape[-1]
    places = [0, *(parents or range(1, 1 + len(coefficients)))]
    centre = interpolation(coefficients, size, parents)
    found = sum(abs(centre[i]) * inner(gram, unit(i, size) - centre, unit(i, size) - centre) for i in places)
    largest = np.diagonal(gram, axis1=-2, axis2=-1)[..., places].max(-1)
    return np.where(found > RESOLUTION * largest, found, 0.0)


def ratio(numerator: Array, denominator: Array) -> Array:
    """sqrt(numerator / denominator); NaN where the parents agree (0 / 0 is neither linear nor not)."""
    numerator, denominator = np.maximum(numerator, 0), np.asarray(denominator)
    missing = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    return np.sqrt(np.divide(numerator, denominator, out=missing, where=denominator > 0))


class Fit:
    """ĉ = argmin ‖target - F_0 - Σ c_i (F_i - F_0)‖² on a Gram (..., M, M); parents are sources 1..count."""

    def __init__(self, gram: Array, count: int) -> None:
        self.gram, self.base = gram, unit(0, gram.shape[-1])
        self.deltas = np.eye(gram.shape[-1])[1 : 1 + count] - self.base
        self.normal = self.deltas @ gram @ self.deltas.T
        self.inverse = np.linalg.pinv(self.normal, rcond=1e-10, hermitian=True)

    def coefficients(self, target: Array) -> tuple[Array, Array]:
        """ĉ (..., count), the smallest where parents are collinear, and R² (...), NaN where the target is the base."""
        wanted = target - self.base
        right = self.gram @ wanted @ self.deltas.T
        found = np.einsum("...ij,...j->...i", self.inverse, right)
        total = inner(self.gram, wanted, wanted)
        left = total - 2 * (found * right).sum(-1) + np.einsum("...i,...ij,...j->...", found, self.normal, found)
        missing = np.full_like(total, np.nan)
        return found, np.clip(1 - np.divide(left, total, out=missing, where=total > 0), 0, 1)


@dataclass(frozen=True)
class Sources:
    """Where a merge's features are among the sources of a site; None where they were not taken.

    `null_parent`: the parent's stand-in with random signs, which `null` has in place of the last parent.
    """

    merged: int
    ghost: int | None = None
    written: int | None = None
    null: int | None = None
    null_parent: int | None = None

    @classmethod
    def of(cls, name: str, sources: Sequence[str]) -> Sources:
        """The places of the merge `name` and of its variants, by their names."""
        names = ("ghost", "written", "null", "null-parent")
        found = [sources.index(full) if (full := f"{name}/{n}") in sources else None for n in names]
        return cls(sources.index(name), *found)


class Site:
    """The Gram matrices of one site over the N sequences of a data set, and what follows from them.

    gram (N, M, M); robust (M, M), the sum without the massive dimensions; parents are sources 1..count.
    """

    def __init__(self, gram: Array, robust: Array, count: int, draws: Draws) -> None:
        self.gram, self.robust, self.count, self.draws = gram, robust, count, draws
        self.size, self.drawn = gram.shape[-1], draws.sums(gram)  # (1 + DRAWS, M, M)

    @cached_property
    def fit(self) -> Fit:
        """Least squares on every draw, the same for all merges."""
        return Fit(self.drawn, self.count)

    def drawn_numbers(self, c: Array, at: Sources) -> dict[str, Array]:
        """Numbers that have an interval, on every draw: (1 + DRAWS,), ĉ (1 + DRAWS, k).

        nonlinearity: R, how large dev is against the parents' disagreement. cos: E cos(F_m, I) over sequences,
        flattened over tokens (the paper's). coef: E <F_m, I> / ‖I‖². effective_feature: ĉ in feature space;
        explained_feature: its R². local: ‖B_m(I) - I‖ against the disagreement, what the block creates; propagated:
        ‖F_m - B_m(I)‖, what it inherits and amplifies. nonlinearity_written: R of the merge as written; floor: what
        rounding alone would look like. nonlinearity_null: R of a merge with a random task vector.
        """
        centre, own = interpolation(c, self.size), unit(at.merged, self.size)
        apart = disagreement(self.drawn, c)

        def against(part: Array) -> Array:
            return ratio(inner(self.drawn, part, part), apart)

        feature, explained = self.fit.coefficients(own)
        found = {
            "nonlinearity": against(own - centre),
            "cos": self.draws.means(cosine(self.gram, own, centre)),
            "coef": self.draws.means(inner(self.gram, own, centre) / inner(self.gram, centre, centre)),
            "effective_feature": feature, "explained_feature": explained,
        }  # fmt: skip
        if at.ghost is not None:
            ghost = unit(at.ghost, self.size)
            found |= {"local": against(ghost - centre), "propagated": against(own - ghost)}
        if at.written is not None:
            written = unit(at.written, self.size)
            found |= {"nonlinearity_written": against(written - centre), "floor": against(written - own)}
        if at.null is not None and at.null_parent is not None:
            parents = [*range(1, self.count), at.null_parent]
            deviation = unit(at.null, self.size) - interpolation(c, self.size, parents)
            spread = disagreement(self.drawn, c, parents)
            found["nonlinearity_null"] = ratio(inner(self.drawn, deviation, deviation), spread)
        return found

    def plain_numbers(self, c: Array, at: Sources) -> dict[str, float | list[float]]:
        """Numbers without an interval.

        nonlinearity_robust: R without the massive dimensions. cos_parents: E cos(F_i, F_j), mean over pairs.
        cos_to_parents: E cos(F_m, F_i). relative_deviation: ‖dev‖ / ‖I‖.
        """
        centre, own = interpolation(c, self.size), unit(at.merged, self.size)
        parents = [unit(i, self.size) for i in range(1, self.count + 1)]
        pairs = [cosine(self.gram, a, b).mean() for i, a in enumerate(parents) for b in parents[i + 1 :]]
        deviation = own - centre
        size = inner(self.drawn[0], deviation, deviation) / inner(self.drawn[0], centre, centre)
        apart = disagreement(self.robust, c)
        return {
            "nonlinearity_robust": float(ratio(inner(self.robust, deviation, deviation), apart)),
            "cos_parents": float(np.mean(pairs)) if pairs else float("nan"),
            "cos_to_parents": [float(cosine(self.gram, own, parent).mean()) for parent in parents],
            "relative_deviation": float(np.sqrt(max(size, 0))),
        }
