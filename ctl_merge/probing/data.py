"""Texts to windows of tokens, the same for every model.

Each token is in one stratum, the first of these that it fits: `first`, the first token of a window; `delimiter`, a
token without a letter or digit; `prompt` and `response`, where rows have such roles; `other`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctl_merge.bounded import MOST_TOKENIZER, parse_bounded, read_bounded
from ctl_merge.companions import is_tokenizer_file
from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import DataError
from ctl_merge.probing.rows import DataSpec, read_pieces, read_rows
from ctl_merge.probing.turns import PROMPT, RESPONSE, Text, is_conversation, joined, templated, turns

STRATA = ("first", "delimiter", PROMPT, RESPONSE, "other")
_ROLES = (None, PROMPT, RESPONSE)  # a token's role as a number
SAMPLE = 20_000  # characters of the texts that are kept, for tokenizers to be compared on


@dataclass(frozen=True)
class TokenSet:
    """Windows of one data set: ids (N, T); strata (N, S, T) bool, in the order of STRATA.

    `first`: the first window of the whole set (1, T) where these are a later part of it. `skipped`: rows that were
    left out on the way to these windows, since they hold a null. `text`: the beginning of what was tokenised.
    """

    name: str
    ids: Tensor
    strata: Tensor
    first: Tensor | None = None
    skipped: int = 0
    text: str = ""


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder; `name` is what messages call the model. Raises DataError."""
    import transformers

    try:
        for path in folder.glob("*.json"):
            if is_tokenizer_file(path.name):  # transformers reads them whole, whatever they are
                parse_bounded(read_bounded(path, MOST_TOKENIZER))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of files of any shape, or of code that comes with them
        reason = str(error).partition("\n")[0].replace(str(folder), name)
        if "trust_remote_code" in str(error) and not trust_remote_code:
            reason = "it is code that comes with the model: if you trust it let it run, with --trust-remote-code"
        raise DataError(f"the tokenizer of {name} cannot be loaded ({reason})") from None
    tokenizer.model_max_length = 1 << 30  # windows are cut by hand
    return tokenizer


def load_tokens(
    spec: DataSpec, tokenizer: Any, sequences: int, length: int, chat: bool = False, special: bool = False
) -> TokenSet:
    """Cut a data set into at most `sequences` consecutive windows of exactly `length` tokens.

    A row is as the spec joins and ends it (plain text files are taken as they are), and each is tokenised without
    special tokens, so that anyone can cut the same windows. Rows with a null in a column that is read are skipped. Of
    several columns that the spec names, the last is the response, the others the prompt. With `chat`, the columns are
    the user's and the assistant's turns under the tokenizer's chat template; so are the messages of a column that holds
    lists of them. `special` as in `cut`. Raises DataError where there is too little text for one window.
    """
    ids: list[int] = []
    roles: list[int] = []
    skipped, wanted, sample = 0, sequences * length, ""
    for text in texts_of(spec, tokenizer if chat else None):
        if text is None:
            skipped += 1
            continue
        sample += text.text[: SAMPLE - len(sample)]
        own, of_own = tokenised(text, tokenizer)
        ids += own
        roles += of_own
        if len(ids) >= wanted:
            break
    found = cut(spec.name, ids, tokenizer, sequences, length, roles=roles, special=special, skipped=skipped)
    return replace(found, text=sample)


