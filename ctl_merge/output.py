"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ctl_merge.errors import OutputError
from ctl_merge.sizes import format_size

MANIFEST = "merge_manifest.json"
_FINGERPRINT = "fingerprint"
UPLOADED = "uploaded"
WORK = ".ctl-merge.partial"  # how working files within a folder end
_ATTACHED = ("probe", f".*{WORK}")  # patterns: what an earlier run may have put there beside the merge
WORKING_FILES = ("journal*", "measured*", _FINGERPRINT, UPLOADED)  # patterns
_KEPT = "What is written is kept: free space and run the same command with --resume, or delete the folder."
_OTHER = "is of another recipe, other sources, another shard size, device or version"


class OutputFolder:
    """Work happens in `NAME.partial` beside the folder; `commit` renames it.

    An interrupted run leaves NAME.partial, which `resume` takes up if the fingerprint is the same. `overwrite`
    replaces an earlier merge only when the new one is whole.
    """

    def __init__(self, final: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.final = Path(os.path.abspath(final))
        if not self.final.name:
            raise OutputError(f"{self.final} cannot be the output: name a folder")
        self.path = self.final.with_name(f"{self.final.name}.partial")
        self.overwrite, self.resume = overwrite, resume
        self._lock: int | None = None

    def check(self, needed_bytes: int) -> None:
        """Refuse early: a folder that exists, an unfinished merge, too little space."""
        if os.path.lexists(self.final):
            self._clear_replaced()
        self._refuse_to_replace()
        unfinished = os.path.lexists(self.path)
        if unfinished and not _is_ours(self.path, MANIFEST, _FINGERPRINT):
            raise OutputError(f"{self.path} was not made by ctl-merge: delete it yourself, or choose another output")
        if unfinished and not self.resume and not self.overwrite:
            raise OutputError(
                f"an unfinished merge lies in {self.path}: --resume goes on with it, --overwrite starts again"
            )
        place = next(parent for parent in self.final.parents if os.path.exists(parent))
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise OutputError(f"{place} is not a folder that can be written: choose another output")
        held = sum(f.lstat().st_blocks * 512 for f in self.path.iterdir()) if unfinished else 0
        free = shutil.disk_usage(place).free + held
        if free < needed_bytes:
            raise OutputError(
                f"the output takes {format_size(needed_bytes)}, {place} has {format_size(free)} left: "
                "free space, or choose an output on another disk"
            )

    def open(self, fingerprint: str) -> Path:
        """Create or take up the working folder and lock it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            lock(self._lock)
            if not os.path.samestat(os.fstat(self._lock), os.stat(self.path)):
                raise BlockingIOError  # what was locked is another run's folder, which that run has renamed by now
        except (BlockingIOError, FileNotFoundError):
            self.close()
            raise OutputError(f"another run is writing {self.final}: wait for it, or choose another output") from None
        except OSError as error:
            raise OutputError(f"{self.path} cannot be created: {error.strerror}") from None
        try:
            self._prepare(fingerprint)
        except BaseException:
            self.close()
            raise
        return self.path

    def join(self, fingerprint: str) -> Path:
        """Take up the working folder, made if need be, beside other processes that write other shards.

        It appears with its fingerprint, so that of processes that start at once one makes it and all may use it.
        """
        made = tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=_made(self.path.parent))
        try:
            os.chmod(made, 0o777 & ~_umask())
            Path(made, _FINGERPRINT).write_text(fingerprint, "utf-8")
            os.rename(made, self.path)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputError(f"{self.path} cannot be created: {error.strerror}") from None
        self.check_same(fingerprint)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            lock(self._lock, fcntl.LOCK_SH)
        except BlockingIOError:
            self.close()
            raise OutputError(f"another run is writing all of {self.final}: wait for it") from None
        return self.path

    def check_same(self, fingerprint: str) -> None:
        """Refuse a working folder that is of another merge, or not there."""
        marker = self.path / _FINGERPRINT
        if not marker.is_file():
            raise OutputError(f"{self.path} is no unfinished merge, or not on a file system that all processes share")
        if marker.read_text("utf-8", errors="replace") != fingerprint:
            raise OutputError(f"{self.path} {_OTHER}: choose another output, or delete it")

    def _prepare(self, fingerprint: str) -> None:
        """Keep the work that is of this merge; clear away any other that may be lost."""
        marker = self.path / _FINGERPRINT
        if self.resume and marker.exists():
            found = marker.read_text("utf-8", errors="replace")
            if found == fingerprint:
                with disk_errors(self.path):
                    for attached in (path for pattern in _ATTACHED for path in self.path.glob(pattern)):
                        _remove(attached)  # made again, or not asked for any more
                return
            if not self.overwrite and not fingerprint.startswith(
                found
            ):  # else a run ended while it wrote this, its first file
                raise OutputError(f"{self.path} {_OTHER}: --overwrite starts again, and loses it")
        with disk_errors(self.path):
            marker.write_text("", "utf-8")  # the folder stays ours if this run ends before it is clear
            for left in self.path.iterdir():
                if left != marker:
                    _remove(left)
            marker.write_text(fingerprint, "utf-8")

    def commit(self) -> None:
        """Make the working folder the output. Refuses, as `check` does, what has come there in the meantime."""
        self._refuse_to_replace()
        for pattern in WORKING_FILES:
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)
        if os.path.lexists(self.final):
            replaced = tempfile.mkdtemp(prefix=f".{self.final.name}.replaced.", dir=self.final.parent)
            os.rename(self.final, replaced)
        os.rename(self.path, self.final)
        self._clear_replaced()
        self.close()

    def _clear_replaced(self) -> None:
        """Earlier outputs whose replacement is in place, be they of a run that was killed before it deleted them."""
        for replaced in self.final.parent.glob(f".{glob.escape(self.final.name)}.replaced.*"):
            if _is_ours(replaced, MANIFEST):
                with suppress(OSError):
                    for path in sorted(replaced.iterdir(), key=lambda path: path.name == MANIFEST):  # the mark last
                        _remove(path)
                    replaced.rmdir()

    def close(self) -> None:
        """Release the lock; an uncommitted working folder stays for --resume."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_to_replace(self) -> None:
        if not os.path.lexists(self.final):
            return
        if not self.overwrite:
            raise OutputError(f"{self.final} exists: choose another output, or --overwrite to replace it")
        if not _is_ours(self.final, MANIFEST):
            raise OutputError(f"{self.final} was not made by ctl-merge: delete it yourself, or choose another output")


def lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> None:
    """Lock a file or folder, or raise BlockingIOError where another process holds it.

    Some shared file systems have no locks, or only among the processes of one machine.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created: {error.strerror}") from None
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_ours(folder: Path, *markers: str) -> bool:
    """Whether it is a folder that may be replaced: empty, or with a file that only this program leaves."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or not names.isdisjoint(markers)


@contextmanager
def disk_errors(folder: Path, when_full: str = _KEPT) -> Iterator[None]:
    """What the system says of writing into `folder`, as OutputError; `when_full` says what to do on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"no space left for {folder} ({error.strerror}). {when_full}") from None
        raise OutputError(f"{folder} cannot be written: {error}") from None
