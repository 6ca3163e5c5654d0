"""Definitions of the methods that look at whole tensors: angles between them, and the singular values of matrices.

Written from the papers with explicit vectors where the package works with inner products, and from singular values
where it solves linear systems.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from definitions import Array, Row, elect_and_merge, keep_largest, weighted

# ---- on the sphere


def nuslerp(
    base: Array | None, models: Array, noise: Array | None, *, weight: Sequence[float], nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Array:  # fmt: skip
    """Shoemake's arc between two task vectors, as one vector each, by rows, or (`row_wise`) by columns."""
    origin = np.zeros_like(models[0]) if base is None else base
    first, second = models - origin
    t = weight[1] / (weight[0] + weight[1]) if abs(weight[0] + weight[1]) >= 1e-6 else 0.5
    if nuslerp_flatten or first.ndim < 2:
        return origin + _arc(first.ravel(), second.ravel(), t).reshape(first.shape)
    axis = 0 if nuslerp_row_wise else first.ndim - 1
    merged = np.empty_like(first)
    for place in np.ndindex(*(size for i, size in enumerate(first.shape) if i != axis)):
        line = (*place[:axis], slice(None), *place[axis:])
        merged[line] = _arc(first[line], second[line], t)
    return origin + merged


def _arc(first: Array, second: Array, t: float) -> Array:
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    cosine = np.clip((first * second).sum() / norms, -1, 1) if norms > 0 else 0.0
    if 1 - cosine**2 <= 1e-12:
        return (1 - t) * first + t * second
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)


def multislerp(
    base: Array | None, models: Array, noise: Array | None, *, weight: Sequence[float], normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:  # fmt: skip
    """The barycentre in the tangent space at the mean direction, mapped back onto the sphere, times the mean length."""
    origin = np.zeros_like(models[0]) if base is None else base
    if len(models) == 1:
        return models[0]
    deltas = models - origin
    w = np.array(weight) / (sum(weight) if normalize_weights else 1.0)
    lengths = np.array([np.linalg.norm(delta) for delta in deltas])
    units = np.stack([delta / (length + eps) for delta, length in zip(deltas, lengths, strict=True)])
    mean = weighted(units, w)
    if np.linalg.norm(mean) < max(eps, 1e-7):
        return origin + weighted(deltas, w)
    mean = mean / np.linalg.norm(mean)
    tangent = weighted(np.stack([unit - (unit * mean).sum() * mean for unit in units]), w)
    angle = np.linalg.norm(tangent)
    return origin + (np.cos(angle) * mean + np.sinc(angle / np.pi) * tangent) * (w @ lengths)


def karcher(base: Array | None, models: Array, noise: Array | None, *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    """arXiv 2603.04972: gradient steps along the sphere from the mean direction, times the mean length."""
    lengths = np.array([np.linalg.norm(model) for model in models])
    units = [model / length for model, length in zip(models, lengths, strict=True) if length > 0]
    if not units:
        return np.zeros_like(models[0])
    mean = np.mean(units, axis=0)
    place = mean / np.linalg.norm(mean) if np.linalg.norm(mean) >= tol else units[0]
    for _ in range(max_iter):
        step = np.zeros_like(place)
        for unit in units:
            angle = np.arccos(np.clip((unit * place).sum(), -1, 1))
            if tol < angle < np.pi - tol:
                step += angle / np.sin(angle) * (unit - np.cos(angle) * place) / len(units)
        length = np.linalg.norm(step)
        if length <= tol:
            break
        place = np.cos(length) * place + np.sin(length) * step / length
        place = place / np.linalg.norm(place)
    return place * lengths.mean()


def model_stock(
    base: Array, models: Array, noise: Array | None, *, filter_wise: bool = False, clamp: bool = False
) -> Array:
    """arXiv 2403.19522, equation of t by the mean angle of pairs; `filter_wise` by rows."""
    if filter_wise and base.ndim > 1:
        merged = np.empty_like(base)
        for row in np.ndindex(base.shape[:-1]):
            merged[row] = model_stock(base[row], models[:, *row], None, clamp=clamp)
        return merged
    deltas = models - base
    n, pairs = len(deltas), []
    for i in range(n):
        for j in range(i):
            norms = np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])
            pairs.append((deltas[i] * deltas[j]).sum() / norms if norms > 0 else 0.0)
    cosine = np.mean(pairs)
    t = 0.0 if abs(1 + (n - 1) * cosine) < 1e-6 else n * cosine / (1 + (n - 1) * cosine)
    t = max(t, 0.0) if clamp else t
    return t * models.mean(0) + (1 - t) * base


# ---- matrices


