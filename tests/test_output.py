"""A folder that appears whole or not at all: refusals, interruptions of every kind, and going on to the same bytes."""

from __future__ import annotations

import errno
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint

from ctl_merge import cli, finishing, merging, output
from ctl_merge import writer as writing
from ctl_merge.errors import OutputError
from ctl_merge.merging import Merge, MergeResult
from ctl_merge.output import MANIFEST, OutputFolder
from ctl_merge.writer import JOURNAL

CTL_MERGE = [sys.executable, "-m", "ctl_merge"]


class Killed(BaseException):
    """The end of the process, as far as the folder can tell."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two small models; the first has a tokenizer of 100 kB."""
    return write_recipe(tmp_path, layers=4, width=16)


def write_recipe(folder: Path, layers: int, width: int) -> Path:
    torch.manual_seed(3)
    models = []
    for name in ("a", "b"):
        tensors = {f"model.layers.{i}.q.weight": torch.randn(width, width) for i in range(layers)}
        models.append((write_checkpoint(folder / name, tensors, {"num_hidden_layers": layers}), {"weight": 0.5}))
    (folder / "a" / "merges.txt").write_text("x" * 100_000)
    path = folder / "recipe.yaml"
    path.write_text(recipe_text("linear", models))
    return path


def run(recipe: Path, output: Path, **options: Any) -> MergeResult:
    """Four shards, one thread: the order of events is always the same."""
    return Merge(recipe, max_shard_size="1KB", num_workers=1).write(output, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def expected(recipe: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted run leaves. The folder has the same name, which is the card's title."""
    run(recipe, tmp_path / "uninterrupted" / "merged")
    return contents(tmp_path / "uninterrupted" / "merged")


def leaves_nothing_else(folder: Path) -> bool:
    return [path.name for path in folder.parent.iterdir() if folder.name in path.name] == [folder.name]


# ---- refusals, before any work


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    """An output that somebody else made."""
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    return folder


def test_an_output_that_exists_is_refused(recipe: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path / "merged")
    with pytest.raises(OutputError, match=f"^{tmp_path}/merged exists: choose another output, or --overwrite"):
        run(recipe, tmp_path / "merged")


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}, {"overwrite": True, "resume": True}])
def test_what_is_not_ours_is_never_touched(recipe: Path, taken: Path, options: dict[str, bool]) -> None:
    partial = taken.with_name("new.partial")
    shutil.copytree(taken, partial)
    link = taken.with_name("link")
    link.symlink_to(taken)
    file = taken / "thesis.tex"
    for target in (taken, taken.with_name("new"), link, file, file / "below"):
        with pytest.raises(OutputError):
            run(recipe, target, **options)
    assert contents(taken) == contents(partial) == {"thesis.tex": b"years of work"}
    assert link.is_symlink()


def test_neighbours_with_similar_names_are_left_alone(recipe: Path, taken: Path) -> None:
    folder = taken.with_name("merged")
    neighbour = taken.rename(taken.with_name("merged.replaced"))
    run(recipe, folder)
    run(recipe, folder, overwrite=True)
    assert contents(neighbour) == {"thesis.tex": b"years of work"}


def test_the_root_folder_cannot_be_the_output(recipe: Path) -> None:
    with pytest.raises(OutputError, match="/ cannot be the output: name a folder"):
        run(recipe, Path("/"))


def test_a_name_that_the_file_system_refuses_is_an_output_error(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        run(recipe, tmp_path / ("x" * 300))


def test_an_empty_folder_is_taken_with_overwrite(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(OutputError, match="exists"):
        run(recipe, tmp_path / "merged")
    run(recipe, tmp_path / "merged", overwrite=True)
    assert (tmp_path / "merged" / MANIFEST).is_file()


def test_too_little_space_is_refused_before_any_work(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=4 * 1024 - 1))
    with pytest.raises(OutputError, match=r"the output takes 4.10 kB, .* has 4.09 kB left: free space"):
        run(recipe, tmp_path / "merged")
    assert not (tmp_path / "merged.partial").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=4 * 1024))
    run(recipe, tmp_path / "merged")


# ---- overwriting


