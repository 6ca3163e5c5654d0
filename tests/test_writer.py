"""The writer: files as `save_file` writes them, whatever the workers, and whatever interrupted an earlier run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctl_merge.checkpoint import CHUNK, Checkpoint
from ctl_merge.header import TensorSpec
from ctl_merge.workers import pool
from ctl_merge.writer import INDEX, JOURNAL, Shard, ShardWriter, plan_shards, write_at, write_index

CODES = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class InMemory(Checkpoint):
    """A checkpoint of given tensors that records which are read, and fails at one of them on request."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.name, self.config, self.given = "in memory", {}, dict(tensors)
        self.tensors = {name: TensorSpec(CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        self.reads: list[str] = []
        self.fails_at: str | None = None

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        if tensor == self.fails_at and start:
            raise RuntimeError("interrupted")
        self.reads.append(tensor)
        out.copy_(self.given[tensor].reshape(-1)[start : start + out.numel()])


def assorted() -> dict[str, Tensor]:
    """Tensors of every dtype, empty and without dimensions, under odd names."""
    generator = torch.Generator().manual_seed(1)
    random = {
        f"layers.{i}.{dtype}": torch.randint(0, 2, (3, i + 1), generator=generator).to(dtype)
        for i, dtype in enumerate(CODES)
    }
    return {
        **random,
        "long": torch.randn(2 * CHUNK + 3, generator=generator),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "layers.10.q": torch.ones(2),
        'quote"back\\slash': torch.zeros(3, dtype=torch.float16),
        "模型.é\n\u2028": torch.ones(5),
        "": torch.ones(1),
    }


def write(folder: Path, checkpoint: Checkpoint, *, max_bytes: int = 10**12, workers: int = 2) -> int:
    folder.mkdir(exist_ok=True)
    return ShardWriter(folder, plan_shards(checkpoint.tensors, max_bytes), checkpoint).write(workers)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_a_file_is_the_bytes_of_save_file(tmp_path: Path, workers: int) -> None:
    tensors = assorted()
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert write(tmp_path / "out", InMemory(tensors), workers=workers) == 0
    assert shard_bytes(tmp_path / "out") == {"model.safetensors": (tmp_path / "expected").read_bytes()}


@pytest.mark.parametrize("dtype", CODES)
def test_every_dtype_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"b": torch.arange(5).to(dtype), "a": torch.ones((), dtype=dtype)}
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    write(tmp_path / "out", InMemory(tensors))
    assert shard_bytes(tmp_path / "out") == {"model.safetensors": (tmp_path / "expected").read_bytes()}


def test_every_shard_is_the_bytes_of_save_file_and_the_index_finds_all(tmp_path: Path) -> None:
    checkpoint = InMemory(assorted())
    shards = plan_shards(checkpoint.tensors, 100)
    write(tmp_path / "out", checkpoint, max_bytes=100)
    write_index(tmp_path / "out", shards)
    assert len(shards) > 3
    for shard in shards:
        save_file({n: checkpoint.given[n] for n in shard.specs}, tmp_path / "expected", metadata={"format": "pt"})
        assert (tmp_path / "out" / shard.file).read_bytes() == (tmp_path / "expected").read_bytes()
    index = json.loads((tmp_path / "out" / INDEX).read_text("utf-8"))
    assert index["metadata"] == {
        "total_size": sum(t.nbytes for t in checkpoint.given.values()),
        "total_parameters": sum(t.numel() for t in checkpoint.given.values()),
    }
    for name, file in index["weight_map"].items():  # as transformers reads a sharded checkpoint
        with safe_open(tmp_path / "out" / file, framework="pt") as stored:
            assert stored.metadata() == {"format": "pt"}
            assert torch.equal(stored.get_tensor(name), checkpoint.given[name])
    assert set(index["weight_map"]) == set(checkpoint.given)


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    write_index(tmp_path, plan_shards({"a": TensorSpec("F32", (2,))}, 100))
    assert not (tmp_path / INDEX).exists()


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(30, 100))
def test_shards_are_those_of_huggingface_hub(sizes: list[int], most: int) -> None:
    specs = {f"w{i}": TensorSpec("U8", (size,)) for i, size in enumerate(sizes)}
    tensors = {name: torch.zeros(spec.shape, dtype=torch.uint8) for name, spec in specs.items()}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=most)
    assert {shard.file: list(shard.specs) for shard in plan_shards(specs, most)} == split.filename_to_tensors


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 60))
def test_no_shard_is_larger_than_asked_for_unless_one_tensor_is(sizes: list[int], most: int) -> None:
    specs = {f"w{i}": TensorSpec("U8", (size,)) for i, size in enumerate(sizes)}
    shards = plan_shards(specs, most)
    assert [name for shard in shards for name in shard.specs] == list(specs)
    assert all(shard.specs and (shard.nbytes <= most or len(shard.specs) == 1) for shard in shards)


def interrupted_run(folder: Path, tensors: dict[str, Tensor], fails_at: str = "long", **options: Any) -> InMemory:
    checkpoint = InMemory(tensors)
    checkpoint.fails_at = fails_at
    with pytest.raises(RuntimeError, match="interrupted"):
        write(folder, checkpoint, workers=1, **options)
    return checkpoint


