"""Files that appear together, when all are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ctl_merge.errors import OutputError
from ctl_merge.output import WORK, disk_errors, lock


@contextmanager
def appearing(folder: Path, mark: str, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A working folder for files that stand in `folder` afterwards, beside what else is there.

    Where there is no such folder yet, it appears with all of them. Else the files of before, `stale` ones too, leave
    before the new ones come: `mark` leaves first and comes last, so that where it is the others are, of the same run.
    What a run that was killed left behind is cleared away. Raises OutputError.
    """
    folder = Path(os.path.realpath(folder))
    inside, beside = _works(folder)
    work = inside if folder.exists() else beside
    try:
        with disk_errors(folder, "Free space and run the same command again, an unfinished merge with --resume."):
            clear_left(folder)
            work.mkdir(parents=True)
            with _locked(work, folder):
                yield work
                _put_in_place(work, folder, mark, stale)
    finally:
        if work.is_dir():
            shutil.rmtree(work, ignore_errors=True)


def clear_left(folder: Path) -> None:
    """Clear away what a run that was killed has left. Raises OutputError where one is at work."""
    for work in _works(folder):
        if work.is_dir():
            with _locked(work, folder):
                shutil.rmtree(work)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is the old one until it is the new one. Raises OSError."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe
        path.write_text(text, "utf-8")
        return
    work = path.with_name(f".{path.name}{WORK}")
    try:
        work.write_text(text, "utf-8")
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def _works(folder: Path) -> tuple[Path, Path]:
    """The working folders: in a folder that is there, which may be a mount or hold other files; beside one that is
    not.
    """
    return folder / WORK, folder.with_name(f".{folder.name}{WORK}")


@contextmanager
def _locked(work: Path, folder: Path) -> Iterator[None]:
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            lock(descriptor)
        except BlockingIOError:
            raise OutputError(f"another run is writing into {folder}: wait for it, or choose another folder") from None
        yield
    finally:
        os.close(descriptor)


def _put_in_place(work: Path, folder: Path, mark: str, stale: Iterable[str]) -> None:
    if not os.path.lexists(folder):
        os.rename(work, folder)
        return
    names = [path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()]
    names.sort(key=lambda name: (name == mark, name))
    for name in (mark, *stale, *names):
        (folder / name).unlink(missing_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        os.rename(work / name, folder / name)
