"""Rows as questions: prompts with answers, choices, tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from ctl_merge.errors import DataError
from ctl_merge.probing.data import as_text, is_null
from ctl_merge.probing.rows import DataSpec, read_rows

# How a completed function of HumanEval's kind ends: with the next statement that is not indented.
FUNCTION_ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")


@dataclass(frozen=True)
class Question:
    """A prompt with the answer that is right."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Choice:
    """A prompt with its possible answers, of which the one at `right` is."""

    prompt: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Problem:
    """A prompt for a program. `before` and `after` stand around the answer when it is run."""

    prompt: str
    before: str
    after: str
    stop: tuple[str, ...] = ()


def questions(spec: DataSpec, count: int, join: str = "\n") -> list[Question]:
    """The last column is the answer, those before it the prompt. Raises DataError."""

    def make(row: Sequence[Any]) -> Question:
        texts = [as_text(spec, column, value) for column, value in zip(spec.columns, row, strict=True)]
        return Question(join.join(texts[:-1]) + join, texts[-1])

    return list(_each(spec, count, 2, make))


def choices(spec: DataSpec, count: int, join: str = "\n") -> list[Choice]:
    """The last two columns are the choices and which is right: its number from 0, its letter or label, or its text.

    Choices are a list, or `{"text": […], "label": […]}`. Raises DataError.
    """

    def make(row: Sequence[Any]) -> Choice:
        *prompt, listed, right = row
        labels = listed.get("label") if isinstance(listed, Mapping) else None
        texts = listed.get("text") if isinstance(listed, Mapping) else listed
        if not isinstance(texts, list | tuple) or len(texts) < 2 or not all(isinstance(t, str) for t in texts):
            raise DataError(
                f"{spec.name}: the column {spec.columns[-2]!r} is no list of choices, two at least: {texts!r}"
            )
        at = _right(right, texts, labels)
        if at is None:
            raise DataError(f"{spec.name}: {right!r} is none of the choices {texts!r}, nor the number or letter of one")
        asked = (as_text(spec, c, v) for c, v in zip(spec.columns, prompt, strict=False))
        return Choice(join.join(asked) + join, tuple(texts), at)

    return list(_each(spec, count, 3, make))


def _right(right: Any, texts: Sequence[str], labels: Any) -> int | None:
    if isinstance(right, int) and not isinstance(right, bool):
        return right if 0 <= right < len(texts) else None
    known = [str(label) for label in labels] if labels else list(ascii_uppercase[: len(texts)])
    for names in (texts, known, [str(i) for i in range(len(texts))]):
        if right in names:
            return list(names).index(right)
    return None


def problems(spec: DataSpec, count: int) -> list[Problem]:
    """Problems of HumanEval's kind (prompt, test, entry_point) or of MBPP's (text, test_list). Raises DataError."""

    def make(row: Sequence[Any]) -> Problem:
        prompt, tests = as_text(spec, spec.columns[0], row[0]), row[1]
        if len(row) == 3:
            test = as_text(spec, spec.columns[1], tests)
            return Problem(prompt, prompt, f"\n{test}\ncheck({row[2]})\n", FUNCTION_ENDS)
        lines = [tests] if isinstance(tests, str) else tests
        if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
            raise DataError(f"{spec.name}: the column {spec.columns[1]!r} holds no tests: {tests!r}")
        return Problem(prompt + "\n", "", "\n" + "\n".join(lines) + "\n")

    if len(spec.columns) not in (2, 3):
        raise DataError(f"{spec.name}: programs need the columns prompt,test,entry_point or text,test_list")
    return list(_each(spec, count, 2, make))


def _each(spec: DataSpec, count: int, least: int, make: Callable[[Sequence[Any]], Any]) -> Iterator[Any]:
    """At most `count` rows, as `make` reads the columns that the spec names; rows with a null are skipped."""
    if spec.is_plain_text or len(spec.columns) < least:
        raise DataError(
            f"{spec.name}: name at least {least} columns, the answer last, as in FILE.jsonl:question,answer"
        )
    found = 0
    for row in read_rows(spec):
        missing = [column for column in spec.columns if column not in row]
        if missing:
            raise DataError(f"{spec.name} has no column {missing[0]!r}; it has: {', '.join(row)}")
        values = [row[column] for column in spec.columns]
        if any(map(is_null, values)):
            continue
        yield make(values)
        found += 1
        if found == count:
            return
    if not found:
        raise DataError(f"{spec.name}: there is no row without a null")
