"""Small files of strangers: bounds on size and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_CONFIG = 16 << 20  # bytes: ten times the largest config, with the names of its classes
MOST_TOKENIZER = 128 << 20  # the largest have 33 MB; read, each byte takes about ten of memory
MOST_INDEX = 128 << 20
_MOST_DEPTH = 64  # lists and objects in each other: configs have 4, tokenizers 8


def read_bounded(path: Path, most: int) -> bytes:
    """A file's content. Raises OSError, and ValueError where it has more than `most` bytes, which are not read."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes, which no such file needs: refused")
    return content


def parse_bounded(content: bytes | str) -> Any:
    """JSON. Raises ValueError for what is none, or nested deeper than any code that walks through it may bear."""
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested without end: refused") from None
    level: list[Any] = [[found]]
    for _ in range(_MOST_DEPTH + 1):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return found
    raise ValueError(f"it is nested deeper than {_MOST_DEPTH} levels: refused")
