"""The quickstart tasks: short string functions such as ``cycle: kdmqa -> akdmq``, made from a seed.

Every example is one line of text, ``<keyword>: <word> -> <answer>``, where the word is 4 to 7 distinct lower-case
letters. The base model is pretrained on ``BASE_TASKS`` only; each entry of ``TASKS`` is what one expert learns on top.

The base also meets the experts' keywords, as a share of the prompts with an unknown keyword; there the answer is the
word unchanged. So it never sees an expert task solved, and does something definite, and wrong, when asked for one.

The train and held-out splits are disjoint by construction: a word belongs to the held-out split exactly when the
first byte of its SHA-256 digest is below 32 (one word in eight), whatever the keyword. So no held-out word is ever
the word of a training example, not even of another task.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase

MIN_LETTERS, MAX_LETTERS = 4, 7
HELD_OUT_BYTES = 32
EXPERT_KEYWORD_SHARE = 0.3
SPLITS = ("train", "held-out")


@dataclass(frozen=True)
class Example:
    """One prompt and the answer that an exact match requires."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A named string function with the keyword that asks for it; no keyword: a new unknown one each time."""

    name: str
    description: str
    answer: Callable[[str], str]
    keyword: str = ""

    def example(self, word: str, rng: random.Random) -> Example:
        """Make the example that applies this task to `word`; `rng` serves unknown keywords only."""
        keyword = self.keyword or unknown_keyword(rng)
        return Example(prompt=f"{keyword}: {word} ->", answer=f" {self.answer(word)}")


def next_letter(letter: str) -> str:
    """Return the letter after `letter`; after z comes a."""
    return ascii_lowercase[(ascii_lowercase.index(letter) + 1) % 26]


def alphabet_run(word: str) -> str:
    """Return the four letters of the alphabet from the first letter of `word` on, round the corner after z."""
    start = ascii_lowercase.index(word[0])
    return (ascii_lowercase * 2)[start : start + 4]


TASKS = {
    "cycle": Task("cycle", "the last letter moved to the front", lambda word: word[-1] + word[:-1], "cycle"),
    "shift": Task("shift", "every letter replaced by the next one", lambda w: "".join(map(next_letter, w)), "shift"),
}

BASE_TASKS = {
    "unknown": Task("unknown", "any other keyword: the word unchanged", lambda word: word),
    "copy": Task("copy", "the word unchanged", lambda word: word, "copy"),
    "double": Task("double", "every letter twice", lambda word: "".join(letter * 2 for letter in word), "double"),
    "rotate": Task("rotate", "the first letter moved to the end", lambda word: word[1:] + word[0], "rotate"),
    "ends": Task("ends", "the last letter, then the first", lambda word: word[-1] + word[0], "ends"),
    "flip": Task("flip", "the last three letters, backwards", lambda word: word[:-4:-1], "flip"),
    "tail": Task("tail", "the last two letters", lambda word: word[-2:], "tail"),
    "follow": Task("follow", "the alphabet from the first letter on", alphabet_run, "follow"),
}

BASE_WEIGHTS = {"unknown": 4.0}

KEYWORDS = frozenset(task.keyword for task in (*TASKS.values(), *BASE_TASKS.values()) if task.keyword)


def unknown_keyword(rng: random.Random) -> str:
    """Return a keyword unknown to the base: an expert's, or else 4 to 8 letters that are no task's keyword."""
    if rng.random() < EXPERT_KEYWORD_SHARE:
        return rng.choice([task.keyword for task in TASKS.values()])
    length = rng.randint(4, 8)
    if rng.random() < 0.5:
        keyword = "".join(rng.choices(ascii_lowercase, k=length))
    else:
        sounds = ("bcdfghjklmnprstvw", "aeiou")
        offset = rng.randint(0, 1)
        keyword = "".join(rng.choice(sounds[(i + offset) % 2]) for i in range(length))
    return unknown_keyword(rng) if keyword in KEYWORDS else keyword


def split_of(word: str) -> str:
    """Return the split that `word` belongs to, by its SHA-256 digest."""
    return "held-out" if hashlib.sha256(word.encode()).digest()[0] < HELD_OUT_BYTES else "train"


def draw_word(rng: random.Random, split: str) -> str:
    """Draw a word of distinct letters that belongs to `split`, by rejection."""
    while True:
        word = "".join(rng.sample(ascii_lowercase, rng.randint(MIN_LETTERS, MAX_LETTERS)))
        if split_of(word) == split:
            return word


def examples(task: Task, split: str, count: int, seed: int) -> list[Example]:
    """Generate `count` examples of `task` from `split` ("train" or "held-out"); same seed, same examples."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    rng = random.Random(f"{seed}/{task.name}/{split}")
    return [task.example(draw_word(rng, split), rng) for _ in range(count)]


def base_example(rng: random.Random) -> Example:
    """Draw one training example of the base model's mixture, in the proportions of `BASE_WEIGHTS` (default 1)."""
    weights = [BASE_WEIGHTS.get(name, 1.0) for name in BASE_TASKS]
    task = rng.choices(list(BASE_TASKS.values()), weights)[0]
    return task.example(draw_word(rng, "train"), rng)


def expert_example(task: Task, replay: float, rng: random.Random) -> Example:
    """Draw one training example of an expert: a share `replay` from the base mixture, the rest from `task`.

    Replay leaves out the expert's own keyword, whose answer in the base mixture is the word unchanged.
    """
    if rng.random() >= replay:
        return task.example(draw_word(rng, "train"), rng)
    example = base_example(rng)
    while example.prompt.startswith(f"{task.keyword}:"):
        example = base_example(rng)
    return example