def test_the_old_output_stays_until_the_new_one_is_whole(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "merged"
    run(recipe, folder)
    before = contents(folder)
    recipe.write_text(recipe.read_text().replace("0.5", "0.25"))
    with monkeypatch.context() as patch:
        patch.setattr(finishing, "build_manifest", raising(Killed))
        with pytest.raises(Killed):
            run(recipe, folder, overwrite=True)
    assert contents(folder) == before
    run(recipe, folder, overwrite=True, resume=True)
    assert contents(folder) != before
    assert leaves_nothing_else(folder)


def test_an_output_that_came_up_during_the_run_is_not_replaced(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "merged"

    def somebody_else(*args: Any) -> dict[str, Any]:
        folder.mkdir()
        (folder / "other").write_text("of another program")
        return build(*args)

    build = finishing.build_manifest
    monkeypatch.setattr(finishing, "build_manifest", somebody_else)
    with pytest.raises(OutputError, match="merged exists: choose another output"):
        run(recipe, folder)
    assert contents(folder) == {"other": b"of another program"}
    shutil.rmtree(folder)
    monkeypatch.setattr(finishing, "build_manifest", build)
    assert run(recipe, folder, resume=True).resumed_tensors == 4


# ---- two runs


def test_two_runs_never_write_at_once(recipe: Path, tmp_path: Path) -> None:
    first = OutputFolder(tmp_path / "merged")
    first.open("one")
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match=f"another run is writing {tmp_path}/merged: wait for it"):
            run(recipe, tmp_path / "merged", **options)
    assert (first.path / "fingerprint").read_text() == "one"
    first.close()
    run(recipe, tmp_path / "merged", overwrite=True)


def test_a_run_that_locks_what_another_has_just_renamed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = OutputFolder(tmp_path / "merged"), OutputFolder(tmp_path / "merged", overwrite=True)
    first.open("one")
    (first.path / MANIFEST).write_text("{}")
    flock = output.fcntl.flock

    def finished_meanwhile(descriptor: int, operation: int) -> None:
        first.commit()
        flock(descriptor, operation)

    monkeypatch.setattr(output.fcntl, "flock", finished_meanwhile)
    with pytest.raises(OutputError, match="another run is writing"):
        second.open("two")
    assert contents(tmp_path / "merged") == {MANIFEST: b"{}"}


# ---- interruptions


def raising(error: BaseException | type[BaseException], after: int = 0, then: Callable | None = None) -> Callable:
    """A function that does as `then` so many times and raises after that."""
    calls = iter(range(after))

    def function(*args: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return then(*args, **options) if then else None

    return function


def test_an_unfinished_merge_is_not_taken_up_unasked(recipe: Path, tmp_path: Path, interrupted: None) -> None:
    with pytest.raises(
        OutputError, match=r"an unfinished merge lies in .*merged\.partial: --resume goes on with it, --overwrite"
    ):
        run(recipe, tmp_path / "merged")
    assert run(recipe, tmp_path / "merged", overwrite=True).resumed_tensors == 0


@pytest.fixture
def interrupted(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed when its four tensors were written."""
    with monkeypatch.context() as patch:
        patch.setattr(finishing, "build_manifest", raising(Killed))
        with pytest.raises(Killed):
            run(recipe, tmp_path / "merged")


OTHERS = {
    "another recipe": lambda tmp_path: replace_text(tmp_path / "recipe.yaml", "0.5", "0.25"),
    "sources that changed": lambda tmp_path: os.utime(tmp_path / "a" / "model.safetensors", (1, 1)),
    "an unreadable fingerprint": lambda tmp_path: (tmp_path / "merged.partial" / "fingerprint").write_bytes(b"\xff"),
}


def replace_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("what", OTHERS)
def test_the_unfinished_work_of_another_merge_is_not_taken_up(
    what: str, recipe: Path, tmp_path: Path, interrupted: None
) -> None:
    OTHERS[what](tmp_path)
    before = contents(tmp_path / "merged.partial")
    with pytest.raises(OutputError, match="of another recipe, other sources, another shard size, device"):
        run(recipe, tmp_path / "merged", resume=True)
    assert contents(tmp_path / "merged.partial") == before
    run(recipe, tmp_path / "merged", overwrite=True)


def test_another_shard_size_is_another_merge(recipe: Path, tmp_path: Path, interrupted: None) -> None:
    with pytest.raises(OutputError, match="another shard size"):
        Merge(recipe, max_shard_size="5GB").write(tmp_path / "merged", resume=True)


def test_resuming_nothing_is_a_first_run(recipe: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    assert run(recipe, tmp_path / "merged", resume=True).resumed_tensors == 0
    assert contents(tmp_path / "merged") == expected


# Where a run is killed: the function in which, and at which of its calls.
STAGES: dict[str, tuple[Any, str, int]] = {
    "making the folder": (Path, "write_text", 0),
    "reserving space": (os, "posix_fallocate", 2),
    "writing a header": (writing, "write_at", 1),
    "writing the third tensor": (writing, "write_at", 6),
    "copying the tokenizer": (shutil, "copyfile", 0),
    "building the manifest": (finishing, "build_manifest", 0),
    "writing the index": (finishing, "write_index", 0),
    "before the config": (merging, "patch_config", 0),
    "removing the journal": (Path, "unlink", 1),
    "removing the fingerprint": (Path, "unlink", 2),
    "renaming": (os, "rename", 0),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_any_stage_leaves_nothing_whole_and_goes_on_to_the_same_bytes(
    stage: str, recipe: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, calls = STAGES[stage]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(Killed, calls, getattr(owner, name)))
        with pytest.raises(Killed):
            run(recipe, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "merged.partial").is_dir()
    run(recipe, tmp_path / "merged", resume=True)
    assert contents(tmp_path / "merged") == expected
    assert leaves_nothing_else(tmp_path / "merged")


def test_killed_between_the_two_renames_of_an_overwrite(
    recipe: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe, tmp_path / "merged")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", raising(Killed, 1, os.rename))
        with pytest.raises(Killed):
            run(recipe, tmp_path / "merged", overwrite=True)
    kept = list(tmp_path.glob(".merged.replaced.*"))
    assert [contents(folder) for folder in kept] == [expected]  # the old one is still somewhere
    run(recipe, tmp_path / "merged", resume=True)
    assert contents(tmp_path / "merged") == expected


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 20, 500, 2_000, 50_000], ids=lambda size: f"{size} bytes")
def test_a_full_disk_is_told_and_the_work_goes_on_when_there_is_space(
    size: int, recipe: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    with largest_file(size), pytest.raises(OutputError, match=r"no space left for .*merged\.partial .*--resume"):
        run(recipe, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert run(recipe, tmp_path / "merged", resume=True).resumed_tensors == (4 if size > 1152 else 0)
    assert contents(tmp_path / "merged") == expected
    assert leaves_nothing_else(tmp_path / "merged")


def test_a_disk_that_cannot_reserve_space_fills_up_in_the_middle(
    recipe: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", raising(OSError(errno.EOPNOTSUPP, "not here")))
        patch.setattr(os, "pwrite", raising(full, 6, os.pwrite))  # four headers and two tensors
        with pytest.raises(OutputError, match=r"no space left for .* \(No space left on device\)"):
            run(recipe, tmp_path / "merged")
    assert run(recipe, tmp_path / "merged", resume=True).resumed_tensors == 2
    assert contents(tmp_path / "merged") == expected


def test_a_disk_that_breaks_is_an_output_error(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", raising(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(OutputError, match=r"merged\.partial cannot be written: .*Input/output error"):
        run(recipe, tmp_path / "merged")


def test_ctrl_c_says_that_the_work_can_be_resumed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finishing, "build_manifest", raising(KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", ["ctl-merge", str(recipe), "-o", str(tmp_path / "merged")])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 130
    assert capsys.readouterr().err == "interrupted: what is written is kept, the same command with --resume goes on\n"
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "merged.partial").is_dir()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_real_process_is_killed_and_its_merge_resumed_to_the_same_bytes(
    number: signal.Signals, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, layers=300, width=256)  # 79 MB
    for attempt in ("1", "2", "3"):  # in case it is done before the signal comes
        folder = tmp_path / attempt / "merged"
        command = [*CTL_MERGE, str(recipe), "-o", str(folder), "--num-workers", "1", "--max-shard-size", "20MB"]
        # A suite that runs in the background ignores Ctrl-C, and so would its children.
        default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)
        written = signal_after_a_tensor(process, folder.with_name("merged.partial") / JOURNAL, number)
        _, told = process.communicate(timeout=60)
        if 0 < written < 300:
            break
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), told
    assert ("--resume" in told) == (number == signal.SIGINT)
    assert not folder.exists()
    resumed = Merge(recipe, max_shard_size="20MB").write(folder, resume=True)
    assert written <= resumed.resumed_tensors < 300
    assert leaves_nothing_else(folder)
    Merge(recipe, max_shard_size="20MB").write(tmp_path / "uninterrupted" / "merged")
    assert contents(folder) == contents(tmp_path / "uninterrupted" / "merged")


def signal_after_a_tensor(process: subprocess.Popen, journal: Path, number: signal.Signals) -> int:
    """Send the signal when the journal has its first lines; how many it had."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        if lines:
            process.send_signal(number)
            return lines
        time.sleep(0.001)
    return 0
