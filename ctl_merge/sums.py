"""Additive states of a measure, summed over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import iadd

import numpy as np

from ctl_merge.deferred import Tensor, torch
from ctl_merge.processes import Ranks

State = Tensor | np.ndarray


def total(parts: Iterable[tuple[int, State]], ranks: Ranks) -> State:
    """The sum of all ranks' states, numbered by tensor and in order: the same bits however many ranks there are.

    Counts are added up as they come: whole numbers have one sum. Numbers that are rounded are gathered, a few for each
    tensor, and added in the order of the tensors. There is at least one.
    """
    if ranks.count == 1:
        return _sum(state for _, state in parts)
    rounded: dict[int, State] = {}
    counted: list[State] = []
    for index, state in parts:
        if "float" in str(state.dtype):
            rounded[index] = state
        else:
            counted = [_sum([*counted, state])]
    found = ranks.gather((rounded, counted))
    every = {index: state for own, _ in found for index, state in own.items()}
    return _sum([*(every[index] for index in sorted(every)), *(state for _, own in found for state in own)])


def _sum(states: Iterable[State]) -> State:
    """In their order, into the first of them."""
    return reduce(_add, states)


def _add(total: State, state: State) -> State:
    # Of ranks whose machines differ some have compiled loops, and arrays, and some have tensors.
    if isinstance(total, np.ndarray) != isinstance(state, np.ndarray):
        total, state = torch.as_tensor(total), torch.as_tensor(state)
    return iadd(total, state)
