"""A merge that is killed, wherever that may be, leaves nothing that looks whole, and goes on to the same bytes.

The suite kills at a slice of the operations and a few random instants; `make long` at all of them, and hundreds.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint
from crashes import kill_at, kill_at_instants, killed_before

from ctl_merge.errors import CtlMergeError
from ctl_merge.merging import Merge

SLICE = 12  # every so many operations are tried in the suite
Contents = dict[str, bytes]


@dataclass(frozen=True)
class Scenario:
    """A merge as it is started, and started again."""

    recipe: Path
    output: Path
    options: dict[str, Any]  # of the run that is killed
    workers: int
    expected: Contents
    old: Contents | None  # what stood there before

    def run(self) -> None:
        self.merge(**self.options)

    def merge(self, **options: Any) -> None:
        Merge(self.recipe, max_shard_size="1KB", num_workers=self.workers).write(self.output, **options)

    def prepare(self) -> None:
        """The output as it stands before the run that is killed."""
        shutil.rmtree(self.output.parent, ignore_errors=True)
        if self.old is None:
            return
        first = self.recipe.with_name("first.yaml")
        Merge(first, max_shard_size="1KB", num_workers=1).write(self.output)

    def check_aftermath(self) -> None:
        """What a crash may leave: nothing under the output's name, the new output, or the old one, whole."""
        found = contents(self.output) if self.output.exists() else None
        assert found in (None, self.expected, self.old)
        if self.old is not None and found is None:  # between the two renames
            kept = list(self.output.parent.glob(f".{self.output.name}.replaced.*"))
            assert [contents(folder) for folder in kept if any(folder.iterdir())] == [self.old]

    def go_on(self) -> None:
        """The next run ends with the same bytes as one that was never killed, and clears away what was left."""
        try:
            self.merge(resume=True, overwrite=self.old is not None and contents_or_none(self.output) == self.old)
        except CtlMergeError as error:
            assert "exists: choose another output" in str(error) and contents(self.output) == self.expected
        assert contents(self.output) == self.expected
        assert sorted(p.name for p in self.output.parent.iterdir()) == [self.output.name]


def contents(folder: Path) -> Contents:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contents_or_none(folder: Path) -> Contents | None:
    return contents(folder) if folder.exists() else None


def write_recipes(folder: Path, layers: int, width: int, trim: str) -> Path:
    """A base with a tokenizer, two experts, a recipe; and `first.yaml`, whose merge the other replaces."""
    torch.manual_seed(3)
    names = ("base", "a", "b")
    for name in names:
        tensors = {f"model.layers.{i}.q.weight": torch.randn(width, width) for i in range(layers)}
        write_checkpoint(folder / name, tensors, {"num_hidden_layers": layers})
    (folder / "base" / "merges.txt").write_text("x" * 1_000)
    models = [(folder / name, {"weight": 0.5}) for name in names[1:]]
    (folder / "first.yaml").write_text(recipe_text("task_arithmetic", models, folder / "base"))
    path = folder / "recipe.yaml"
    path.write_text(recipe_text("ties", models, folder / "base", {"density": 0.5, "trim": trim}))
    return path


KINDS: dict[str, dict[str, Any]] = {
    "a first merge": {},
    "a merge that replaces another": {"overwrite": True},
    "one with passes over the whole model": {"trim": "model"},
}


@pytest.fixture(params=KINDS)
def scenario(request: pytest.FixtureRequest, tmp_path: Path) -> Scenario:
    return make(tmp_path, workers=1, layers=4, width=16, **KINDS[request.param])


def make(
    folder: Path, workers: int, layers: int, width: int, overwrite: bool = False, trim: str = "tensor"
) -> Scenario:  # fmt: skip
    recipe = write_recipes(folder, layers, width, trim)
    output = folder / "out" / "merged"
    expected = folder / "expected" / "merged"
    Merge(recipe, max_shard_size="1KB").write(expected)
    old = None
    if overwrite:
        before = folder / "old" / "merged"
        Merge(folder / "first.yaml", max_shard_size="1KB").write(before)
        old = contents(before)
    options = {"overwrite": True} if overwrite else {}
    return Scenario(recipe, output, options, workers, contents(expected), old)


def test_killed_before_any_file_operation(scenario: Scenario) -> None:
    assert kill_at(scenario, scenario.output.parent, lambda operation: operation % SLICE == 5) >= 3


def test_killed_at_random_instants_with_two_workers(tmp_path: Path) -> None:
    scenario = make(tmp_path, workers=2, layers=40, width=128)
    assert kill_at_instants(scenario, random.Random(0), 6) >= 3


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_killed_before_every_file_operation_and_again_while_it_is_resumed(kind: str, tmp_path: Path) -> None:
    scenario = make(tmp_path, workers=1, layers=4, width=16, **KINDS[kind])
    draw = random.Random(1)

    def again(total: int) -> bool:
        if scenario.output.exists():
            return False
        resume = lambda: scenario.merge(resume=True, overwrite=bool(scenario.options))  # noqa: E731
        return killed_before(resume, scenario.output.parent, draw.randrange(total))

    kills = kill_at(scenario, scenario.output.parent, lambda operation: True, again)
    print(f"\n{kind}: {kills} kills")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_hundreds_of_random_instants(kind: str, tmp_path: Path) -> None:
    scenario = make(tmp_path, workers=2, layers=40, width=128, **KINDS[kind])
    kills = kill_at_instants(scenario, random.Random(2), 150)
    print(f"\n{kind}: {kills} kills")
    assert kills >= 75
