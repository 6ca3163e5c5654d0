"""How much a machine reads, writes and hashes a second."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from ctl_merge.output import disk_errors

_PIECE = 1 << 20  # bytes read or written at once
_SECONDS = 0.2  # for each thing that is measured, about

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Rates:
    """Bytes a second with all workers. `cold`, `disk`: without help from the kernel's cache; None: not met."""

    warm: float
    cold: float | None
    warm_share: float  # of what is read, that is in the kernel's cache now
    write: float
    disk: float
    hash: float


def measure_rates(files: list[Path], output: Path, workers: int, mapped: Map) -> Rates:
    """Measured with so many workers on these files, those that are there, and beside the output."""
    warm, cold, share = _read_rates([path for path in files if path.is_file()], workers, mapped)
    write, disk = _write_rates(output, workers, mapped)
    return Rates(warm, cold, share, write, disk, _hash_rate(workers, mapped))


def _read_rates(files: list[Path], workers: int, mapped: Map) -> tuple[float, float | None, float]:
    """Bytes a second of pieces all over the files: those in the kernel's cache, the others; the first's share."""
    places = [(path, at) for path in files for at in range(0, max(1, path.stat().st_size - _PIECE), _PIECE)]
    chosen = places[:: max(1, len(places) // 256)]
    begun, found = time.perf_counter(), []
    for result in mapped(_read_piece, chosen):
        found.append(result)
        if time.perf_counter() - begun > 3 * _SECONDS:
            break
    rates: dict[bool, float | None] = {}
    for cached in (True, False):
        own = [(size, seconds) for size, seconds, was in found if was is cached and size]
        # From the second reading of a piece on it is in the cache: what is cold now is read again warm.
        rates[cached] = sum(s for s, _ in own) / max(1e-9, sum(t for _, t in own)) * workers if own else None
    share = sum(was for *_, was in found) / max(1, len(found))
    if rates[True] is None:
        again = [_read_piece(place) for place in chosen[: max(1, len(found))]]
        rates[True] = sum(s for s, *_ in again) / max(1e-9, sum(t for _, t, _ in again)) * workers if again else 1e9
    return rates[True] or 1e9, rates[False], share if found else 1.0


def _read_piece(place: tuple[Path, int]) -> tuple[int, float, bool]:
    """Bytes, seconds, and whether they were in the kernel's cache."""
    path, at = place
    descriptor = os.open(path, os.O_RDONLY)
    buffer = memoryview(bytearray(_PIECE))
    try:
        try:
            os.preadv(descriptor, [buffer[:4096]], at + _PIECE // 2, os.RWF_NOWAIT)
            cached = True
        except OSError as error:
            cached = error.errno != errno.EAGAIN
        begun = time.perf_counter()
        size = os.preadv(descriptor, [buffer], at)
        return size, time.perf_counter() - begun, cached
    finally:
        os.close(descriptor)


def _write_rates(output: Path, workers: int, mapped: Map) -> tuple[float, float]:
    """Bytes a second into a new file beside the output, with their sums; and down to the disk."""
    place = next(parent for parent in Path(os.path.abspath(output)).parents if parent.is_dir())
    data = os.urandom(_PIECE)
    with disk_errors(place), tempfile.TemporaryFile(dir=place) as file:

        def write(index: int) -> int:
            xxh3_64_intdigest(data)
            return os.pwrite(file.fileno(), data, index * _PIECE)

        size, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < _SECONDS and size < 256 * _PIECE:
            first = size // _PIECE
            size += sum(mapped(write, range(first, first + 8 * workers)))
        written = time.perf_counter()
        os.fdatasync(file.fileno())
        return size / (written - begun), size / (time.perf_counter() - begun)


def _hash_rate(workers: int, mapped: Map) -> float:
    data = bytes(4 * _PIECE)
    begun = time.perf_counter()
    for _ in mapped(lambda _: hashlib.sha256(data).digest(), range(2 * workers)):
        pass
    return 2 * workers * len(data) / (time.perf_counter() - begun)


def dirty_limit() -> int:
    """Bytes that the kernel keeps in memory before whoever writes has to wait for the disk."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
        pages = next(int(line.split()[1]) for line in lines if line.startswith("nr_dirty_threshold "))
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, StopIteration):
        return 0
