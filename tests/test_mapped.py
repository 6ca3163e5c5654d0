"""Files as memory: their bytes, and errors instead of signals."""

import os
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint

from ctl_merge import compiled, open_merge, parse_recipe
from ctl_merge.errors import CheckpointError
from ctl_merge.mapped import MappedFile
from ctl_merge.reference import ModelRef
from ctl_merge.stored import StoredCheckpoint, open_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux only")


@pytest.mark.parametrize("offset", [0, 8, 4094, 4096, 5000])
def test_a_piece_has_the_bytes_of_the_file(offset: int, tmp_path: Path) -> None:
    data = os.urandom(20_000)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        piece = MappedFile(file.fileno(), offset, len(data) - offset)
    for start, size in ((0, 10), (4000, 200), (2, len(data) - offset - 2)):
        found = piece.bytes(start, size)
        assert found is not None and found.tobytes() == data[offset + start :][:size]
    assert piece.bytes(1 - offset % 2, 4) is None  # the loops want whole numbers of two bytes


def test_a_file_that_became_shorter_is_said_not_signalled(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        piece = MappedFile(file.fileno(), 0, 1 << 20)
    os.truncate(path, 4096)
    assert piece.bytes(0, 4096) is not None
    assert piece.bytes(8192, 4096) is None


def test_a_merge_of_a_file_that_became_shorter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LEAST", 0)
    size = compiled.LOOP_CHUNK * 2
    for name in "ab":
        write_checkpoint(tmp_path / name, {"w": torch.ones(size, dtype=torch.bfloat16)})
    models = [(tmp_path / name, {"weight": 1}) for name in "ab"]
    merged = open_merge(parse_recipe(recipe_text("linear", models)))
    assert merged.has_loops
    out = torch.empty(compiled.LOOP_CHUNK, dtype=torch.bfloat16)
    merged.read_into("w", out)
    assert torch.equal(out, torch.ones_like(out))
    os.truncate(tmp_path / "b" / "model.safetensors", 1 << 16)
    with pytest.raises(CheckpointError, match=r"model\.safetensors (changed|ends)"):
        merged.read_into("w", out, compiled.LOOP_CHUNK)


def test_what_is_stored_is_mapped(tmp_path: Path) -> None:
    values = torch.arange(5, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(ModelRef("a", folder=write_checkpoint(tmp_path / "a", {"w": values})))
    assert isinstance(checkpoint, StoredCheckpoint)
    piece = checkpoint.mapped("w")
    found = piece and piece.bytes(0, 10)
    assert found is not None and found.tobytes() == values.view(torch.int16).numpy().tobytes()
