"""The sha256 of files, with progress."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

_PIECE = 1 << 20  # bytes between two words of progress


def sha256_of(path: Path, told: Callable[[int], object] = lambda count: None) -> str:
    """The sha256 of a file, in hexadecimal digits; `told` hears of the bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            told(len(piece))
    return digest.hexdigest()
