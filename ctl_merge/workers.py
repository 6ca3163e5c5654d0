"""A map over threads, in order, that runs little ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def pool(workers: int) -> Iterator[Callable[[Callable[[T], R], Iterable[T]], Iterator[R]]]:
    """A `map` over threads that yields results in order and holds at most a few ahead; the first error ends it.

    Each thread computes with one torch thread: the work is parallel over tensors already.
    """
    executor = ThreadPoolExecutor(workers, thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,))
    threads = torch.get_num_threads()

    def mapped(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        waiting: list[Future[R]] = []
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > 4 * workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()

    try:
        yield mapped
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
