"""Sources that fail, come short or change while they are merged: the right bytes, or an error and nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint

from ctl_merge.errors import CheckpointError
from ctl_merge.merging import Merge

READS = 3  # after so many the fault comes: in the middle of the second tensor of four


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    models = []
    for name in ("a", "b"):
        tensors = {f"model.layers.{i}.q.weight": torch.randn(16, 16) for i in range(4)}
        models.append((write_checkpoint(tmp_path / name, tensors, {"num_hidden_layers": 4}), {"weight": 0.5}))
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text("linear", models))
    return path


def write(recipe: Path, **options: Any) -> bytes:
    """The merged weights, read back."""
    Merge(recipe, num_workers=1).write(recipe.with_name("merged"), **options)
    return (recipe.with_name("merged") / "model.safetensors").read_bytes()


def expected(recipe: Path) -> bytes:
    Merge(recipe, num_workers=1).write(recipe.with_name("expected"))
    return (recipe.with_name("expected") / "model.safetensors").read_bytes()


def reads(monkeypatch: pytest.MonkeyPatch, fault: Callable[[int, list[memoryview], int], int]) -> None:
    """From the chosen read on, weights are read by `fault(descriptor, buffers, offset)`."""
    real, left = os.preadv, iter(range(READS))

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return real(descriptor, buffers, offset) if next(left, None) is not None else fault(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)


def broken(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_reads_that_come_short_are_continued(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, real = expected(recipe), os.preadv
    reads(monkeypatch, lambda descriptor, buffers, offset: real(descriptor, [buffers[0][:7]], offset))
    assert write(recipe) == whole


@pytest.mark.parametrize(
    "fault, told",
    [(broken, "reading 'model.layers.[0-3].q.weight' from model.safetensors: Input/output error"),
     (lambda *_: 0, "model.safetensors ends in the middle of 'model.layers.[0-3].q.weight': download it again")],
    ids=["an error of the disk", "the end of the file"],
)  # fmt: skip
def test_a_failing_read_is_told_and_the_merge_goes_on_later(
    fault: Callable[..., int], told: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = expected(recipe)
    with monkeypatch.context() as patch:
        reads(patch, fault)
        with pytest.raises(CheckpointError, match=told):
            write(recipe)
    assert not recipe.with_name("merged").exists()
    assert write(recipe, resume=True) == whole


@pytest.mark.parametrize("when", ["after the plan", "during the merge"])
def test_a_source_that_is_replaced_by_another_of_the_same_size_is_noticed(
    when: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other, real = recipe.parent / "b" / "model.safetensors", recipe.parent / "other", os.preadv

    def replace() -> None:
        shutil.copyfile(recipe.parent / "a" / "model.safetensors", other)
        os.replace(other, file)

    opened = Merge(recipe, num_workers=1)
    if when == "after the plan":
        replace()
    else:

        def replace_then_read(*args: Any) -> int:
            replace()
            return real(*args)

        reads(monkeypatch, replace_then_read)
    with pytest.raises(CheckpointError, match=r"b: model.safetensors changed while it was being read: start the merge"):
        opened.write(recipe.with_name("merged"))
    assert not recipe.with_name("merged").exists()


def test_a_source_that_is_written_to_during_the_merge_is_noticed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def change_then_read(*args: Any) -> int:
        with (recipe.parent / "a" / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
        return real(*args)

    reads(monkeypatch, change_then_read)
    with pytest.raises(CheckpointError, match=r"a: model.safetensors changed while it was being read"):
        write(recipe)
    assert not recipe.with_name("merged").exists()


def test_a_source_that_disappears_is_told(recipe: Path) -> None:
    opened = Merge(recipe, num_workers=1)
    (recipe.parent / "b" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read: No such file"):
        opened.write(recipe.with_name("merged"))
