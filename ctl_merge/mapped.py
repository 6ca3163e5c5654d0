"""Pieces of files as memory, without a copy."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any, Protocol

import numpy as np

# Of Linux 5.14: brings the pages in, and says with an error what an access would end the process for, with SIGBUS: a
# file that has become shorter, a disk that does not read. It is not among the constants of Python's mmap.
_POPULATE_READ = 22


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


class InPlace(Protocol):
    """Bytes that are worked on where they lie."""

    def bytes(self, start: int, size: int) -> np.ndarray | None: ...


class MappedFile:
    """A piece of an open file as memory: `size` bytes from `offset` on.

    Half of what reading from the page cache costs is the copy, which this leaves out. It takes no anonymous memory. A
    file that is cut short while its bytes are worked on still ends the process, which loses nothing, as no output of a
    merge is in its place by then. Raises OSError or ValueError where there is no such way to a file.
    """

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        if sys.platform != "linux":
            raise OSError("only Linux has a way that fails with an error")
        before = offset % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(descriptor, before + size, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset - before)
        self._memory, self._before = np.frombuffer(pages, np.uint8), before

    def bytes(self, start: int, size: int) -> np.ndarray | None:
        """Those from `start` on, as uint8, in memory now; None if they cannot be read, or are not aligned."""
        begin = self._before + start
        found = self._memory[begin : begin + size]
        address = found.ctypes.data
        skipped = address % mmap.PAGESIZE
        if address % 2 or _madvise()(address - skipped, size + skipped, _POPULATE_READ) != 0:
            return None
        return found
