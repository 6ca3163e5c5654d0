"""A merge that is interrupted within this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ctl_merge.writer import ShardWriter


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Ctrl-C once so many tensors are written; the block must end by it."""
    real, left = ShardWriter._write_tensor, [after]

    def until(self: ShardWriter, *args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(self, *args)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ShardWriter, "_write_tensor", until)
        yield
