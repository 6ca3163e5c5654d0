"""Text that terminals and pasted reports may have."""

from __future__ import annotations

import json
import os
import re

# Control characters but tabs and ends of lines; what turns the direction of text, ends lines for some programs or is
# not to be seen; and halves of characters, which no stream can encode.
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST_TOKEN = 8
_LONG = re.compile(r"(.{1500}).{3000,}(.{500})")  # a line with something in it that nobody reads


def inert(text: str) -> str:
    """The text with what a terminal would obey written out, as in `\\x1b`."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def inert_json(text: str) -> str:
    """A JSON document with what a terminal would obey escaped: it is read as the same values."""
    return _CONTROLS.sub(lambda match: json.dumps(match[0])[1:-1], text)


def shown(text: str) -> str:
    """The text with nothing that a terminal obeys, no endless line, no token, and `~` for the home directory."""
    text = _LONG.sub(r"\1 … \2", text)
    text = inert(text)
    for name in _TOKENS:
        if len(token := os.environ.get(name, "").strip()) >= _SHORTEST_TOKEN:
            text = text.replace(token, f"${name}")
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(?<![\w/.-]){re.escape(home)}(?![\w.-])", "~", text) if home else text
