"""Text as Markdown shows it, whatever signs are in it."""

from __future__ import annotations

import re
from html import escape


def escaped(text: str) -> str:
    """Text on one line that Markdown shows as it is, in tables too."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escape(_one_line(text), quote=False))


def code(text: str, in_table: bool = False) -> str:
    """Text on one line as code."""
    text = _one_line(text).replace("|", r"\|" if in_table else "|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def fenced(text: str, language: str = "") -> str:
    """Lines as a block of code that they cannot close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", text)
