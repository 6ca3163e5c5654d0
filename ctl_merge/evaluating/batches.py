"""Batches of like items, shared by ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ctl_merge.processes import Ranks

T = TypeVar("T")


def in_batches(lengths: Sequence[int], batch: int, ranks: Ranks, work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """What `work` finds for each item, in the items' order; it is given the numbers of a batch's items.

    Batches hold items of like length, for little padding, and are dealt to ranks whole: a result depends in its last
    digits on what shares its batch, so that any number of ranks finds the same. Every rank is given all results, and
    raises what any of them raised.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]

    def own() -> list[tuple[int, T]]:
        return [pair for rows in batches[ranks.index :: ranks.count] for pair in zip(rows, work(rows), strict=True)]

    found = dict(pair for part in ranks.gather(ranks.together(own)) for pair in part)
    return [found[item] for item in range(len(lengths))]
