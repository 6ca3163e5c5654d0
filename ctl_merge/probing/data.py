"""Texts to windows of tokens, the same for every model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctl_merge.errors import DataError

STRATA = ("first", "delimiter", "other")
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class DataSpec:
    """`[NAME=]SOURCE[:column,column][@split]`: a file, or a data set on the Hub."""

    name: str
    source: str
    columns: tuple[str, ...] = ()
    split: str = "train"

    @classmethod
    def parse(cls, text: str) -> DataSpec:
        """Read a spec. The name defaults to the file's, or the data set's."""
        name, separator, rest = text.partition("=")
        rest, name = (rest, name) if separator else (text, "")
        rest, _, split = rest.partition("@")
        source, _, columns = rest.partition(":")
        if not source:
            raise DataError(f"{text!r} names no data: write NAME=FILE, FILE:column or org/dataset:column@split")
        chosen = tuple(column.strip() for column in columns.split(",") if column.strip())
        return cls(name or Path(source).stem, source, chosen, split or "train")


@dataclass(frozen=True)
class TokenSet:
    """Windows of one data set: ids (N, T); strata (N, S, T) bool, in the order of STRATA.

    `first`: the first window of the whole set (1, T) where these are a later part of it.
    """

    name: str
    ids: Tensor
    strata: Tensor
    first: Tensor | None = None


def load_tokens(spec: DataSpec, tokenizer: Any, sequences: int, length: int, chat: bool = False) -> TokenSet:
    """Cut a data set into at most `sequences` consecutive windows of exactly `length` tokens.

    The rows' texts are joined by a blank line (plain text files are taken as they are) and tokenised without special
    tokens, so that anyone can cut the same windows. With `chat`, a row's columns are the user's and the assistant's
    turns under the tokenizer's chat template. Raises DataError where there is too little text for one window.
    """
    ids: list[int] = []
    for text in _texts(spec, tokenizer if chat else None):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= sequences * length:
            break
    return cut(spec.name, ids, tokenizer, sequences, length)


def cut(name: str, ids: list[int], tokenizer: Any, sequences: int, length: int) -> TokenSet:
    """The first windows of `length` tokens, at most `sequences`. Raises DataError where not one is full."""
    count = min(sequences, len(ids) // length)
    if count == 0:
        raise DataError(f"{name}: {len(ids)} tokens are too few for one window of {length}: use a smaller --length")
    windows = torch.tensor(ids[: count * length]).view(count, length)
    return TokenSet(name, windows, strata_of(windows, tokenizer))


def strata_of(ids: Tensor, tokenizer: Any) -> Tensor:
    """First token of a window, tokens without a letter or digit (delimiters), the others: ids (N, T) -> (N, S, T)."""
    distinct = ids.unique().tolist()
    bare = [i for i in distinct if not any(c.isalnum() for c in tokenizer.decode([i]))]
    delimiter = torch.isin(ids, torch.tensor(bare, dtype=ids.dtype))
    first = torch.zeros_like(delimiter)
    first[:, 0] = True
    return torch.stack([first, delimiter & ~first, ~delimiter & ~first], dim=1)


def _texts(spec: DataSpec, chat: Any) -> Iterator[str]:
    path = Path(spec.source)
    if path.suffix == ".txt" and path.is_file():
        yield from _pieces(spec, path)
        return
    for row in _rows(spec, path):
        columns = spec.columns or _text_columns(row)
        unknown = [column for column in columns if column not in row]
        if unknown:
            raise DataError(f"{spec.name} has no column {unknown[0]!r}; it has: {', '.join(row)}")
        values = [str(row[column]) for column in columns]
        if chat is None:
            yield "\n".join(values) + "\n\n"
        else:
            roles = itertools.cycle(("user", "assistant"))
            messages = [{"role": role, "content": value} for role, value in zip(roles, values, strict=False)]
            yield chat.apply_chat_template(messages, tokenize=False)


def _pieces(spec: DataSpec, path: Path) -> Iterator[str]:
    """A text file in pieces that end with a line."""
    try:
        with path.open(encoding="utf-8") as file:
            while lines := file.readlines(1 << 20):
                yield "".join(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{spec.name}: {path} cannot be read ({error})") from None


def _rows(spec: DataSpec, path: Path) -> Iterator[dict[str, Any]]:
    import datasets

    local = path.is_file()
    if local and path.suffix not in _LOADERS:
        raise DataError(f"{path}: a {path.suffix or 'file without suffix'} is not read; use {', '.join(_LOADERS)}")
    if not local and (path.suffix in _LOADERS or path.is_absolute() or spec.source.startswith(".")):
        raise DataError(f"{spec.name}: there is no file {spec.source!r}")  # and no data set is called so
    try:
        if local:
            yield from datasets.load_dataset(
                _LOADERS[path.suffix], data_files=str(path), split="train", streaming=True
            )  # fmt: skip
        else:
            yield from datasets.load_dataset(spec.source, split=spec.split, streaming=True)
    except StopIteration:  # what datasets raises for an empty file
        raise DataError(f"{spec.name}: {path} is empty") from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        trouble = "cannot be read" if local else "is neither a file nor a data set that can be reached"
        raise DataError(f"{spec.name}: {spec.source} {trouble} ({reason})") from None


def _text_columns(row: dict[str, Any]) -> tuple[str, ...]:
    texts = tuple(name for name, value in row.items() if isinstance(value, str))
    return ("text",) if "text" in texts else texts
