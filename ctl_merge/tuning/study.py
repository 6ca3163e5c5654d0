"""A study of Optuna, shared by processes through its file."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctl_merge.errors import DataError, MismatchError, OutputError
from ctl_merge.output import disk_errors
from ctl_merge.processes import Ranks
from ctl_merge.tuning.adjustable import Texts

_RECORD = b'{"op_code":'  # how each line of a study begins
_FULL = "Free space, or choose another file, and run the same command again."


def check_search(study: Path | None, ranks: Ranks) -> None:
    """Refuse what no search can be made with, before any work.

    Raises DataError, which says how to install it, where Optuna is missing, and for several machines without a file
    that they share; OutputError for a study's folder.
    """
    if importlib.util.find_spec("optuna") is None:
        raise DataError("--trials needs Optuna: pip install 'ctl-merge[tune]', or pip install optuna")
    if study is None and ranks.local_count < ranks.count:
        raise DataError("processes on several machines share their trials by a file: give --study in a shared folder")
    if study is not None and not study.absolute().parent.is_dir():
        raise OutputError(f"--study {study}: there is no folder {study.absolute().parent}")
    if study is not None and study.is_dir():
        raise OutputError(f"--study {study} is a folder: name a file in it")


def title_of(models: str, texts: Texts) -> str:
    """The name of the study of these models on these texts: trials on others, in the same file, are kept apart."""
    digest = hashlib.sha256(models.encode())
    for name, passages in texts.items():
        digest.update(json.dumps([name, len(passages)]).encode())
        for passage in passages:
            digest.update(passage.ids.numpy().tobytes() + passage.counted.numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def opened(path: Path | None, title: str, seed: int, ranks: Ranks) -> Iterator[Any]:
    """The study, the same for all ranks: in a file that goes on, else in memory, or in a file for as long as it takes.

    Processes that share a file draw by seeds of their own from the system, so that none repeats another's suggestions,
    nor those of an earlier run. Raises MismatchError where ranks were given different texts, DataError for a file that
    is no study, OutputError for one that cannot be written.
    """
    titles = ranks.gather(title)
    ranks.together(lambda: _check_same(titles))
    folder = None
    if path is None and ranks.count > 1:
        folder = Path(ranks.gather(ranks.at_first(lambda: tempfile.mkdtemp(prefix="ctl-merge-study-")))[0] or "")
        path = folder / "study.log"
    try:
        if path is None:
            yield _in_memory(title, seed)
        else:
            ranks.at_first(lambda: _open(path, title, made=False))
            study = ranks.together(lambda: _open(path, title, made=True))
            with disk_errors(path, _FULL):
                yield study
    finally:
        if folder is not None and ranks.first:
            shutil.rmtree(folder, ignore_errors=True)


def _check_same(titles: list[str]) -> None:
    if len(set(titles)) > 1:
        raise MismatchError("the processes of this run read different models or texts: give all of them the same files")


def _in_memory(title: str, seed: int) -> Any:
    import optuna

    return optuna.create_study(study_name=title, sampler=_sampler(seed))


def _sampler(seed: int | None) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # No lies about trials that run (constant_liar): one that was killed stays so, and would be kept away from for good.
    return optuna.samplers.TPESampler(seed=seed, multivariate=True)


def _open(path: Path, title: str, made: bool) -> Any:
    """The study in a file. `made`: the first process has made it: where it is not, this is another file."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    how = {"study_name": title, "sampler": _sampler(None)}
    with disk_errors(path, _FULL):
        try:
            if not made:
                _mend(path)
            # Its lock is a link to the file: one by a relative path may lead nowhere, and is then never taken over.
            how["storage"] = JournalStorage(JournalFileBackend(str(path.absolute())))
            return optuna.load_study(**how) if made else optuna.create_study(**how, load_if_exists=True)
        except KeyError:
            elsewhere = f"--study {path} is not the first process' file: put it in a folder that all share"
            raise DataError(elsewhere if made else _damaged(path, "a record lacks a key")) from None
        except (ValueError, TypeError, AttributeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(_damaged(path, reason)) from None


def _mend(path: Path) -> None:
    """Take away the piece of a record that a process left which was ended while it wrote; others would follow it."""
    from optuna.storages.journal import JournalFileSymlinkLock

    if not path.exists():
        return
    lock = JournalFileSymlinkLock(str(path.absolute()))
    lock.acquire()
    try:
        content = path.read_bytes()
        if content and not content.startswith(_RECORD):
            raise DataError(f"--study {path} is no study of trials: name another file")
        whole = content.rpartition(b"\n")[0] + b"\n"
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
    finally:
        lock.release()


def _damaged(path: Path, reason: str) -> str:
    return f"--study {path} is damaged ({reason}): name another file, or remove the last lines up to one that is whole"
