"""Code of others, interrupted after some time."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """TimeoutError where the block runs Python code for longer, in whatever thread; no signal is needed.

    A single call into C, such as the multiplication of a text, is not interrupted.
    """
    own, lock = ctypes.c_ulong(threading.get_ident()), threading.Lock()
    state = {"running": True, "sent": False}

    def interrupt() -> None:
        with lock:
            if state["running"]:
                state["sent"] = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(own, ctypes.py_object(TimeoutError))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            state["running"] = False
        # One that was sent may not have arrived yet. To withdraw what was not hangs Python 3.11 under a profiler.
        if state["sent"]:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(own, None)
        timer.cancel()