def cut(
    name: str, ids: list[int], tokenizer: Any, sequences: int, length: int, *, roles: list[int] | None = None,
    special: bool = False, skipped: int = 0,
) -> TokenSet:  # fmt: skip
    """The first windows of `length` tokens, at most `sequences`. Raises DataError where not one is full.

    `special`: each window is put between the special tokens that the tokenizer adds to a text, which count in its
    length; the windows' own tokens are consecutive all the same.
    """
    before, after = _affixes(name, tokenizer) if special else ([], [])
    inner = length - len(before) - len(after)
    count = min(sequences, len(ids) // inner) if inner > 0 else 0
    if count == 0:
        nulls = f" ({skipped:,} rows were skipped: they hold a null)" if skipped else ""
        raise DataError(
            f"{name}: {len(ids)} tokens are too few for one window of {length}{nulls}: use a smaller --length"
        )

    def windows(values: list[int], left: list[int], right: list[int]) -> Tensor:
        own = torch.tensor(values[: count * inner]).view(count, inner)
        return torch.cat([torch.tensor([left] * count, dtype=own.dtype), own,
                          torch.tensor([right] * count, dtype=own.dtype)], dim=1)  # fmt: skip

    found = windows(ids, before, after)
    marks = windows(roles or [0] * len(ids), [0] * len(before), [0] * len(after))
    return TokenSet(name, found, strata_of(found, tokenizer, marks), skipped=skipped)


def strata_of(ids: Tensor, tokenizer: Any, roles: Tensor | None = None) -> Tensor:
    """Which stratum each token is in: ids (N, T), roles (N, T) as in _ROLES -> (N, S, T) bool."""
    roles = torch.zeros_like(ids) if roles is None else roles
    distinct = ids.unique().tolist()
    bare = [i for i in distinct if not any(c.isalnum() for c in tokenizer.decode([i]))]
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[:, 0] = True
    found = [first, torch.isin(ids, torch.tensor(bare, dtype=ids.dtype)), roles == 1, roles == 2]
    taken = torch.zeros_like(first)
    for mask in found:
        mask &= ~taken
        taken = taken | mask
    return torch.stack([*found, ~taken], dim=1)


def _affixes(name: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare, dressed = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    for start in range(len(dressed) - len(bare) + 1):
        if len(dressed) > len(bare) > 0 and dressed[start : start + len(bare)] == bare:
            return dressed[:start], dressed[start + len(bare) :]
    raise DataError(f"{name}: the tokenizer adds no special tokens to a text: leave --special-tokens out")


def tokenised(text: Text, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and the role of each, which is that of its first character that is no space.

    Without roles where the tokenizer does not tell which characters a token stands for.
    """
    if not text.spans or not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(text.text, add_special_tokens=False)["input_ids"]
        return ids, [0] * len(ids)
    found = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
    of_character = [0] * len(text.text)
    for start, end, role in text.spans:
        of_character[start:end] = [_ROLES.index(role)] * (end - start)
    roles = []
    for start, end in found["offset_mapping"]:
        part = text.text[start:end]
        start += len(part) - len(part.lstrip()) if part.strip() else 0
        roles.append(of_character[start] if start < end else 0)
    return found["input_ids"], roles


def texts_of(spec: DataSpec, chat: Any) -> Iterator[Text | None]:
    """The texts of a data set; None for a row that is skipped. `chat`: the tokenizer whose template is used."""
    if spec.is_plain_text:
        yield from map(Text, read_pieces(spec))
        return
    for row in read_rows(spec):
        columns = spec.columns or _text_columns(row, bool(chat))
        unknown = [column for column in columns if column not in row]
        if unknown:
            raise DataError(f"{spec.name} has no column {unknown[0]!r}; it has: {', '.join(row)}")
        if not columns or any(is_null(row[column]) for column in columns):
            yield None
        elif chat and len(columns) == 1 and is_conversation(row[columns[0]]):
            yield templated(row[columns[0]], chat, spec.name)
        else:
            values = [as_text(spec, column, row[column]) for column in columns]
            answered = len(spec.columns) > 1
            yield templated(turns(values), chat, spec.name) if chat else joined(values, answered, spec.join, spec.end)


def _text_columns(row: dict[str, Any], chat: bool) -> tuple[str, ...]:
    """The columns that are read where none are named: messages for a chat, `text`, or whatever is text in this row."""
    if chat and is_conversation(row.get("messages")):
        return ("messages",)
    texts = tuple(name for name, value in row.items() if isinstance(value, str))
    return ("text",) if "text" in row else texts


def is_null(value: Any) -> bool:
    """Whether a row lacks a value in a column."""
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def as_text(spec: DataSpec, column: str, value: Any) -> str:
    """A column's value as text. Raises DataError for what is no text."""
    if isinstance(value, list | tuple | dict | bytes):
        hint = ": use --chat" if is_conversation(value) else ": name another one"
        raise DataError(f"{spec.name}: the column {column!r} holds a {type(value).__name__}, not text{hint}")
    return str(value)
