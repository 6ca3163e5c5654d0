"""Bootstrap intervals over sequences."""

from __future__ import annotations

import warnings

import numpy as np

Array = np.ndarray
DRAWS = 1000
_QUANTILES = [0.025, 0.975]  # 95 %
_SEED = 0


class Draws:
    """How often each of N sequences is drawn: once each in row 0, which gives a number itself, then DRAWS resamples.

    All numbers of a data set are taken on the same draws, so that differences between them are paired; `seed` is the
    data set's. Values that were drawn have the draws as their first dimension: (1 + DRAWS, ...), the number itself
    first.
    """

    def __init__(self, count: int, seed: int = _SEED) -> None:
        drawn = np.random.default_rng(seed).integers(0, count, (DRAWS, count))
        drawn += count * np.arange(DRAWS)[:, None]
        times = np.bincount(drawn.ravel(), minlength=DRAWS * count).reshape(DRAWS, count)
        self.count, self.weights = count, np.concatenate([np.ones((1, count)), times])

    def sums(self, values: Array) -> Array:
        """Sums over sequences: values (N, ...) -> (1 + DRAWS, ...)."""
        values = np.asarray(values, dtype=float)
        return (self.weights @ values.reshape(self.count, -1)).reshape(-1, *values.shape[1:])

    def means(self, values: Array) -> Array:
        """Means over sequences: values (N, ...) -> (1 + DRAWS, ...)."""
        return self.sums(values) / self.count

    def bounds(self, drawn: Array) -> tuple[Array, Array]:
        """The ends of the 95 % intervals: drawn (1 + DRAWS, ...) -> (...), twice. NaN where there is one sequence.

        Draws without a value, such as a ratio of nothing to nothing, are left out.
        """
        if self.count < 2:
            none = np.full(drawn.shape[1:], np.nan)
            return none, none
        columns = drawn[1:].reshape(DRAWS, -1)
        low, high = np.quantile(columns, _QUANTILES, axis=0)
        holes = np.isnan(columns).any(0)
        if holes.any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of columns without any value
                low[holes], high[holes] = np.nanquantile(columns[:, holes], _QUANTILES, axis=0)
        return low.reshape(drawn.shape[1:]), high.reshape(drawn.shape[1:])

    def interval(self, drawn: Array) -> dict[str, float]:
        """A number with its interval: drawn (1 + DRAWS,)."""
        low, high = self.bounds(drawn)
        return {"value": float(drawn[0]), "low": float(low), "high": float(high)}
