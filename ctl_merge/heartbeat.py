"""Signs of life among the processes of one run."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

from ctl_merge.errors import DeviceError

T = TypeVar("T")

EVERY = 5.0  # seconds from one sign of life to the next
PATIENCE = 600.0  # seconds without one after which a rank that is waited for counts as gone
_TURN = 1.0  # seconds that are waited before the signs are looked at again


class Heartbeat:
    """This rank's signs of life, and what it sees of the others', in the store that the ranks met on.

    A machine that vanishes resets no connection, so that those who wait for it in a collective would wait for good.
    The signs come from a thread: a rank that works for hours gives them too. `machines`: each rank's.
    """

    def __init__(self, index: int, machines: Sequence[str]) -> None:
        self.index, self.machines = index, machines
        self.lost = False  # whether a rank that was waited for has vanished
        self._signs = [0] * len(machines)
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        from torch.distributed import TCPStore

        names = [f"ctl_merge/alive/{rank}" for rank in range(len(self.machines))]
        try:
            store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
            while not self._over.is_set():
                store.add(names[self.index], 1)
                self._signs = [store.add(name, 0) for name in names]
                self._over.wait(EVERY)
        except RuntimeError:  # the store has ended, with its machine or with the run: no more signs are seen
            pass

    def during(self, collective: Callable[[], T]) -> T:
        """What a collective returns, once all ranks have come. Raises DeviceError where one gives no sign of life."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(collective())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="collective", daemon=True).start()
        seen, silent = self._signs, [0.0] * len(self.machines)
        while not wait([future], _TURN).done:
            # Turns are counted, not the clock read: a rank that was itself suspended has not heard the others since.
            now = self._signs
            silent = [s + _TURN if a == b else 0.0 for a, b, s in zip(now, seen, silent, strict=True)]
            seen = now
            if max(silent) >= PATIENCE:
                self.lost = True
                atexit.register(_end)
                raise DeviceError(self._words([rank for rank, time in enumerate(silent) if time >= PATIENCE]))
        return future.result()

    def _words(self, gone: Sequence[int]) -> str:
        if self.index in gone:  # not even its own signs come through
            who = f"the machine that the ranks met on ({os.environ['MASTER_ADDR']})"
        else:
            who = " and ".join(f"rank {rank} on {self.machines[rank]}" for rank in gone)
        return (
            f"no sign of life for {PATIENCE / 60:.3g} minutes from {who}: see to it, and start the run again (a merge "
            "goes on with --resume)"
        )

    def stop(self) -> None:
        """Give no more signs."""
        self._over.set()


def _end() -> None:
    """End this process although a collective is under way: the process group would wait for it, and so for good."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)
