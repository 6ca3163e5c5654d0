"""A disk that is really full, page by page: what is missing is told, and with more room the work goes on.

The disk is a small tmpfs, mounted for the test where it may; `test_output.py` has limits of a file's size beside it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint

import ctl_merge
from ctl_merge.cli.merge import probing
from ctl_merge.errors import OutputError
from ctl_merge.merging import Merge
from ctl_merge.output import MANIFEST
from ctl_merge.probing.report import ProbeReport
from ctl_merge.processes import ALONE
from ctl_merge.writer import INDEX

QUICKSTART = Path(ctl_merge.__file__).parent.parent / "recipes" / "quickstart"
PAGE = os.sysconf("SC_PAGE_SIZE")
LAYERS = 4
# The files of a merge in the order in which they are written.
ORDER = [
    *(f"model-{i:05}-of-{LAYERS:05}.safetensors" for i in range(1, LAYERS + 1)),
    "ctl_merge_recipe.yaml", "README.md", INDEX, "merges.txt", "config.json", MANIFEST,
]  # fmt: skip
Contents = dict[str, bytes]
Meter = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


class Disk:
    """A file system of its own, whose free space is what `leave` says."""

    def __init__(self, place: Path) -> None:
        self.place, self.ballast = place, place / "ballast"

    def leave(self, pages: int) -> None:
        self.make_room()
        status = os.statvfs(self.place)
        with self.ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - pages * PAGE)

    def make_room(self) -> None:
        self.ballast.unlink(missing_ok=True)

    def leaving(self, pages: int, stage: str) -> Meter:
        """A meter under which so many pages are left once that stage of the work begins."""

        @contextmanager
        def meter(what: str, total: int) -> Iterator[Callable[[int], object]]:
            if what == stage:
                self.leave(pages)
            yield lambda count: None

        return meter


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if shutil.which("mount") is None or (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip("a small disk cannot be mounted here: " + (done.stderr.strip() if shutil.which("mount") else ""))
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def contents(folder: Path) -> Contents:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A merge of four tensors of a page each, in files of their own."""
    torch.manual_seed(3)
    for name in "ab":
        tensors = {f"model.layers.{i}.q.weight": torch.randn(32, 32) for i in range(LAYERS)}
        write_checkpoint(tmp_path / name, tensors, {"num_hidden_layers": LAYERS})
    (tmp_path / "a" / "merges.txt").write_text("x" * 3 * PAGE)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text("linear", [(tmp_path / name, {"weight": 0.5}) for name in "ab"]))
    return path


def opened(recipe: Path) -> Merge:
    return Merge(recipe, max_shard_size="5KB", num_workers=1)


def test_a_merge_goes_on_wherever_the_disk_was_full(disk: Disk, recipe: Path, tmp_path: Path) -> None:
    expected = contents(opened(recipe).write(tmp_path / "expected" / "merged").folder)
    assert expected.keys() == set(ORDER)
    output, stopped = disk.place / "merged", []
    for pages in itertools.count():
        try:
            opened(recipe).write(output, meter=disk.leaving(pages, "merging"))
            break
        except OutputError as error:
            assert f"no space left for {output}.partial (No space left on device)" in str(error)
            assert "free space and run the same command with --resume" in str(error)
        assert not output.exists()
        kept = contents(disk.place / "merged.partial")
        stopped.append(next(name for name in ORDER if kept.get(name) != expected[name]))
        disk.make_room()
        opened(recipe).write(output, resume=True)
        assert contents(output) == expected
        assert [path.name for path in disk.place.iterdir()] == ["merged"]
        shutil.rmtree(output)
    assert contents(output) == expected
    assert pages > 10 and ORDER[0] in stopped and set(stopped) >= {"README.md", INDEX, "merges.txt", MANIFEST}


def test_too_little_room_is_told_before_the_work(disk: Disk, recipe: Path) -> None:
    disk.leave(2)
    with pytest.raises(OutputError, match=r"the output takes 16.* kB, .*disk has 8.* kB left: free space, or choose"):
        opened(recipe).write(disk.place / "merged")
    assert [path.name for path in disk.place.iterdir()] == ["ballast"]


def test_a_disk_with_no_room_for_the_first_file(disk: Disk, recipe: Path, tmp_path: Path) -> None:
    """Between the check and the work the last page went."""
    merge, output = opened(recipe), disk.place / "merged"
    real = merge.fetch
    merge.fetch = lambda: (real(), disk.leave(0))  # type: ignore[assignment,method-assign,func-returns-value]
    with pytest.raises(OutputError, match="no space left for .*--resume"):
        merge.write(output)
    disk.make_room()
    opened(recipe).write(output, resume=True)
    assert contents(output) == contents(opened(recipe).write(tmp_path / "expected" / "merged").folder)


# ---- probes


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    return ctl_merge.probe(QUICKSTART / "ties.yaml", sequences=3, length=16)


@pytest.mark.parametrize("earlier", [False, True], ids=["a first report", "beside an earlier one"])
def test_a_report_is_whole_or_not_there(disk: Disk, report: ProbeReport, earlier: bool) -> None:
    folder = disk.place / "report"
    if earlier:
        report.save(folder)
    before, refused = contents(disk.place), 0
    for pages in itertools.count(0, 7):
        disk.leave(pages)
        try:
            report.save(folder)
            break
        except OutputError as error:
            assert "no space left for" in str(error) and "run the same command again" in str(error)
        refused += 1
        disk.make_room()
        assert contents(disk.place) == before
    assert refused >= 3
    disk.make_room()
    assert ProbeReport.load(folder).to_json() == report.to_json()
    assert [path.name for path in disk.place.iterdir()] == ["report"]


@pytest.mark.parametrize("pages", [0, 1, 25])
def test_a_merge_whose_report_finds_no_room_goes_on(disk: Disk, pages: int, tmp_path: Path) -> None:
    recipe, output = tmp_path / "probed.yaml", disk.place / "merged"
    text = (QUICKSTART / "ties.yaml").read_text().replace("model: ", f"model: {QUICKSTART}/")
    text = text.replace(f"base_model: {QUICKSTART}/base", f"base_model: {QUICKSTART / 'base'}")
    recipe.write_text(text + "probe: {sequences: 3, length: 16}\n")

    def write(folder: Path, meter: Meter, resume: bool = False) -> Contents:
        merge = Merge(recipe, num_workers=1)
        attach = probing(merge, meter, False, ALONE, [])
        found = contents(merge.write(folder, resume=resume, attach=attach, meter=meter).folder)
        del found["probe/statistics.npz"]  # says when it was written
        return found

    with pytest.raises(OutputError, match=r"no space left for .*merged.partial/probe .*--resume"):
        write(output, disk.leaving(pages, "probing"))
    assert not output.exists()
    disk.make_room()
    full = disk.leaving(10_000, "")
    assert write(output, full, resume=True) == write(tmp_path / "expected" / "merged", full)
    assert [path.name for path in disk.place.iterdir()] == ["merged"]
