"""Texts for a probe that is given none."""

from __future__ import annotations

import random
from string import ascii_lowercase

MOST_LINES = 20_000


def default_texts(lines: int = MOST_LINES) -> dict[str, str]:
    """The shipped tasks as text, one set each: `cycle: kdmqa -> akdmq` and `shift: kdmqa -> lenrb`.

    Fewer lines are the first ones of more.
    """
    generator = random.Random(0)
    words = ["".join(generator.sample(ascii_lowercase, generator.randint(4, 7))) for _ in range(lines)]
    after = dict(zip(ascii_lowercase, ascii_lowercase[1:] + "a", strict=True))
    return {
        "cycle": "\n".join(f"cycle: {word} -> {word[-1]}{word[:-1]}" for word in words),
        "shift": "\n".join(f"shift: {word} -> {''.join(after[c] for c in word)}" for word in words),
    }
