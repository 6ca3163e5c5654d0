"""Tensors to sharded safetensors files, resumable."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from xxhash import xxh3_64

from ctl_merge.checkpoint import Checkpoint, torch_dtype
from ctl_merge.deferred import torch
from ctl_merge.errors import CheckpointError, OutputError
from ctl_merge.header import MERGEABLE, TensorSpec, build_header, local_header, total_bytes
from ctl_merge.output import disk_errors, lock
from ctl_merge.processes import deal
from ctl_merge.workers import pool

METADATA = {"format": "pt"}
JOURNAL = "journal"
_READ = 1 << 22  # bytes that are read at once to check them
INDEX = "model.safetensors.index.json"

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Shard:
    """One output file and its tensors."""

    file: str
    specs: Mapping[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        return total_bytes(self.specs.values())


def plan_shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> tuple[Shard, ...]:
    """Cut tensors, in their order, into files of at most `max_bytes` of data; a larger tensor has a file of its own."""
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + spec.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.nbytes
    if len(groups) == 1:
        return (Shard("model.safetensors", groups[0]),)
    return tuple(Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", g) for i, g in enumerate(groups, 1))


def owned(shards: Sequence[Shard], index: int, count: int) -> list[Shard]:
    """Those that process `index` of `count` writes: whole shards, dealt out by bytes."""
    owners = deal([shard.nbytes for shard in shards], count)
    return [shard for shard, owner in zip(shards, owners, strict=True) if owner == index]


def write_index(folder: Path, shards: Iterable[Shard]) -> None:
    """The index that transformers reads; nothing if there is a single file."""
    shards = list(shards)
    if len(shards) == 1:
        return
    specs = [spec for shard in shards for spec in shard.specs.values()]
    metadata = {"total_parameters": sum(s.numel for s in specs), "total_size": total_bytes(specs)}
    weight_map = {name: shard.file for shard in shards for name in shard.specs}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", "utf-8")


def check_shards(folder: Path, shards: Iterable[Shard]) -> None:
    """Whether the folder's headers, sizes and index are those that were planned, as far as can be told without reading
    weights. Raises OutputError: the disk has not kept what was written to it.
    """
    for shard in shards:
        try:
            header = local_header(folder / shard.file)
            if header.tensors == shard.specs and header.metadata == METADATA:
                continue
            problem = "its header is not the one that was planned"
        except CheckpointError as error:
            problem = str(error)
        raise OutputError(
            f"{folder / shard.file} is not as it was written ({problem}): the disk or something else changed it. Run "
            "the same command with --resume, which writes again what is not whole"
        )


class ShardWriter:
    """Writes a checkpoint's tensors into preallocated shards in `folder`, and keeps a journal of those that are whole.

    The journal has a line `[name, xxh3_64]` for each tensor, with how many NaN and infinite entries it has where these
    are `counted` and there are any. Tensors that it lists and whose bytes still have that sum are not written again,
    so an interrupted run goes on where it stopped, to the same bytes. Of several processes
    each writes shards of its own, in a journal of its own; all journals are read.

    `finished(shard)` is called for each shard once it is whole, beside the work on the next one; no more than these
    two are in work, so that it may take the first away.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Shard], checkpoint: Checkpoint,
        finished: Callable[[Shard], object] | None = None, journal: str = JOURNAL, counted: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.shards, self.checkpoint, self.counted = folder, shards, checkpoint, counted
        self.finished, self.journal = finished, journal
        self._place: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()

    def write(self, workers: int, progress: Progress = lambda count: None) -> int:
        """Write all tensors that are not there yet; `progress` hears the bytes. Returns how many were there already."""
        known: dict[str, set[int]] = {}
        for name, checksum in journaled(self.folder):
            known.setdefault(name, set()).add(checksum)
        there = 0
        with (
            disk_errors(self.folder), (self.folder / self.journal).open("a", buffering=1, encoding="utf-8") as journal,
            pool(workers) as mapped, ThreadPoolExecutor(1, thread_name_prefix="finished") as beside,
        ):  # fmt: skip
            self._lock_journal(journal)
            taken: Future[object] | None = None
            for shards in [[shard] for shard in self.shards] if self.finished else [self.shards]:
                self._allocate(shards)
                names = [name for shard in shards for name in shard.specs]
                done = {
                    name for name in names if any(self._is_intact(name, checksum) for checksum in known.get(name, ()))
                }
                for name in done:
                    progress(self.checkpoint.tensors[name].nbytes)
                todo = [name for name in names if name not in done]
                for _ in mapped(lambda name: self._write_tensor(name, journal, progress), todo):
                    pass
                there += len(done)
                if self.finished:
                    if taken:
                        taken.result()
                    taken = beside.submit(self.finished, *shards)
            if taken:
                taken.result()
        return there

    def _lock_journal(self, journal: IO[str]) -> None:
        try:
            lock(journal.fileno())
        except BlockingIOError:
            raise OutputError(f"another process is writing the same shards of {self.folder}: wait for it") from None

    def _allocate(self, shards: Sequence[Shard]) -> None:
        """Create files at their full size with their headers, so that a full disk shows before the work on them."""
        for shard in shards:
            header, offsets = build_header(shard.specs, METADATA)
            self._place |= {name: (shard.file, at) for name, at in offsets.items()}
            path, size = self.folder / shard.file, len(header) + shard.nbytes
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if os.fstat(descriptor).st_size != size:
                    os.ftruncate(descriptor, 0)
                    _reserve(descriptor, size)
                write_at(descriptor, memoryview(header), 0)
            finally:
                os.close(descriptor)

    def _write_tensor(self, name: str, journal, progress: Progress) -> None:
        spec = self.checkpoint.tensors[name]
        file, offset = self._place[name]
        step, checksum, nan, infinite = self.checkpoint.block(name), xxh3_64(), 0, 0
        size = spec.itemsize
        out = np.empty(min(step, spec.numel) * size, np.uint8)
        descriptor = os.open(self.folder / file, os.O_WRONLY)
        try:
            for start in range(0, spec.numel, step):
                piece = out[: min(step, spec.numel - start) * size]
                self.checkpoint.bytes_into(name, piece, start)
                data = piece.data
                checksum.update(data)
                if self.counted and spec.dtype in MERGEABLE:
                    values = torch.from_numpy(piece).view(torch_dtype(spec.dtype))
                    nan += int(values.isnan().sum())
                    infinite += int(values.isinf().sum())
                write_at(descriptor, data, offset + start * size)
                progress(len(data))
        finally:
            os.close(descriptor)
        with self._lock:
            journal.write(
                json.dumps([name, checksum.intdigest(), *([nan, infinite] if nan or infinite else [])]) + "\n"
            )

    def _is_intact(self, name: str, checksum: int) -> bool:
        file, offset = self._place[name]
        with (self.folder / file).open("rb") as stored:
            stored.seek(offset)
            return checksum_of(stored, self.checkpoint.tensors[name].nbytes) == checksum


