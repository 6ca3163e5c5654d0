"""Token sequences to be predicted: windows, rows, prompts with continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import DataError
from ctl_merge.evaluating.options import TextOptions
from ctl_merge.probing.data import TokenSet, texts_of, tokenised
from ctl_merge.probing.rows import DataSpec
from ctl_merge.probing.texts import default_texts
from ctl_merge.probing.windows import cut_sets

_RESPONSE = 2  # a token's role as `tokenised` numbers it


@dataclass(frozen=True)
class Passage:
    """Token ids (T,), and which of them are predicted and counted (T,) bool: never the first."""

    ids: Tensor
    counted: Tensor


def passages_of(
    specs: Sequence[DataSpec], tokenizer: Any, options: TextOptions, length: int
) -> dict[str, list[Passage]]:
    """The passages of each data set; of the shipped tasks where none is named. Raises DataError."""
    if not (options.rows or options.mask_prompt):
        return {tokens.name: of_windows(tokens) for tokens in cut_sets(specs, tokenizer, options, length)}
    if not specs:
        return {name: list(_lines(text, tokenizer, options, length)) for name, text in default_texts(2000).items()}
    return {spec.name: list(_rows(spec, tokenizer, options, length)) for spec in specs}


def of_windows(tokens: TokenSet) -> list[Passage]:
    """Windows of a probe as passages: every token but the first is counted."""
    counted = torch.ones(tokens.ids.shape[1], dtype=torch.bool)
    counted[0] = False
    return [Passage(ids, counted) for ids in tokens.ids]


def _rows(spec: DataSpec, tokenizer: Any, options: TextOptions, length: int) -> Iterator[Passage]:
    if spec.is_plain_text:
        raise DataError(f"{spec.name}: a text file has no rows: leave --rows and --mask-prompt out")
    affix = [] if options.chat else opening(tokenizer)
    found = 0
    for text in texts_of(spec, tokenizer if options.chat else None):
        if text is None:
            continue
        ids, roles = tokenised(text, tokenizer)
        counted = [role == _RESPONSE if options.mask_prompt else True for role in roles]
        passage = passage_of([*affix, *ids][:length], [*[False] * len(affix), *counted][:length])
        if passage.counted.any():
            yield passage
            found += 1
        if found == options.sequences:
            return
    if not found:
        hint = ": name at least two columns, the last of them the response" if options.mask_prompt else ""
        raise DataError(f"{spec.name}: no row has a token to be predicted within {length} tokens{hint}")


def _lines(text: str, tokenizer: Any, options: TextOptions, length: int) -> Iterator[Passage]:
    """The shipped tasks as rows: `cycle: kdmqa ->` and its answer."""
    for line in text.splitlines()[: options.sequences]:
        prompt, arrow, answer = line.partition(" ->")
        found = continuation(prompt + arrow, answer, tokenizer, length)
        yield found if options.mask_prompt else passage_of(found.ids.tolist(), [True] * len(found.ids))


def passage_of(ids: list[int], counted: list[bool]) -> Passage:
    """A passage; its first token has nothing before it and is not counted."""
    mask = torch.tensor(counted, dtype=torch.bool)
    mask[:1] = False
    return Passage(torch.tensor(ids, dtype=torch.long), mask)


def continuation(prompt: str, text: str, tokenizer: Any, length: int) -> Passage:
    """`text` after `prompt`, its tokens counted; the prompt loses its beginning where both exceed `length` tokens.

    Both are tokenised as one text, and what overlaps the continuation belongs to it; where the tokenizer does not tell
    which characters a token stands for, they are tokenised apart.
    """
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(prompt + text, add_special_tokens=False, return_offsets_mapping=True)
        ids, counted = found["input_ids"], [end > len(prompt) for _, end in found["offset_mapping"]]
    else:
        parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text)]
        ids, counted = [*parts[0], *parts[1]], [False] * len(parts[0]) + [True] * len(parts[1])
    first = opening(tokenizer)
    room = max(length - len(first), 2)
    return passage_of([*first, *ids[-room:]], [*[False] * len(first), *counted[-room:]])


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    bare, dressed = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    return dressed[: dressed.index(bare[0])] if bare and bare[0] in dressed else []


def padded(passages: Sequence[Passage]) -> tuple[Tensor, Tensor]:
    """Ids and counted (B, T), padded on the right, where padding changes nothing for the tokens before it."""
    longest = max(len(p.ids) for p in passages)
    ids = torch.zeros(len(passages), longest, dtype=torch.long)
    counted = torch.zeros(len(passages), longest, dtype=torch.bool)
    for row, passage in enumerate(passages):
        ids[row, : len(passage.ids)] = passage.ids
        counted[row, : len(passage.ids)] = passage.counted
    return ids, counted
