"""Paths of this machine in text that others will read."""

from __future__ import annotations

import os
import re

_PATH = re.compile(r"(?<![\w/.:~>-])(~?/[^\s\"'`<>|,;:)\]}\\]+)")


def local_path(text: str) -> str | None:
    """The first path in the text that leads somewhere on this machine."""
    found = (match.rstrip("./") for match in _PATH.findall(text))
    return next(
        (path for path in found if path.startswith("~/") or (path.count("/") > 1 and os.path.exists(path))), None
    )


def without_paths(text: str) -> str:
    """The text with the last part alone of every absolute path, and of every path in a home directory."""
    return _PATH.sub(lambda match: _last(match[1]), text)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] if path.startswith("~") or path.count("/") > 1 else path
