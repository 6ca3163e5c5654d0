"""Runs that are killed: at each of their file operations or HTTP requests, and at random instants.

A run happens in a forked process, which shares the imports of this one. `operations` counts what it does to the file
system below a folder, or its requests and their answers; `killed_before` makes the process kill itself, with SIGKILL,
right before one of these; `killed_after` kills it from outside after some time. What is left on the disk, or on the
Hub, is what a crash leaves. `kill_at` and `kill_at_instants` do so to a scenario again and again, and `kills` counts
it by the file of the test.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol

import torch

_CHANGES = {f"os.{name}" for name in ("rename", "mkdir", "remove", "rmdir", "link", "symlink", "truncate")}
_CALLS = ("pwrite", "posix_fallocate", "ftruncate", "fsync", "sendfile")  # of which Python tells no auditor
_GIVEN_UP = 120.0  # seconds after which a run counts as hanging

Run = Callable[[], Any]
Watched = Path | Literal["requests"]  # below which folder operations count; or what is asked of the Hub
kills: Counter[str] = Counter()


class Scenario(Protocol):
    """A run that can be killed: what stands before it, it, what a kill may leave, and the run after."""

    def prepare(self) -> None: ...
    def run(self) -> None: ...
    def check_aftermath(self) -> None: ...
    def go_on(self) -> None: ...


def kill_at(
    scenario: Scenario, watched: Watched, chosen: Callable[[int], bool], again: Callable[[int], bool] | None = None
) -> int:
    """Kill a run before each chosen operation and go on; `again(total)` may kill once more. How many kills."""
    scenario.prepare()
    total, count = operations(scenario.run, watched), 0
    for operation in filter(chosen, range(total)):
        scenario.prepare()
        count += killed_before(scenario.run, watched, operation)
        scenario.check_aftermath()
        if again is not None:
            count += again(total)
            scenario.check_aftermath()
        scenario.go_on()
    return count


def kill_at_instants(scenario: Scenario, draw: Random, runs: int) -> int:
    """Kill a run at random instants and go on. How many kills; the other runs were over by then."""
    scenario.prepare()
    start = time.monotonic()
    code, told = _forked(scenario.run, None)
    assert code == 0, told
    length, count = time.monotonic() - start, 0
    for _ in range(runs):
        scenario.prepare()
        count += killed_after(scenario.run, draw.uniform(0, length))
        scenario.check_aftermath()
        scenario.go_on()
    return count


class _Watch:
    """Counts operations; at the chosen one the process ends."""

    def __init__(self, watched: Watched, last: int | None) -> None:
        self.folder, self.last, self.count = str(watched), last, 0
        self._start = self._watch_requests if watched == "requests" else self._watch_files
        self._lock = threading.Lock()

    def start(self) -> None:
        self._start()

    def _watch_requests(self) -> None:
        from huggingface_hub.utils import close_session, get_session

        close_session()  # the connections are the parent's
        client: Any = type(get_session())  # of httpx or of httpx2
        real = client.send

        def counted(*args: Any, **options: Any) -> Any:
            self._tick()
            answer = real(*args, **options)
            self._tick()  # the Hub has done it, and nobody here knows
            return answer

        client.send = counted

    def _watch_files(self) -> None:
        for name in _CALLS:
            self._wrap(name)
        sys.addaudithook(self._hear)

    def _wrap(self, name: str) -> None:
        real = getattr(os, name)

        def counted(*args: Any) -> Any:
            self._tick()
            return real(*args)

        setattr(os, name, counted)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes and not (isinstance(mode, str) and set("wax+") & set(mode)):
                return
        elif event in _CHANGES:
            path = args[0]
        else:
            return
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.folder):
            self._tick()

    def _tick(self) -> None:
        with self._lock:
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(1)  # until it comes
            self.count += 1


def operations(run: Run, watched: Watched) -> int:
    """How many operations the run does, left to itself. Raises AssertionError if it fails."""
    code, told = _forked(run, _Watch(watched, None))
    assert code == 0, told
    return int(told)


def killed_before(run: Run, watched: Watched, operation: int) -> bool:
    """Whether the run was killed before this operation (from 0), or was over by then."""
    return _ended(*_forked(run, _Watch(watched, operation)))


def killed_after(run: Run, seconds: float) -> bool:
    """Whether the run was killed after that time, or was over by then."""
    return _ended(*_forked(run, None, seconds))


def _ended(code: int, told: str) -> bool:
    assert code in (0, -signal.SIGKILL), told
    kills[os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]] += code != 0
    return code != 0


def _forked(run: Run, watch: _Watch | None, seconds: float = _GIVEN_UP) -> tuple[int, str]:
    """The run's exit code, negative for a signal, and what it tells: its number of operations, or its traceback."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os._exit(_as_child(run, watch, writer))
    os.close(writer)
    started = time.monotonic()
    limit = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    limit.start()
    with os.fdopen(reader, encoding="utf-8") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    limit.cancel()
    limit.join()
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL and watch is not None and time.monotonic() - started >= seconds:
        raise AssertionError(f"the run did not end within {seconds:g} seconds")
    return code, told


def _as_child(run: Run, watch: _Watch | None, writer: int) -> int:
    torch.set_num_threads(1)  # a team of OpenMP that worked before the fork has no threads here, and is waited for
    try:
        if watch:
            watch.start()
        run()
        os.write(writer, str(watch.count if watch else 0).encode())
        return 0
    except BaseException:
        os.write(writer, traceback.format_exc()[-4000:].encode())
        return 1
