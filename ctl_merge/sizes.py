"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of `5GB` (10^9), `5GiB` (2^30) or a plain number. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)\s*", text.upper())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size: write 5GB, 500MB, 20GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(count: float) -> str:
    """`26.03 GB`: bytes in decimal units with three or four digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
