"""Ranks as threads of one process: what several processes do, without the seconds that starting them takes."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ctl_merge.errors import DeviceError
from ctl_merge.processes import Ranks

T = TypeVar("T")


class Meeting:
    """Where threads meet to exchange values."""

    def __init__(self, count: int) -> None:
        self.values: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """A rank that is a thread."""

    meeting: Meeting | None = None

    def gather(self, value: T) -> list[T]:
        assert self.meeting is not None
        try:
            self.meeting.values[self.index] = pickle.dumps(value)  # as between processes
            self.meeting.barrier.wait()
            found = [pickle.loads(pickled) for pickled in self.meeting.values]
            self.meeting.barrier.wait()
        except threading.BrokenBarrierError:
            raise DeviceError("another process of this run has ended") from None
        return found


def run(count: int, work: Callable[[Ranks], T]) -> list[T | Exception]:
    """What `work` returns, or raises, as each of so many ranks. One that raises has ended for the others."""
    meeting = Meeting(count)

    def one(index: int) -> T | Exception:
        try:
            return work(ThreadRanks(index, count, index, count, meeting=meeting))
        except Exception as error:
            if not getattr(error, "agreed", False):
                meeting.barrier.abort()
            return error

    with ThreadPoolExecutor(count) as executor:
        return list(executor.map(one, range(count)))
