"""Data sets as rows: from files and from the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctl_merge.errors import DataError

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
        """Read a spec. The name defaults to the file's, or the data set's.

        A file that exists wins: the longest part of the text that is one is the source, whatever signs are in it.
        Raises DataError where there is no source, or a name cannot be printed.
        """
        name, source, tail = _existing(text) or _split(text)
        columns, _, split = tail.partition("@")
        if not source:
            raise DataError(f"{text!r} names no data: write NAME=FILE, FILE:column or org/dataset:column@split")
        chosen = tuple(column.strip() for column in columns.removeprefix(":").split(",") if column.strip())
        name = name or Path(source).stem
        if not name.isprintable():
            raise DataError(f"{text!r}: the name of a data set is printable text: write NAME= in front")
        return cls(name, source, chosen, split or "train")

    @property
    def path(self) -> Path:
        """The source as a file, whether it is there or not."""
        return Path(self.source)

    @property
    def is_plain_text(self) -> bool:
        """Whether the source is a text file, which has no rows."""
        return self.path.suffix == ".txt" and os.path.isfile(self.source)


def _existing(text: str) -> tuple[str, str, str] | None:
    """Name, source and the rest where the source is a file: a name ends at an =, a source at a : or @."""
    for name, rest in [("", text), *((text[:i], text[i + 1 :]) for i, c in enumerate(text) if c == "=")]:
        ends = [len(rest), *(i for i in range(len(rest) - 1, 0, -1) if rest[i] in ":@")]
        for end in ends:
            if os.path.isfile(rest[:end]):
                return name, rest[:end], rest[end:]
    return None


def _split(text: str) -> tuple[str, str, str]:
    """Name, source and the rest by the first signs."""
    name, separator, rest = text.partition("=")
    name, rest = (name, rest) if separator else ("", text)
    end = min(i for i in (rest.find(":"), rest.find("@"), len(rest)) if i >= 0)
    return name, rest[:end], rest[end:]


def read_pieces(spec: DataSpec) -> Iterator[str]:
    """A text file in pieces that end with a line. Raises DataError."""
    try:
        with spec.path.open(encoding="utf-8") as file:
            while lines := file.readlines(1 << 20):
                yield "".join(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{spec.name}: {spec.path} cannot be read ({error})") from None


def read_rows(spec: DataSpec) -> Iterator[dict[str, Any]]:
    """The rows of a file, or of a split of a data set on the Hub, one after the other. Raises DataError."""
    import datasets

    path, local = spec.path, os.path.isfile(spec.source)
    if local and path.suffix not in _LOADERS:
        raise DataError(f"{path}: a {path.suffix or 'file without suffix'} is not read; use {', '.join(_LOADERS)}")
    if local and spec.split != "train":
        raise DataError(f"{spec.name}: {path} is a file and has no split {spec.split!r}: leave @{spec.split} out")
    if not local and (path.suffix in _LOADERS or path.is_absolute() or spec.source.startswith(".")):
        raise DataError(f"{spec.name}: there is no file {spec.source!r}")  # and no data set is called so
    try:
        if local:
            loader = _LOADERS[path.suffix]
            yield from datasets.load_dataset(loader, data_files=_literal(path), split="train", streaming=True)
        else:
            yield from datasets.load_dataset(spec.source, split=spec.split, streaming=True)
    except StopIteration:  # what datasets raises for an empty file
        raise DataError(f"{spec.name}: {path} is empty") from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        trouble = "cannot be read" if local else "is neither a file nor a data set that can be reached"
        raise DataError(f"{spec.name}: {spec.source} {trouble} ({reason})") from None


def _literal(path: Path) -> str:
    """The path as a pattern that matches it alone: datasets reads its data files as glob patterns."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in str(path))
