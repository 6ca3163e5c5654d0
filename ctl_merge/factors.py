"""Matrices as products of thin ones, and the loss."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ctl_merge.deferred import Tensor, torch

_SAFETY = 8  # of the rounding of a float64 SVD, eps times the larger side times the largest value
_EXACT = 1024  # sides up to which an exact SVD takes no longer than a randomised one
_OVERSAMPLING, _PASSES = 16, 3  # of a randomised SVD: further columns, and how often it multiplies by the matrix


@dataclass(frozen=True)
class Factors:
    """b (outputs, rank), a (rank, inputs), float64: the matrix b a · scale. `how` they were found, in words."""

    b: Tensor
    a: Tensor
    how: str
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def rounded(self, dtype: torch.dtype) -> Factors:
        """As they are written."""
        return Factors(self.b.to(dtype), self.a.to(dtype), self.how, self.scale)

    def padded(self, rank: int) -> Factors:
        """With zeros up to that rank: the same matrix."""
        more = rank - self.rank
        b, a = torch.nn.functional.pad(self.b, (0, more)), torch.nn.functional.pad(self.a, (0, 0, 0, more))
        return Factors(b, a, self.how, self.scale)

    def lost(self, matrix: Tensor) -> float:
        """‖matrix - b a · scale‖², measured in float64."""
        product = self.b.to(matrix) @ self.a.to(matrix)
        return float(torch.sub(matrix, product, alpha=self.scale).square_().sum())


def concatenated(parts: Sequence[tuple[Tensor, Tensor, float, Tensor]]) -> Factors:
    """The sum of diag(c) b a · scale over parts (b, a, scale, c (outputs, 1)), as one product: exact, ranks add up."""
    scales = {scale for _, _, scale, _ in parts}
    common = scales.pop() if len(scales) == 1 else 1.0
    right = [a.double() for _, a, _, _ in parts]
    left = [b.double() * (c if scale == common else c * scale) for b, _, scale, c in parts]
    return Factors(torch.cat(left, dim=1), torch.cat(right), "concatenation", common)


def recompressed(factors: Factors, rank: int | None, energy: float | None) -> Factors:
    """The nearest product of a smaller rank, from the thin matrices alone."""
    left, core_left = torch.linalg.qr(factors.b)
    right, core_right = torch.linalg.qr(factors.a.T)
    core = _exact(core_left @ core_right.T * factors.scale, rank, energy)
    return Factors(left @ core.b, core.a @ right.T, "truncated SVD")


def truncated(matrix: Tensor, rank: int | None, energy: float | None, name: str) -> Factors:
    """The nearest product to a float64 matrix (outputs, inputs) of at most `rank`, and no more than `energy` needs.

    `energy`: the share of ‖matrix‖² that is to be kept; None for all of its numerical rank. Exact by an SVD; of a
    large matrix and a small rank by a randomised one (Halko et al., 0909.4061), seeded by `name`, whose result is
    within rounding of the best in all but flat spectra: measure it with `lost`.
    """
    least = min(matrix.shape)
    most = least if rank is None else min(rank, least)
    if least <= _EXACT or most + _OVERSAMPLING > least // 4:
        if rank is None and energy is not None and least > _EXACT:
            found = _growing(matrix, energy, name)
            if found is not None:
                return found
        return _exact(matrix, rank, energy)
    u, s, vt = _randomised(matrix, most + _OVERSAMPLING, name)
    return _cut(u, s, vt, most, energy, float(matrix.square().sum()), "randomised SVD")


def _exact(matrix: Tensor, rank: int | None, energy: float | None) -> Factors:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    most = len(s) if rank is None else min(rank, len(s))
    return _cut(u, s, vt, most, energy, float(s.square().sum()), "truncated SVD")


def _growing(matrix: Tensor, energy: float, name: str) -> Factors | None:
    """By randomised SVDs of more and more columns until they hold the energy; None where that is no gain."""
    total, columns = float(matrix.square().sum()), 64
    while columns <= min(matrix.shape) // 4:
        u, s, vt = _randomised(matrix, columns, name)
        if float(s[: columns - _OVERSAMPLING].square().sum()) >= energy * total:
            return _cut(u, s, vt, columns - _OVERSAMPLING, energy, total, "randomised SVD")
        columns *= 2
    return None


def _randomised(matrix: Tensor, columns: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """About the largest singular triples: of what the matrix makes of random vectors, refined by power iteration."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], columns, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(_PASSES):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    inner, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ inner, s, vt


def _cut(u: Tensor, s: Tensor, vt: Tensor, most: int, energy: float | None, total: float, how: str) -> Factors:
    """The leading triples as b = u √s, a = √s vᵀ, so that both factors are of like size."""
    floor = _SAFETY * torch.finfo(s.dtype).eps * max(u.shape[0], vt.shape[1]) * float(s[0]) if len(s) else 0.0
    count = min(most, int((s > floor).sum()))
    if energy is not None:
        kept = s[:count].square().cumsum(0)
        count = min(count, int((kept < energy * total).sum()) + 1)
    roots = s[:count].sqrt()
    return Factors(u[:, :count] * roots, roots[:, None] * vt[:count], how)
