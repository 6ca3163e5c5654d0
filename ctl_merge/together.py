"""Files that appear together, when all are whole."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ctl_merge.errors import OutputError
from ctl_merge.output import WORK, disk_errors, lock

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def appearing(folder: Path, mark: str, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A working folder for files that stand in `folder` afterwards, beside what else is there.

    Where there is no such folder yet, it appears with all of them; one that holds nothing but what `mark` and `stale`
    name and the new files replace changes places with the new one in a single step. Else the files of before, `stale`
    ones too, leave before the new ones come: `mark` leaves first and comes last, so that where it is the others are, of
    the same run. What a run that was killed left behind is cleared away. Raises OutputError.
    """
    folder = Path(os.path.realpath(folder))
    inside, beside = _works(folder)
    work = inside if folder.exists() and not _may_change_places(folder) else beside
    with disk_errors(folder, "Free space and run the same command again, an unfinished merge with --resume."):
        clear_left(folder)
        work.mkdir(parents=True)
        with _locked(work, folder):
            try:
                yield work
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
            _put_in_place(work, folder, mark, stale)


def clear_left(folder: Path) -> None:
    """Clear away what a run that was killed has left. Raises OutputError where one is at work."""
    for work in _works(folder):
        if work.is_dir():
            with _locked(work, folder):
                shutil.rmtree(work, ignore_errors=True)  # another run may be clearing it away too
            if work.exists():
                raise OutputError(f"{work}, which an earlier run left, cannot be cleared away: delete it yourself")


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
    names = _files(work)
    names.sort(key=lambda name: (name == mark, name))
    if work.parent == folder.parent and {*_files(folder)} <= {mark, *stale, *names}:
        with _locked(
            folder, folder
        ):  # as the working folder from now on, which no other run may clear away and make anew
            if _exchanged(work, folder):
                shutil.rmtree(work, ignore_errors=True)
                return
    try:
        _put_one_by_one(work, folder, mark, stale, names)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put_one_by_one(work: Path, folder: Path, mark: str, stale: Iterable[str], names: list[str]) -> None:
    for name in (mark, *stale, *names):
        (folder / name).unlink(missing_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        os.rename(work / name, folder / name)


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]


def _may_change_places(folder: Path) -> bool:
    """Whether another folder may take the place of this one: not of a mount, nor of one that somebody stands in."""
    return (
        folder.is_dir() and not os.path.ismount(folder) and os.access(folder.parent, os.W_OK)
        and folder.stat().st_uid == os.geteuid() and not Path.cwd().is_relative_to(folder)
    )  # fmt: skip


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders change places in a single step, each with the other's rights; false where the system cannot."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    one.chmod(stat.S_IMODE(other.stat().st_mode))
    return exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
