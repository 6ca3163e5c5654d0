"""Lengths and angles of whole tensors, by inner products."""

from __future__ import annotations

from ctl_merge.deferred import Tensor, torch
from ctl_merge.methods.parameters import Parameters
from ctl_merge.methods.registry import Scope


def whole_tensor(parameters: Parameters) -> Scope | None:
    """The scope of a measure that every tensor needs."""
    return "tensor"


def gram(tensors: Tensor, **_: object) -> Tensor:
    """Inner products of the models' chunks in float64: (models, n) -> (models, models)."""
    flat = tensors.reshape(len(tensors), -1).double()
    return flat @ flat.T


def lengths(products: Tensor) -> Tensor:
    """Norms from inner products: (models, models, *rest) -> (models, *rest)."""
    return torch.stack([products[model, model] for model in range(len(products))]).sqrt()


def cosines(products: Tensor) -> Tensor:
    """Cosines from inner products, 0 where a tensor is zero: (models, models, *rest) -> the same shape."""
    norms = lengths(products)
    product = norms.unsqueeze(0) * norms.unsqueeze(1)
    return torch.where(product > 0, products / product.clamp_min(1e-300), 0.0).clamp(-1.0, 1.0)


def cosine(products: Tensor, numel: int, **_: object) -> Tensor:
    """The cosine of the angle between two tensors: (2, 2) -> ()."""
    return cosines(products)[0, 1]
