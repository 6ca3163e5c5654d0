"""Rubbish, and valid documents with rubbish in them."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", ".", "..", "../..", "/", "/etc/passwd", "~", "a/../../b", "\x00", "\n", "-1", "1e999",
                     "\ud7ff", "{{ 7 * 7 }}",
                     "{% for x in range(10**9) %}x{% endfor %}", "[[", "(a+)+$", "x" * 300]),
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), TEXTS, st.floats(),
    st.sampled_from([0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 10**400]), st.integers(-(2**70), 2**70),
)  # fmt: skip
RUBBISH = st.recursive(
    LEAVES, lambda own: st.lists(own, max_size=3) | st.dictionaries(TEXTS, own, max_size=3), max_leaves=6
)


def places(value: Any, above: Path = ()) -> Iterator[Path]:
    """Where the values of a document stand, the document itself first."""
    yield above
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*above, key))


@st.composite
def damaged(draw: Any, valid: Any) -> Any:
    """The valid document after one to three edits: a value replaced, removed, or put under another name."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document))))
        if not path:
            document = draw(RUBBISH) if draw(st.integers(0, 20)) == 0 else document
            continue
        parent = document
        for step in path[:-1]:
            parent = parent[step]
        edit = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if edit == "replace":
            parent[path[-1]] = draw(RUBBISH)
        elif edit == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(TEXTS)] = parent.pop(path[-1])
        else:
            parent.append(draw(RUBBISH))
    return document


@st.composite
def cut_up(draw: Any, valid: bytes) -> bytes:
    """The valid bytes with one to three pieces overwritten, left out or put in."""
    data = valid
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 16))
        data = data[:at] + draw(st.binary(max_size=16)) + data[at + length :]
    return data


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError where the block computes for longer, whatever else the machine does."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
