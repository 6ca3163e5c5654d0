"""Lengths and angles of whole tensors, by inner products."""

from __future__ import annotations

from typing import Any

import numpy as np

from ctl_merge.deferred import Tensor, library, torch
from ctl_merge.methods.parameters import Parameters
from ctl_merge.methods.registry import Scope

BLOCK = 1024  # entries that are added up first, as the compiled loops have it


def whole_tensor(parameters: Parameters) -> Scope | None:
    """The scope of a measure that every tensor needs."""
    return "tensor"


def inner(one: Tensor, other: Tensor) -> Tensor:
    """Σ one · other in float64: (n,) twice -> ().

    In an order that a loop can keep to the bit, and that rounds less than one after the other: of blocks of 1024
    entries one half is added to the other until one number is left, and so are the numbers of all blocks; what is
    missing counts as zeros. (Inner products of whole tensors are those of their chunks, added up one after the other.)
    """
    blocks = _padded(one * other, -len(one) % BLOCK).view(-1, BLOCK)
    sums = _halved(blocks)
    return _halved(_padded(sums, (1 << (len(sums) - 1).bit_length()) - len(sums))) + 0.0  # + 0.0: no -0.0


def _padded(terms: Tensor, zeros: int) -> Tensor:
    return torch.nn.functional.pad(terms, (0, zeros)) if zeros else terms


def _halved(terms: Tensor) -> Tensor:
    while terms.shape[-1] > 1:
        first, second = terms.chunk(2, -1)
        terms = first + second
    return terms[..., 0]


def gram(tensors: Tensor, **_: object) -> Tensor:
    """Inner products of the models' chunks: (models, n) -> (models, models) float64."""
    flat = tensors.reshape(len(tensors), -1).double()
    found = flat.new_zeros(len(flat), len(flat))
    for one in range(len(flat)):
        for other in range(one, len(flat)):
            found[one, other] = found[other, one] = inner(flat[one], flat[other])
    return found


def energy(tensors: Tensor, **_: object) -> Tensor:
    """Σ d² of each model: (models, n) -> (models,) float64."""
    return torch.stack([inner(row, row) for row in tensors.reshape(len(tensors), -1).double()])


def energy_shares(energies: Any, numel: int, **_: object) -> Any:
    """Each model's share of the energy, equal ones where there is none or NaN: (models,), of the library given."""
    total = sum(energies.tolist())
    return energies / total if total > 0 else library(energies).full_like(energies, 1 / len(energies))


def lengths(products: Any) -> Any:
    """Norms from inner products: (models, models, *rest) -> (models, *rest), of the library that it is given."""
    own = library(products)
    return own.sqrt(own.stack([products[model, model] for model in range(len(products))]))


def cosines(products: Any) -> Any:
    """Cosines from inner products, 0 where a tensor is zero: (models, models, *rest) -> the same shape and library."""
    norms = lengths(products)
    product = norms[None] * norms[:, None]
    return library(products).where(product > 0, products / product.clip(1e-300), 0.0).clip(-1.0, 1.0)


def cosine(products: Any, numel: int, **_: object) -> np.ndarray:
    """The cosine of the angle between two tensors: (2, 2) -> ()."""
    return np.asarray(cosines(products)[0, 1])
