"""Problems of a recipe: their places, and the word meant."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

Place = tuple[str | int, ...]  # keys and indices that lead to a value of the document
Problems = list[tuple[Place, str]]


def nearest(word: str, known: Iterable[str], folder: str = "") -> str:
    """` (did you mean 'x'?)`, or nothing where no known word is near. `folder`: where what is known lies."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {os.path.normpath(os.path.join(folder, found[0]))!r}?)" if found else ""
