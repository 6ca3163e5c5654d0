"""Data sets as rows: from files and from the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctl_merge.errors import DataError

JOIN, END = "\n", "\n\n"
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class DataSpec:
    """`[NAME=]SOURCE[:column,column][@split]`: a file, or `org/dataset` or `org/dataset/config` on the Hub.

    `join`: what stands between a row's columns; `end`: what ends a row.
    """

    name: str
    source: str
    columns: tuple[str, ...] = ()
    split: str = "train"
    join: str = JOIN
    end: str = END

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
        name = name or Path(source.rpartition("/")[0] if _has_config(source) else source).stem
        if not name.isprintable():
            raise DataError(f"{text!r}: the name of a data set is printable text: write NAME= in front")
        return cls(name, source, chosen, split or "train")

    @property
    def path(self) -> Path:
        """The source as a file, whether it is there or not."""
        return Path(self.source)

    @property
    def is_plain_text(self) -> bool:
        """Whether the source is a text file, which has no rows: any file that is none of rows."""
        return self.path.suffix not in _LOADERS and os.path.isfile(self.source)


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


def _has_config(source: str) -> bool:
    """Whether a source that is no file says which configuration of a data set it means: `openai/gsm8k/main`."""
    return not os.path.isfile(source) and source.count("/") == 2 and not source.startswith((".", "/"))


def read_pieces(spec: DataSpec) -> Iterator[str]:
    """A text file in pieces that end with a line. Raises DataError."""
    _check_whole(spec)
    if spec.columns:
        columns = ",".join(spec.columns)
        raise DataError(f"{spec.name}: {spec.path} is read as plain text and has no columns: leave :{columns} out")
    try:
        with spec.path.open(encoding="utf-8") as file:
            while lines := file.readlines(1 << 20):
                if any("\0" in line for line in lines):
                    raise ValueError("it is no text")
                yield "".join(lines)
    except (OSError, ValueError) as error:
        kinds = "" if spec.path.suffix == ".txt" else f"; rows are read from {', '.join(_LOADERS)}"
        raise DataError(f"{spec.name}: {spec.path} cannot be read as UTF-8 text ({error}){kinds}") from None


def _check_whole(spec: DataSpec) -> None:
    if spec.split != "train":
        raise DataError(f"{spec.name}: {spec.path} is a file and has no split {spec.split!r}: leave @{spec.split} out")


def read_rows(spec: DataSpec) -> Iterator[dict[str, Any]]:
    """The rows of a file, or of a split of a data set on the Hub, one after the other. Raises DataError."""
    import datasets

    path, local = spec.path, os.path.isfile(spec.source)
    if local:
        _check_whole(spec)
    elif path.suffix in (*_LOADERS, ".txt") or path.is_absolute() or spec.source.startswith("."):
        raise DataError(f"{spec.name}: there is no file {spec.source!r}")  # and no data set is called so
    try:
        if local:
            loader = _LOADERS[path.suffix]
            yield from datasets.load_dataset(loader, data_files=_literal(path), split="train", streaming=True)
        else:
            source, config = spec.source.rsplit("/", 1) if _has_config(spec.source) else (spec.source, None)
            yield from datasets.load_dataset(source, config, split=spec.split, streaming=True)
    except StopIteration:  # what datasets raises for an empty file
        raise DataError(f"{spec.name}: {path} is empty") from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]  # what there is to choose from stands in later lines
        if not local and "Config name is missing" in reason:
            reason += f": write {spec.source}/CONFIG"
        trouble = "cannot be read" if local else "is neither a file nor a data set that can be reached"
        raise DataError(f"{spec.name}: {spec.source} {trouble} ({reason})") from None


def _literal(path: Path) -> str:
    """The path as a pattern that matches it alone: datasets reads its data files as glob patterns."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in str(path))
