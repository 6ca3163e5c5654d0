"""Coefficients by least squares on the features of every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ctl_merge.probing.metrics import unit
from ctl_merge.probing.observer import INPUT, Observations

Array = np.ndarray
_SWEEPS = 1000


def least_squares(
    normal: Array, right: Array, ridge: float, centre: Array | float = 0.0, least: float = -np.inf, most: float = np.inf
) -> Array:
    """argmin ½ cᵀA c - bᵀc + ½ ridge tr(A)/k ‖c - centre‖², least <= c <= most: A (k, k), b (k,) -> (k,).

    Coordinate descent, exact for what is strictly convex; without bounds (A + ρI) c = b + ρ centre.
    """
    size = len(right)
    strength = ridge * float(np.trace(normal)) / size
    matrix, wanted = normal + strength * np.eye(size), right + strength * np.broadcast_to(centre, size)
    if np.isinf(least) and np.isinf(most):
        return np.linalg.lstsq(matrix, wanted, rcond=1e-12)[0]
    c = np.clip(np.linalg.lstsq(matrix, wanted, rcond=1e-12)[0], least, most)
    for _ in range(_SWEEPS):
        before = c.copy()
        for i in range(size):
            if matrix[i, i] > 0:
                c[i] = np.clip((wanted[i] - matrix[i] @ c + matrix[i, i] * c[i]) / matrix[i, i], least, most)
        if np.abs(c - before).max() < 1e-12:
            break
    return c


def normal_equations(
    observed: Mapping[str, Observations], site: str, owners: Mapping[str, int], parents: int
) -> tuple[Array, Array]:
    """A_ij = Σ_t E_t <ΔF_i, ΔF_j> and b_j = Σ_t E_t <ΔF_t, ΔF_j> at a site, ΔF_i = F_i - F_0.

    E_t is the mean over the tokens of a data set t, and F_t its `owners`' features: those that its own parent would
    have. Each data set counts by how far its owner is from the base, so that none outweighs the others.
    """
    normal, right = np.zeros((parents, parents)), np.zeros(parents)
    for name, found in observed.items():
        grams = found.grams.sites[site]
        gram = np.sum([g.sum(0).numpy() for g in grams.gram], axis=0)
        size = gram.shape[-1]
        deltas = np.stack([unit(1 + i, size) - unit(0, size) for i in range(parents)])
        inner = deltas @ gram @ deltas.T
        scale = inner[owners[name], owners[name]]
        if scale > 0:
            normal += inner / scale
            right += inner[owners[name]] / scale
    return normal, right


def site_of(group: str, sites: Sequence[str]) -> str | None:
    """The site whose features a group of tensors makes: its block; for what precedes the blocks the input of the first.

    None for what comes after them.
    """
    block = next((site for site in sites if group.startswith(f"{site}.")), None)
    if block:
        return block
    return next((site for site in sites if site.endswith(f".{INPUT}")), None) if "embed" in group else None