@pytest.mark.parametrize("max_bytes", [100, 10**9])
def test_an_interrupted_run_goes_on_to_the_same_bytes_and_reads_only_the_rest(tmp_path: Path, max_bytes: int) -> None:
    tensors = assorted()
    write(tmp_path / "expected", InMemory(tensors), max_bytes=max_bytes)
    first = interrupted_run(tmp_path / "out", tensors, max_bytes=max_bytes)
    finished = set(first.reads) - {"long"}
    assert finished
    second = InMemory(tensors)
    resumed = write(tmp_path / "out", second, max_bytes=max_bytes)
    assert resumed >= len(finished)
    assert not finished & set(second.reads)
    assert "long" in second.reads
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "expected")


def test_a_finished_run_is_not_read_again_and_tells_its_bytes_as_progress(tmp_path: Path) -> None:
    tensors = assorted()
    write(tmp_path, InMemory(tensors))
    again, told = InMemory(tensors), []
    writer = ShardWriter(tmp_path, plan_shards(again.tensors, 10**12), again)
    assert writer.write(2, told.append) == len(tensors)
    assert again.reads == []
    assert sum(told) == sum(t.nbytes for t in tensors.values())


def resume_after(folder: Path, tensors: dict[str, Tensor], damage: Any) -> list[str]:
    """Interrupt, damage what is there, go on; the tensors that were read again. The bytes are right in any case."""
    write(folder / "expected", InMemory(tensors), max_bytes=400)
    interrupted_run(folder / "out", tensors, max_bytes=400)
    damage(folder / "out")
    again = InMemory(tensors)
    write(folder / "out", again, max_bytes=400)
    assert shard_bytes(folder / "out") == shard_bytes(folder / "expected")
    return again.reads


FIRST = "model-00001-of-00002.safetensors"


def few() -> dict[str, Tensor]:
    """Two shards of 400 bytes and more: a, b and c in the first, `long` in the second."""
    return {"a": torch.ones(30), "b": torch.ones(40), "c": torch.zeros(10), "long": torch.ones(CHUNK + 1)}


@pytest.mark.parametrize("tail", ['["lo', '["long", 12', "[", "{}", "[1, 2, 3]", '["unknown", 5]', "\udcff"])
def test_a_torn_last_line_of_the_journal_costs_nothing_but_itself(tmp_path: Path, tail: str) -> None:
    def tear(folder: Path) -> None:
        with (folder / JOURNAL).open("a", encoding="utf-8", errors="surrogateescape") as journal:
            journal.write(tail)

    assert set(resume_after(tmp_path, few(), tear)) == {"long"}


def test_a_journaled_tensor_whose_bytes_were_damaged_is_written_again(tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        data = bytearray((folder / FIRST).read_bytes())
        data[-50] ^= 1  # within b: c is the last 40 bytes
        (folder / FIRST).write_bytes(data)

    assert set(resume_after(tmp_path, few(), damage)) == {"b", "long"}


@pytest.mark.parametrize("kept", [None, 0, 300, 10_000])
def test_a_shard_that_was_deleted_or_changed_in_length_is_written_again(tmp_path: Path, kept: int | None) -> None:
    def damage(folder: Path) -> None:
        data = (folder / FIRST).read_bytes()
        (folder / FIRST).unlink()
        if kept is not None:
            (folder / FIRST).write_bytes((data + bytes(kept))[:kept])

    read = set(resume_after(tmp_path, few(), damage))
    assert read >= {"a", "b", "long"}  # c is zeros, and so is fresh space: nothing to write


def test_a_lost_journal_loses_only_time(tmp_path: Path) -> None:
    assert set(resume_after(tmp_path, few(), lambda folder: (folder / JOURNAL).unlink())) == set(few())


def test_a_damaged_header_is_written_again(tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        data = bytearray((folder / FIRST).read_bytes())
        data[:20] = bytes(20)
        (folder / FIRST).write_bytes(data)

    assert set(resume_after(tmp_path, few(), damage)) == {"long"}


def test_what_the_kernel_takes_in_pieces_arrives_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: whole(descriptor, data[:7], offset))
    with (tmp_path / "file").open("wb") as file:
        write_at(file.fileno(), memoryview(bytes(range(100))), 3)
    assert (tmp_path / "file").read_bytes() == bytes(3) + bytes(range(100))


def test_the_pool_keeps_order_holds_little_ahead_and_ends_at_the_first_error() -> None:
    taken: list[int] = []

    def items():
        for i in range(10_000):
            taken.append(i)
            yield i

    def double(i: int) -> int:
        if i == 50:
            raise ValueError("fifty")
        return 2 * i

    threads, found = torch.get_num_threads(), []
    with pytest.raises(ValueError, match="fifty"), pool(3) as mapped:
        for result in mapped(double, items()):
            found.append(result)
    assert found == [2 * i for i in range(50)]
    assert len(taken) < 100
    assert torch.get_num_threads() == threads


def test_an_empty_checkpoint_is_an_empty_file(tmp_path: Path) -> None:
    assert plan_shards({}, 10) == (Shard("model.safetensors", {}),)
    write(tmp_path / "out", InMemory({}))
    save_file({}, tmp_path / "expected", metadata={"format": "pt"})
    assert shard_bytes(tmp_path / "out") == {"model.safetensors": (tmp_path / "expected").read_bytes()}