def checksum_of(file: IO[bytes], size: int, progress: Progress = lambda count: None) -> int | None:
    """The checksum of the next `size` bytes, as a journal has it; None if there are fewer. `progress` hears of them."""
    checksum = xxh3_64()
    while size > 0 and (data := file.read(min(size, _READ))):
        checksum.update(data)
        size -= len(data)
        progress(len(data))
    return None if size else checksum.intdigest()


def journaled(folder: Path) -> Iterator[tuple[str, int]]:
    """Each tensor that a journal of the folder lists as whole, with the checksum of its bytes."""
    for name, checksum, *_ in _journal_lines(folder):
        yield name, checksum


def let_through(folder: Path) -> dict[str, dict[str, int]]:
    """How many entries of each tensor are NaN, and infinite, as the journals of an unfinished output say."""
    found = {name: counts for name, _, *counts in _journal_lines(folder) if len(counts) == 2}
    return {name: {"nan": nan, "infinite": infinite} for name, (nan, infinite) in sorted(found.items())}


def _journal_lines(folder: Path) -> Iterator[list[Any]]:
    for path in sorted(folder.glob(f"{JOURNAL}*")):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed while writing it
            if isinstance(entry, list) and len(entry) > 1 and isinstance(entry[0], str):
                yield entry


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset`: the kernel may take less than it is given."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)  # a file system that cannot reserve: a full disk shows when it is reached
