"""What a command costs: time, memory, bytes; and the least that moving the bytes takes. Linux only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PIECE = 1 << 20  # bytes that the floor moves at once
_INTERVAL = 0.01  # seconds between two looks at a process's memory


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes. `anonymous` and `resident` are peaks over the process and its children together.

    Anonymous memory is what the kernel cannot take back: mapped file pages are in `resident` only. `read` and `written`
    are what the calls asked for, from the page cache or not.
    """

    wall: float
    cpu: float
    anonymous: int = 0
    resident: int = 0
    read: int = 0
    written: int = 0


def cost_of(command: Sequence[str], log: Path | None = None) -> Cost:
    """Run a command to its end. Ends this program, and shows the command's last words, if it fails."""
    with open(log or os.devnull, "w") as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=_environment())
        anonymous = resident = 0
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            found = [_memory(pid) for pid in _family(process.pid)]
            anonymous = max(anonymous, sum(own for own, _ in found))
            resident = max(resident, sum(all_ for _, all_ in found))
            time.sleep(_INTERVAL)
        wall = time.perf_counter() - start
        read, written = _moved(process.pid)  # of a process that has ended and is not yet forgotten
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed: {' '.join(command)}\n{log.read_text()[-2000:] if log else ''}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, anonymous, resident, read, written)


def _environment() -> dict[str, str]:
    """As users have it: with modules compiled once, not anew on each start."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _family(pid: int) -> list[int]:
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return [pid]
    return [pid, *(found for text in tasks for child in text.split() for found in _family(int(child)))]


def _memory(pid: int) -> tuple[int, int]:
    """Anonymous and resident bytes of one process; none of one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    found = [re.search(rf"{name}:\s+(\d+) kB", status) for name in ("RssAnon", "VmRSS")]
    anonymous, resident = (int(size[1]) * 1024 if size else 0 for size in found)
    return anonymous, resident


def _moved(pid: int) -> tuple[int, int]:
    try:
        text = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return 0, 0
    found = dict(re.findall(r"(\w+): (\d+)", text))
    return int(found["rchar"]), int(found["wchar"])


def floor(inputs: Iterable[Path], output: Path, size: int, workers: int) -> Cost:
    """Read every byte of the inputs once, and write a new file of `size` bytes, with as many threads as a merge."""
    pieces: list[Callable[[bytearray], int]] = []
    output.unlink(missing_ok=True)
    target = os.open(output, os.O_RDWR | os.O_CREAT, 0o644)
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    total = sum(os.fstat(source).st_size for source in sources)
    for source in sources:
        for at in range(0, os.fstat(source).st_size, PIECE):
            pieces.append(lambda buffer, source=source, at=at: os.preadv(source, [buffer], at))  # type: ignore[misc]
    for at in range(0, size, PIECE):
        pieces.append(lambda buffer, at=at: os.pwrite(target, memoryview(buffer)[: size - at], at))  # type: ignore[misc]
    # Reading and writing lie side by side, as in a merge.
    pieces = [piece for _, piece in sorted(enumerate(pieces), key=lambda p: (p[0] * 2654435761) % 2**32)]

    def move(own: list[Callable[[bytearray], int]]) -> None:
        buffer = bytearray(PIECE)
        for piece in own:
            piece(buffer)

    os.posix_fallocate(target, 0, size)
    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(move, [pieces[worker::workers] for worker in range(workers)]))
    spent = Cost(time.perf_counter() - wall, time.process_time() - cpu, read=total, written=size)
    for descriptor in (*sources, target):
        os.close(descriptor)
    return spent


def warm(paths: Iterable[Path]) -> None:
    """Bring files into the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def drop(paths: Iterable[Path]) -> None:
    """Out of the page cache with files, whose pages are written back first: needs no privilege."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
