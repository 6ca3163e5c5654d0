"""Text that terminals and pasted reports may have."""

from __future__ import annotations

import os
import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and ends of lines
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST_TOKEN = 8
_LONG = re.compile(r"(.{1500}).{3000,}(.{500})")  # a line with something in it that nobody reads


def shown(text: str) -> str:
    """The text with nothing that a terminal obeys, no endless line, no token, and `~` for the home directory."""
    text = _LONG.sub(r"\1 … \2", text)
    text = _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)
    for name in _TOKENS:
        if len(token := os.environ.get(name, "").strip()) >= _SHORTEST_TOKEN:
            text = text.replace(token, f"${name}")
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(?<![\w/.-]){re.escape(home)}(?![\w.-])", "~", text) if home else text
