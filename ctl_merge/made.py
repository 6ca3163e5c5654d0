"""Tensors that no model stores, made when read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.header import TensorSpec
from ctl_merge.methods.noise import uniform
from ctl_merge.reference import ModelRef


@dataclass(frozen=True)
class MadeRef(ModelRef):
    """Names what is made for a merge; no recipe can name it."""


Maker = Callable[[int, int], Tensor]  # (start, count) -> these entries: (count,)


class MadeCheckpoint(FileCheckpoint):
    """Tensors that are functions of a recipe and of its base. `held_bytes`: memory that making them takes."""

    def __init__(
        self, ref: MadeRef, base: FileCheckpoint, specs: Mapping[str, TensorSpec], makers: Mapping[str, Maker],
        held_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.ref, self.name, self.config = ref, str(ref), base.config
        self.folder, self.snapshot, self.file_sizes = base.folder, None, {}
        self.tensors, self._makers, self.held_bytes = specs, makers, held_bytes

    def fetch(self) -> None:
        """Nothing: it lies nowhere."""

    def sources(self) -> dict[ModelRef, FileCheckpoint]:
        return {}

    def read_bytes(self, tensor: str) -> int:
        return 0

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        out.copy_(self._makers[tensor](start, out.numel()))


def zeros(start: int, count: int) -> Tensor:
    return torch.zeros(count)


def uniform_within(bound: float, seed: int, name: str) -> Maker:
    """Uniform random numbers in [-bound, bound), addressed by seed, name and entry."""
    return lambda start, count: (2 * uniform(seed, "", name, start, count).double() - 1) * bound


def normal(seed: int, name: str) -> Maker:
    """Standard normal random numbers, addressed by seed, name and entry.

    The quantiles of uniform numbers with 24 random bits each: the largest is 5.4.
    """
    middle = 2.0**-25  # of an interval of the uniform numbers, so that none is 0, whose quantile is infinite
    return lambda start, count: torch.special.ndtri(uniform(seed, "", name, start, count).double() + middle)


def random_gate(mode: str, seed: int, name: str, width: int) -> Maker:
    """A router's weights before any training: standard normal, or as torch initialises a linear layer of `width`."""
    return normal(seed, name) if mode == "random" else uniform_within(math.sqrt(1 / width), seed, name)
