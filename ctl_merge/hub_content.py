"""Files of the Hub's cache, checked against their sha256."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ctl_merge.digests import sha256_of

logger = logging.getLogger("ctl_merge")

_NOTES = ".ctl_merge_checked"  # in the cache's folder of a repository: a file for each content, named by its sha256


def differing(folder: Path, expected: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Those of the files in a snapshot's folder whose sha256 is not the expected one: path, expected, found.

    What was found right is noted in the cache, and not read again until its size, time or inode changes: the transfer
    itself checks sizes only.
    """
    notes = folder.parent.parent / _NOTES
    open_ = [(path, digest) for path, digest in expected if not _is_noted(notes / digest, folder / path)]
    if not open_:
        return []
    logger.info("%s: checking the sha256 of %d files", folder.parent.parent.name, len(open_))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = list(threads.map(lambda item: sha256_of(folder / item[0]), open_))
    wrong = []
    for (path, digest), actual in zip(open_, found, strict=True):
        if actual != digest:
            wrong.append((path, digest, actual))
        else:
            _note(notes / digest, folder / path)
    return wrong


def _state(file: Path) -> str:
    stat = file.stat()  # of the blob that the snapshot links to
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


def _is_noted(note: Path, file: Path) -> bool:
    try:
        return note.read_text("utf-8") == _state(file)
    except (OSError, ValueError):
        return False


def _note(note: Path, file: Path) -> None:
    partial = note.with_name(f"{note.name}.{os.getpid()}.incomplete")
    try:
        note.parent.mkdir(exist_ok=True)
        partial.write_text(_state(file), "utf-8")
        partial.replace(note)
    except OSError as error:  # a cache that cannot be written still serves what it has
        logger.debug("%s cannot be noted as checked: %s", file.name, error.strerror)
