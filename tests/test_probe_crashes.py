"""A probe that is killed, wherever that may be, leaves a whole report, the earlier one, or none.

The suite kills at a slice of the operations; `make long` at all of them, and at random instants.
"""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashes import kill_at, kill_at_instants, killed_before, operations

import ctl_merge
from ctl_merge.cli.merge import probing
from ctl_merge.errors import OutputError
from ctl_merge.finished import inspect
from ctl_merge.merging import Merge, no_meter
from ctl_merge.probing.report import ProbeReport
from ctl_merge.processes import ALONE

QUICKSTART = Path(ctl_merge.__file__).parent.parent / "recipes" / "quickstart"
RECIPE = QUICKSTART / "ties.yaml"
SMALL = {"sequences": 3, "length": 16}
SLICE = 11  # every so many operations are tried in the suite
NOTES = b"by hand"
Contents = dict[str, Any]


def contents(folder: Path) -> Contents:
    """Every file; of the statistics what is in them, as the file says when it was written too."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: _arrays(data) if name.endswith(".npz") else data for name, data in files.items()}


def _arrays(data: bytes) -> dict[str, bytes]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures beside the figures take most of the time, and are files like the others."""
    monkeypatch.setattr("ctl_merge.probing.figures.png", lambda svg: None)


@pytest.fixture(scope="module")
def new() -> ProbeReport:
    return ctl_merge.probe(RECIPE, **SMALL)


@pytest.fixture(scope="module")
def old() -> ProbeReport:
    """Of other data, with a figure more."""
    return ctl_merge.probe(RECIPE, sequences=2, length=16, patch=True)


class Saving:
    """A report that is saved into a folder: none as yet, or one with an earlier report, alone or with a user's file."""

    def __init__(self, place: Path, new: ProbeReport, old: ProbeReport | None, alone: bool = False) -> None:
        self.folder, self.new, self.old, self.alone = place / "out" / "report", new, old, alone
        self.new.save(place / "new")
        self.expected = contents(place / "new")
        self.before: Contents | None = None
        if old:
            old.save(place / "old")
            self.before = contents(place / "old")
            assert self.before.keys() - self.expected.keys()  # figures that the new report has not

    def prepare(self) -> None:
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        self.folder.parent.mkdir()
        if self.old:
            self.old.save(self.folder)
            if not self.alone:
                (self.folder / "figures" / "notes.txt").write_bytes(NOTES)

    def run(self) -> None:
        self.new.save(self.folder)

    def check_aftermath(self) -> None:
        if not self.folder.exists():
            assert self.old is None
            return
        if self.alone:  # always a whole report, the one or the other, and nothing beside it that is not hidden
            assert contents(self.folder) in (self.expected, self.before)
            assert [path.name for path in self.folder.parent.iterdir() if path.name[0] != "."] == ["report"]
            return
        found = {name: data for name, data in contents(self.folder).items() if "partial" not in name}
        if self.old:
            assert found.pop("figures/notes.txt") == NOTES
        if "probe.json" in found:
            assert found in (self.expected, self.before)
        else:  # between the two: files of one report only, each whole
            assert found.items() <= self.expected.items() or found.items() <= (self.before or {}).items()

    def go_on(self) -> None:
        self.run()
        found = contents(self.folder)
        assert found.pop("figures/notes.txt", NOTES) == NOTES and found == self.expected
        assert [path.name for path in self.folder.parent.iterdir()] == [self.folder.name]


@pytest.fixture(params=["a first report", "one that replaces another", "one in a folder with other files"])
def saving(request: pytest.FixtureRequest, tmp_path: Path, new: ProbeReport, old: ProbeReport) -> Saving:
    return Saving(tmp_path, new, None if "first" in request.param else old, "replaces" in request.param)


def test_killed_before_any_file_operation(saving: Saving) -> None:
    assert kill_at(saving, saving.folder.parent, lambda operation: operation % SLICE == 4) >= 1


@pytest.mark.parametrize("alone", [True, False])
def test_killed_while_the_files_change_places(alone: bool, tmp_path: Path, new: ProbeReport, old: ProbeReport) -> None:
    saving = Saving(tmp_path, new, old, alone)
    saving.prepare()
    total = operations(saving.run, saving.folder.parent)
    assert kill_at(saving, saving.folder.parent, lambda operation: total - 30 < operation and operation % 10 == 0) >= 2


@pytest.mark.long
def test_killed_before_every_file_operation(saving: Saving) -> None:
    print(f"\n{kill_at(saving, saving.folder.parent, lambda operation: True)} kills")


class Probing(Saving):
    """What `ctl-merge probe -o` does."""

    def run(self) -> None:
        ctl_merge.probe(RECIPE, **SMALL).save(self.folder)


def test_a_probe_is_killed_at_random_instants(tmp_path: Path, new: ProbeReport, old: ProbeReport) -> None:
    assert kill_at_instants(Probing(tmp_path, new, old), random.Random(0), 2) >= 1


@pytest.mark.long
@pytest.mark.parametrize("replaces", [False, True])
def test_a_probe_is_killed_at_many_random_instants(
    replaces: bool, tmp_path: Path, new: ProbeReport, old: ProbeReport
) -> None:
    kills = kill_at_instants(Probing(tmp_path, new, old if replaces else None), random.Random(1), 40)
    print(f"\n{kills} kills")


