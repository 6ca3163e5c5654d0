"""Rows as text, with what is prompt and what response."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

from ctl_merge.errors import DataError
from ctl_merge.time_limit import interrupted_after

PROMPT, RESPONSE = "prompt", "response"
_ROLES = ("user", "assistant")
_REFUSALS = (ArithmeticError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
_SECONDS = 10.0  # that a template may take for one row
_MOST = 1000  # characters that it may make of each one of the row, and of a thousand for itself


@dataclass(frozen=True)
class Text:
    """A text, and the spans [start, end) of characters that are prompt or response, in order; the rest is neither."""

    text: str
    spans: tuple[tuple[int, int, str], ...] = ()


def joined(values: Sequence[str], answered: bool, join: str, end: str) -> Text:
    """The columns of a row with `join` between them, and `end` after them.

    `answered`: the last column, and the end, are the response; all before is the prompt.
    """
    text = join.join(values) + end
    if not answered:
        return Text(text)
    middle = len(text) - len(values[-1]) - len(end)
    return Text(text, ((0, middle, PROMPT), (middle, len(text), RESPONSE)))


def turns(values: Sequence[str]) -> list[dict[str, str]]:
    """The columns of a row as messages of user and assistant in turn."""
    return [{"role": role, "content": value} for role, value in zip(cycle(_ROLES), values, strict=False)]


def is_conversation(value: Any) -> bool:
    """Whether a column holds messages already: `{"role": …, "content": …}` each."""
    return isinstance(value, list | tuple) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )


def templated(messages: Sequence[Mapping[str, str]], tokenizer: Any, name: str) -> Text:
    """Messages under the tokenizer's chat template.

    What the assistant says is the response, what all others say the prompt; what the template adds is neither. It is
    known by rendering marks in the contents' place; of a template that alters contents otherwise than by stripping
    them, nothing is known, and the text has no spans. Raises DataError where the template is missing or refuses.
    """
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    text = _render(plain, tokenizer, name)
    marks = [f"\ue000{i}\ue001" for i in range(len(plain))]
    left = _render([{**m, "content": mark} for m, mark in zip(plain, marks, strict=True)], tokenizer, name)
    between = []
    for mark in marks:
        before, found, left = left.partition(mark)
        if not found:
            return Text(text)
        between.append(before)
    kept: Callable[[str], str] = str
    for of_user, of_assistant in product((kept, str.strip), repeat=2):
        rendered, spans = "", []
        for message, before in zip(plain, between, strict=True):
            answer = message["role"] == "assistant"
            start = len(rendered) + len(before)
            rendered += before + (of_assistant if answer else of_user)(message["content"])
            spans.append((start, len(rendered), RESPONSE if answer else PROMPT))
        if rendered + left == text:
            return Text(text, tuple(spans))
    return Text(text)


def _render(messages: Sequence[Mapping[str, str]], tokenizer: Any, name: str) -> str:
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{name}: the tokenizer has no chat template: leave --chat out")
    try:
        with interrupted_after(_SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TimeoutError:
        raise DataError(f"{name}: the chat template does not end within {_SECONDS} seconds of one row") from None
    except MemoryError:
        raise DataError(f"{name}: the chat template takes more memory than there is") from None
    except (*_REFUSALS, jinja2.TemplateError) as error:
        raise DataError(f"{name}: the chat template refuses a row ({str(error) or type(error).__name__})") from None
    if len(text) > _MOST * (1000 + sum(len(m["content"]) for m in messages)):
        raise DataError(f"{name}: the chat template makes {len(text):,} characters of one row")
    return text
