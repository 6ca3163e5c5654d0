"""What has weights: a table from headers, and `read`.

Everything that has weights is a Checkpoint: files in a folder or on the Hub (`stored.py`), a recipe's merge
(`merged.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctl_merge import hub
from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import CheckpointError
from ctl_merge.header import TensorSpec, dtype_name
from ctl_merge.hub import HubSnapshot
from ctl_merge.mapped import InPlace
from ctl_merge.reference import ModelRef
from ctl_merge.workers import compute_alone

# Elements of a tensor that are worked on at once. Several float64 copies of it stay in cache, and the allocator hands
# out temporaries of this size again and again; of twice the size each is fresh pages, six times as slow.
CHUNK = 1 << 17
_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "C64": "complex64",
}  # fmt: skip


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a safetensors code that is mergeable or plain data; CheckpointError for a quantised one."""
    try:
        return getattr(torch, _NAMES.get(code) or dtype_name(code))
    except KeyError:
        raise CheckpointError(f"dtype {code} is a quantised format: dequantise the checkpoint first") from None


class Checkpoint(ABC):
    """A table `name -> (dtype, shape)` known without reading weights, and `read`."""

    name: str  # as messages call it
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]

    @property
    def code(self) -> Path | None:
        """The folder of the config, pinned if it came from the Hub: where code that a model brings along lies.

        None where there is none. Nothing in it is run unless somebody says so.
        """
        return None

    @abstractmethod
    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        """Fill the contiguous 1-D `out` with the tensor's elements from `start` on, converted to its dtype.

        Thread-safe. Raises CheckpointError where the weights cannot be read.
        """

    def read(self, tensor: str) -> Tensor:
        """The whole tensor, in the dtype and shape of its spec, in memory of its own."""
        spec = self.tensors[tensor]
        out = torch.empty(spec.numel, dtype=torch_dtype(spec.dtype))
        self.read_into(tensor, out)
        return out.view(spec.shape)

    def bytes_into(self, tensor: str, out: np.ndarray, start: int = 0) -> None:
        """Fill `out`, uint8, with the bytes that a file has of the tensor's elements from `start` on."""
        compute_alone()
        self.read_into(tensor, torch.from_numpy(out).view(torch_dtype(self.tensors[tensor].dtype)), start)

    def block(self, tensor: str) -> int:
        """How many elements are best read at once; partial reads are cheapest where they begin at multiples of it."""
        return CHUNK

    def stored_as(self, tensor: str) -> str | None:
        """The dtype's code, where the values in the file are what is read; None where something is done to them."""
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)


class FileCheckpoint(Checkpoint):
    """A checkpoint in files.

    `folder` holds config and tokenizer, and after `fetch` the weights. `snapshot` is the Hub's pinned state, None for a
    local folder. `file_sizes`: bytes of each weight file. `held_bytes`: memory that reading takes besides chunks.
    `decisions` and `warnings`: what a reader of the plan should know of it. `applied_to`: the model that it changes, if
    it is an adapter.
    """

    ref: ModelRef
    folder: Path
    snapshot: HubSnapshot | None
    file_sizes: Mapping[str, int]
    decisions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    applied_to: ModelRef | None = None
    held_bytes: int = 0

    @property
    def code(self) -> Path | None:
        return self.folder

    @abstractmethod
    def fetch(self) -> None:
        """Make the weights local: downloads what the cache lacks."""

    def stored(self, tensor: str) -> tuple[ModelRef, str]:
        """The checkpoint that holds a tensor, and its name there: this one, as a rule."""
        return self.ref, tensor

    def mapped(self, tensor: str) -> InPlace | None:
        """The tensor's bytes as they lie in the file; None where they are to be read."""
        return None

    def sources(self) -> dict[ModelRef, FileCheckpoint]:
        """The checkpoints in files that it is made of: itself, as a rule."""
        return {self.ref: self}

    def read_bytes(self, tensor: str) -> int:
        """How much is read from files for one tensor."""
        return self.tensors[tensor].nbytes

    def working_bytes(self) -> int:
        """How much each thread keeps in memory to read on, at most."""
        return 0

    def missing_bytes(self) -> int:
        """What is to be downloaded of its weights."""
        if self.snapshot is None:
            return 0
        there = hub.cached(self.snapshot, self.file_sizes)
        return sum(size for file, size in self.file_sizes.items() if file not in there)

    def state(self) -> Any:
        """What changes when the weights do: the commit, or size and time of each file. Raises CheckpointError."""
        if self.snapshot is not None:
            return self.snapshot.commit
        return {file: _state(self.folder / file) for file in self.file_sizes}


def _state(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def chunks(count: int) -> Iterator[tuple[int, int]]:
    """[begin, end) pairs that cut `count` elements into chunks."""
    for begin in range(0, count, CHUNK):
        yield begin, min(begin + CHUNK, count)
