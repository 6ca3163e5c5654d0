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
    state = {"running": True}

    def interrupt() -> None:
        with lock:
            if state["running"]:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(own, ctypes.py_object(TimeoutError))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            state["running"] = False
        ctypes.pythonapi.PyThreadState_SetAsyncExc(own, None)  # one that has not arrived yet
        timer.cancel()
