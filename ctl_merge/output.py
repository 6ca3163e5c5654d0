"""A folder that appears whole or not at all, and that two runs never write at once."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from ctl_merge.errors import OutputError
from ctl_merge.sizes import format_size

MANIFEST = "merge_manifest.json"
_FINGERPRINT = "fingerprint"
_WORKING_FILES = ("journal", _FINGERPRINT)


class OutputFolder:
    """Work happens in `NAME.partial` beside the folder; `commit` renames it.

    An interrupted run leaves NAME.partial, which `resume` takes up if the fingerprint is the same. `overwrite`
    replaces an earlier merge only when the new one is whole.
    """

    def __init__(self, final: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.final = Path(os.path.abspath(final))
        self.path = self.final.with_name(f"{self.final.name}.partial")
        self.overwrite, self.resume = overwrite, resume
        self._replaced = self.final.with_name(f"{self.final.name}.replaced")
        self._lock: int | None = None

    def check(self, needed_bytes: int) -> None:
        """Refuse early: a folder that exists, an unfinished merge, too little space. Changes nothing."""
        if self.final.exists() or self.final.is_symlink():
            if not self.overwrite:
                raise OutputError(f"{self.final} exists: choose another output, or --overwrite to replace it")
            if not self._is_ours():
                raise OutputError(
                    f"{self.final} was not made by ctl-merge: delete it yourself, or choose another output"
                )
        if self.path.exists() and not self.resume and not self.overwrite:
            raise OutputError(
                f"an unfinished merge lies in {self.path}: --resume goes on with it, --overwrite starts again"
            )
        place = next(parent for parent in self.final.parents if parent.exists())
        if not os.access(place, os.W_OK):
            raise OutputError(f"{place} is not writable")
        held = sum(f.stat().st_blocks * 512 for f in self.path.iterdir()) if self.path.exists() else 0
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
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise OutputError(f"another run is writing {self.final}: wait for it, or choose another output") from None
        except OSError as error:
            raise OutputError(f"{self.path} cannot be created: {error.strerror}") from None
        marker = self.path / _FINGERPRINT
        if self.resume and marker.exists() and marker.read_text("utf-8", errors="replace") != fingerprint:
            self.close()
            raise OutputError(
                f"{self.path} is of another recipe, other sources or another shard size: "
                "--overwrite starts again, and loses it"
            )
        if not (self.resume and marker.exists()):
            for left in self.path.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            marker.write_text(fingerprint, "utf-8")
        return self.path

    def commit(self) -> None:
        """Make the working folder the output."""
        for name in _WORKING_FILES:
            (self.path / name).unlink(missing_ok=True)
        if self.final.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.rename(self.final, self._replaced)
        os.rename(self.path, self.final)
        shutil.rmtree(self._replaced, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Release the lock; an uncommitted working folder stays for --resume."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _is_ours(self) -> bool:
        return self.final.is_dir() and ((self.final / MANIFEST).is_file() or not any(self.final.iterdir()))
