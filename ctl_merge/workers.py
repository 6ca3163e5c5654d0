"""A map over threads, in order, that runs little ahead."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from ctl_merge.deferred import torch

T = TypeVar("T")
R = TypeVar("R")

_thread = threading.local()  # `usual` in a pool's thread: where torch's number of threads before is to be noted
_lock = threading.Lock()


@contextmanager
def pool(workers: int) -> Iterator[Callable[[Callable[[T], R], Iterable[T]], Iterator[R]]]:
    """A `map` over threads that yields results in order and holds at most a few ahead; the first error ends it.

    Each thread computes with one torch thread: the work is parallel over tensors already.
    """
    usual = [torch.get_num_threads()] if "torch" in sys.modules else []
    executor = ThreadPoolExecutor(workers, thread_name_prefix="merge", initializer=_join, initargs=(usual,))

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
        if usual:
            torch.set_num_threads(usual[0])


def _join(usual: list[int]) -> None:
    _thread.usual = usual
    if "torch" in sys.modules:
        compute_alone()


def compute_alone() -> None:
    """Let a pool's thread compute with one torch thread: to be called where it may be the first to use torch."""
    usual = _thread.__dict__.pop("usual", None)
    if usual is not None:
        with _lock:
            usual.append(torch.get_num_threads())
            torch.set_num_threads(1)
