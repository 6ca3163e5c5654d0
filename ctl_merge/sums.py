"""Additive states of a measure, summed over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

from ctl_merge.deferred import Tensor
from ctl_merge.processes import Ranks


def total(parts: Iterable[tuple[int, Tensor]], ranks: Ranks) -> Tensor:
    """The sum of all ranks' states, numbered by tensor and in order: the same bits however many ranks there are.

    Counts are added up as they come: whole numbers have one sum. Numbers that are rounded are gathered, a few for each
    tensor, and added in the order of the tensors. There is at least one.
    """
    if ranks.count == 1:
        return _sum(state for _, state in parts)
    rounded: dict[int, Tensor] = {}
    counted: list[Tensor] = []
    for index, state in parts:
        if state.is_floating_point():
            rounded[index] = state
        else:
            counted = [_sum([*counted, state])]
    found = ranks.gather((rounded, counted))
    every = {index: state for own, _ in found for index, state in own.items()}
    return _sum([*(every[index] for index in sorted(every)), *(state for _, own in found for state in own)])


def _sum(states: Iterable[Tensor]) -> Tensor:
    """In their order, into the first of them."""
    return reduce(Tensor.add_, states)