# ---- the probe of a merge


class Probed:
    """A merge with `--probe`: the report lies in the merge's folder."""

    def __init__(self, place: Path) -> None:
        self.recipe, self.output = place / "recipe.yaml", place / "out" / "merged"
        text = RECIPE.read_text().replace("model: ", f"model: {QUICKSTART}/")
        text = text.replace(f"base_model: {QUICKSTART}/base", f"base_model: {QUICKSTART / 'base'}")
        self.recipe.write_text(text + "probe: {sequences: 3, length: 16}\n")
        self.write(place / "expected" / "merged")
        self.expected = contents(place / "expected" / "merged")
        assert "probe/report.html" in self.expected

    def write(self, output: Path, resume: bool = False, probe: bool = True) -> None:
        merge = Merge(self.recipe, num_workers=1)
        attach = probing(merge, no_meter, False, ALONE, []) if probe else None
        merge.write(output, resume=resume, attach=attach)

    def prepare(self) -> None:
        shutil.rmtree(self.output.parent, ignore_errors=True)

    def run(self) -> None:
        self.write(self.output)

    def check_aftermath(self) -> None:
        assert not self.output.exists() or contents(self.output) == self.expected

    def go_on(self) -> None:
        if not self.output.exists():
            self.write(self.output, resume=True)
        assert contents(self.output) == self.expected
        assert [path.name for path in self.output.parent.iterdir()] == [self.output.name]


def test_a_merge_is_killed_while_it_is_probed(tmp_path: Path) -> None:
    probed = Probed(tmp_path)
    assert kill_at(probed, probed.output.parent, lambda operation: operation in (40, 60)) == 2


def test_going_on_without_the_probe_leaves_no_report(tmp_path: Path) -> None:
    probed = Probed(tmp_path)
    probed.prepare()
    total, left = operations(probed.run, probed.output.parent), 0
    for operation in (total * 4 // 5, total - 12):
        probed.prepare()
        assert killed_before(probed.run, probed.output.parent, operation)
        left += any("probe" in path.name for path in probed.output.parent.rglob("*"))
        probed.write(probed.output, resume=True, probe=False)
        assert not [name for name in contents(probed.output) if "probe" in name]
        assert not inspect(probed.output).findings
        assert [path.name for path in probed.output.parent.iterdir()] == [probed.output.name]
    assert left


@pytest.mark.long
def test_a_merge_with_a_probe_is_killed_before_every_file_operation(tmp_path: Path) -> None:
    probed = Probed(tmp_path)
    print(f"\n{kill_at(probed, probed.output.parent, lambda operation: True)} kills")


# ---- two at once, and what goes wrong without a kill


@pytest.mark.parametrize("why", ["it has other files", "somebody stands in it", "no such call", "it is refused"])
def test_where_folders_cannot_change_places_the_files_do(
    why: str, tmp_path: Path, new: ProbeReport, old: ProbeReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctl_merge import together

    folder = tmp_path / "out" / "report"
    old.save(folder)
    folder.chmod(0o750)
    before = folder.stat().st_ino
    if why == "it has other files":
        (folder / "notes.txt").write_bytes(NOTES)
    elif why == "somebody stands in it":
        monkeypatch.chdir(folder)
    elif why == "no such call":
        monkeypatch.setattr(together.ctypes, "CDLL", lambda *_, **__: object())
    else:
        monkeypatch.setattr(together, "_EXCHANGE", 1 << 20)  # an unknown flag
    new.save(folder)
    found = contents(folder)
    assert found.pop("notes.txt", NOTES) == NOTES and folder.stat().st_ino == before
    new.save(tmp_path / "expected")
    assert found == contents(tmp_path / "expected")
    assert [path.name for path in folder.parent.iterdir()] == ["report"]


def test_a_folder_that_changes_places_keeps_its_rights(tmp_path: Path, new: ProbeReport, old: ProbeReport) -> None:
    folder = tmp_path / "report"
    old.save(folder)
    folder.chmod(0o750)
    before = folder.stat().st_ino
    new.save(folder)
    assert folder.stat().st_ino != before and folder.stat().st_mode & 0o777 == 0o750


def test_a_second_run_on_the_same_folder_is_refused(tmp_path: Path, new: ProbeReport) -> None:
    from ctl_merge.together import appearing

    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "none", tmp_path, tmp_path / "there"):
        with appearing(folder, "probe.json") as work:
            with pytest.raises(OutputError, match="another run is writing into .*: wait for it"):
                new.save(folder)
            (work / "probe.json").write_text("{}")
        assert (folder / "probe.json").read_text() == "{}"


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, new: ProbeReport, old: ProbeReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    old.save(tmp_path)
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ctl_merge.probing.archive.save", fail)
    with pytest.raises(OutputError, match="no space left for .* Free space and run the same command again"):
        new.save(tmp_path)
    assert contents(tmp_path) == before


def test_every_figure_of_a_report_is_known(new: ProbeReport, old: ProbeReport, tmp_path: Path) -> None:
    """Those that are not would stay beside a later report that does not have them."""
    from ctl_merge.probing.figures import FILES

    for report in (new, old):
        report.save(tmp_path)
        assert {path.name for path in (tmp_path / "figures").iterdir()} <= set(FILES)
