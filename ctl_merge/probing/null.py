"""A random merge of the same size, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.header import MERGEABLE
from ctl_merge.methods.noise import uniform


class SignFlipped(Checkpoint):
    """base + s ⊙ τ, with independent random signs s: the same size in every tensor as the parent's τ, and no task."""

    def __init__(self, base: Checkpoint, parent: Checkpoint, seed: int = 0) -> None:
        self.name, self.base, self.parent, self.seed = f"{parent.name} with random signs", base, parent, seed
        self.tensors, self.config = base.tensors, base.config

    @property
    def code(self) -> Path | None:
        return self.base.code

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        self.base.read_into(tensor, out, start)
        if self.tensors[tensor].dtype not in MERGEABLE:
            return
        other = torch.empty_like(out)
        self.parent.read_into(tensor, other, start)
        signs = uniform(self.seed, self.name, tensor, start, out.numel()).sub_(0.5).sign_()
        out.add_((other - out).mul_(signs.to(out.dtype)))


class Combination(Checkpoint):
    """base + Σ c_i τ_i."""

    def __init__(self, base: Checkpoint, parents: Sequence[Checkpoint], coefficients: Sequence[float]) -> None:
        self.name, self.base, self.parents = f"a combination on {base.name}", base, parents
        self.coefficients = coefficients
        self.tensors, self.config = base.tensors, base.config

    @property
    def code(self) -> Path | None:
        return self.base.code

    def block(self, tensor: str) -> int:
        return max(checkpoint.block(tensor) for checkpoint in (self.base, *self.parents))

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        self.base.read_into(tensor, out, start)
        if self.tensors[tensor].dtype not in MERGEABLE:
            return
        step = self.block(tensor)
        for begin in range(0, out.numel(), step):
            piece = out[begin : begin + step]
            own, other = piece.clone(), torch.empty_like(piece)
            for parent, coefficient in zip(self.parents, self.coefficients, strict=True):
                parent.read_into(tensor, other, start + begin)
                piece.add_(other - own, alpha=coefficient)