def _each_matrix(base: Array, models: Array, merge: Callable[[Array], Array], scale: float = 1.0) -> Array:
    """Base plus the merged task vector, matrix by matrix; vectors and kernels are averaged."""
    deltas = models - base
    if base.size == 0 or base.ndim not in (2, 3):
        return base + scale * deltas.mean(0)
    if base.ndim == 2:
        return base + scale * merge(deltas)
    return base + scale * np.stack([merge(deltas[:, expert]) for expert in range(base.shape[0])])


def _svd(matrix: Array, scale: float) -> tuple[Array, Array, Array]:
    """Singular triples whose values are more than rounding of numbers of size `scale`."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = int((s > 1e-13 * scale).sum())
    return u[:, :rank], s[:rank], vt[:rank].T


def _nearest_orthonormal(columns: Array) -> Array:
    """C (CᵀC)^-½ with the pseudo-inverse where columns depend on each other."""
    u, _, v = _svd(columns, 1.0)
    return u @ v.T


def tsv(base: Array, models: Array, noise: Array | None, *, k: int | None = None, lambda_: float = 1.0) -> Array:
    """arXiv 2412.00081, algorithm 1: low-rank parts of the task vectors, whitened by Procrustes."""

    def merge(deltas: Array) -> Array:
        most = min(deltas.shape[1:]) // len(deltas) if k is None else k
        if most == 0:
            return deltas.mean(0)
        scale = np.linalg.norm(deltas)
        found = [_svd(delta, scale) for delta in deltas]
        u = np.concatenate([u[:, :most] for u, _, _ in found], axis=1)
        s = np.concatenate([s[:most] for _, s, _ in found])
        v = np.concatenate([v[:, :most] for _, _, v in found], axis=1)
        return _nearest_orthonormal(u) @ np.diag(s) @ _nearest_orthonormal(v).T

    return _each_matrix(base, models, merge, lambda_)


def knots(
    base: Array, models: Array, noise: Array | None, *, weight: Sequence[float] = (1.0, 1.0, 1.0),
    density: Sequence[float] = (1.0, 1.0, 1.0), inner: str = "ties", elect: str = "unweighted", divide: str = "count",
    lambda_: float = 1.0,
) -> Array:  # fmt: skip
    """arXiv 2410.19735: U · merge(S V_1ᵀ, …, S V_nᵀ) of the task vectors side by side; others are merged directly."""
    used = [i for i, w in enumerate(weight) if w]
    own = [weight[i] for i in used]

    def merge(stack: Array) -> Array:
        kept = np.stack([keep_largest(d, density[i]) for d, i in zip(stack, used, strict=True)])
        if inner == "linear":
            return weighted(kept, own) / {"weights": sum(own), "count": len(own), "none": 1.0}[divide]
        # Coordinates have no overall majority: one that nobody has more of counts as +.
        return elect_and_merge(kept, own, elect, divide)

    def joint(deltas: Array) -> Array:
        scale = np.linalg.norm(deltas)
        u = _svd(np.concatenate(list(deltas), axis=1), scale)[0]
        coordinates = np.stack([u.T @ delta for delta in deltas])  # = S V_iᵀ
        return u @ merge(np.where(np.abs(coordinates) > 1e-13 * scale, coordinates, 0.0))

    if base.ndim not in (2, 3):
        return base + lambda_ * merge((models - base)[used])
    return _each_matrix(base, models[used], joint, lambda_)


def iso_c(base: Array, models: Array, noise: Array | None, *, lambda_: float = 1.0) -> Array:
    """arXiv 2502.04959, Iso-C: U σ̄ Vᵀ of the sum."""

    def merge(deltas: Array) -> Array:
        u, s, v = _svd(deltas.sum(0), np.linalg.norm(deltas))
        return s.mean() * u @ v.T if len(s) else np.zeros_like(deltas[0])

    return _each_matrix(base, models, merge, lambda_)


def iso_cts(
    base: Array, models: Array, noise: Array | None, *, common_space_fraction: float = 0.8, lambda_: float = 1.0
) -> Array:
    """arXiv 2502.04959, Iso-CTS: the common directions first, then each task's own, whitened, one singular value."""

    def merge(deltas: Array) -> Array:
        n, rank, scale = len(deltas), min(deltas.shape[1:]), np.linalg.norm(deltas)
        own = round((rank - int(rank * common_space_fraction)) / n)
        own = own if own * n <= rank else rank // n
        common = rank - own * n
        u, s, v = (part[..., :common] for part in _svd(deltas.sum(0), scale))
        outside = np.eye(deltas.shape[1]) - u @ u.T
        found = [(u, s, v), *(tuple(part[..., :own] for part in _svd(outside @ d, scale)) for d in deltas)]
        us, ss, vs = (np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
        if not len(ss):
            return np.zeros_like(deltas[0])
        return ss.mean() * _nearest_orthonormal(us) @ _nearest_orthonormal(vs).T

    return _each_matrix(base, models, merge, lambda_)


def wudi(base: Array, models: Array, noise: Array | None, *, ridge: float = 1e-6) -> Array:
    """arXiv 2503.08099's loss and the ridge as one least-squares problem, solved row by row by its pseudo-inverse."""

    def merge(deltas: Array) -> Array:
        columns, there = deltas.shape[2], [d for d in deltas if np.linalg.norm(d) > 0]
        if not there:
            return deltas.mean(0)
        units = [d / np.linalg.norm(d) for d in there]
        pull = np.sqrt(ridge * len(there) / columns)
        # τ [u_1ᵀ, u_2ᵀ, ..., pull] is to be [d_1 u_1ᵀ, d_2 u_2ᵀ, ..., pull · mean].
        system = np.concatenate([*(u.T for u in units), pull * np.eye(columns)], axis=1)
        wanted = [*(d @ u.T for d, u in zip(there, units, strict=True)), pull * deltas.mean(0)]
        return np.linalg.lstsq(system.T, np.concatenate(wanted, axis=1).T, rcond=None)[0].T

    return _each_matrix(base, models, merge)


# ---- the table

_NO_WEIGHTS = {"cancel": "no weights", "zero weight": "no weights"}
_FLAT = "the spectrum is flattened, so that no task vector comes back as it was"

ROWS: Mapping[str, Row] = {
    "nuslerp": Row(
        nuslerp,
        cases=(
            {"weight": (0.7137, 0.4911)},
            {"weight": (0.7137, 0.4911), "nuslerp_flatten": False},
            {"weight": (0.3137, 0.9911), "nuslerp_flatten": False, "nuslerp_row_wise": True},
        ),
        average={"weight": (0.7, 0.4)},
        exempt={
            "single": "two models; the ends of the arc have tests of their own",
            "cancel": "weights that sum to zero count the same, as in mergekit",
            "zero weight": "two models; the ends of the arc have tests of their own",
            "symmetric": "two models; exchanging them has a test of its own",
        },
    ),
    "multislerp": Row(
        multislerp,
        cases=(
            {"weight": (0.5137, 0.2911, 0.1873)},
            {"weight": (0.6137, 0.5211, -0.2973), "normalize_weights": False},
            {"weight": (0.5137, 0.2911, 0.1873), "eps": 1e-3},
        ),
        average={"weight": (0.7, 0.4, 0.3)},
    ),
    "karcher": Row(
        karcher,
        cases=({}, {"max_iter": 1}, {"max_iter": 50, "tol": 1e-4}),
        average={},
        exempt=_NO_WEIGHTS,
    ),
    "model_stock": Row(
        model_stock,
        cases=({}, {"filter_wise": True}, {"filter_wise": True, "clamp": True}, {"clamp": True}),
        average={},
        exempt={**_NO_WEIGHTS, "single": "at least two task vectors"},
    ),
    "tsv": Row(
        tsv,
        cases=({}, {"lambda": 0.7}, {"k": 4}, {"k": 1000}),
        average={},
        exempt={**_NO_WEIGHTS, "copies": "only the leading triples of each are kept; see the test of its own"},
    ),
    "knots": Row(
        knots,
        cases=(
            {"weight": (0.5, 1.0, 2.0), "density": (0.5, 0.3, 1.0)},
            {"weight": (0.5, 1.0, -2.0), "elect": "weighted", "divide": "weights", "lambda": 0.7},
            {"elect": "count", "divide": "none"},
            {"weight": (0.2, 0.3, 0.4), "inner": "linear", "density": (0.8, 0.5, 0.9), "divide": "weights"},
        ),
        average={"weight": (1.0, 1.0, 1.0)},
    ),
    "iso_c": Row(
        iso_c,
        cases=({}, {"lambda": 0.7}),
        average={},
        exempt={**_NO_WEIGHTS, "copies": _FLAT, "single": _FLAT},
    ),
    "iso_cts": Row(
        iso_cts,
        cases=({}, {"common_space_fraction": 0.5, "lambda": 0.7}, {"common_space_fraction": 0.0}),
        average={},
        exempt={**_NO_WEIGHTS, "copies": _FLAT, "single": _FLAT},
    ),
    "wudi": Row(
        wudi,
        cases=({}, {"ridge": 0.01}),
        average={},
        exempt=_NO_WEIGHTS,
    ),
}  # fmt: skip
