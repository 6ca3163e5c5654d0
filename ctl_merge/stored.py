"""Checkpoints in safetensors files, local or on the Hub."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ctl_merge import hub
from ctl_merge.bounded import MOST_CONFIG, MOST_INDEX, parse_bounded, read_bounded
from ctl_merge.checkpoint import CHUNK, FileCheckpoint, chunks, raw_bytes, torch_dtype
from ctl_merge.companions import is_companion
from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import CheckpointError, HubError
from ctl_merge.header import MAX_HEADER_BYTES, Header, local_header, parse_header, parse_length
from ctl_merge.mapped import MappedFile
from ctl_merge.reference import ModelRef, near_folder

ADAPTER_CONFIG = "adapter_config.json"
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
Identity = tuple[int, int, int, int]  # device, inode, bytes, time of change

_WEIGHTS = frozenset(name for single in _SINGLE for name in (single, f"{single}.index.json"))


class StoredCheckpoint(FileCheckpoint):
    """Weights in safetensors files, in a folder or (until `fetch`) on the Hub."""

    def __init__(
        self, ref: ModelRef, folder: Path, headers: Mapping[str, Header], sizes: Mapping[str, int],
        snapshot: hub.HubSnapshot | None = None, config: str = "config.json",
        identities: Mapping[str, Identity] | None = None,
    ) -> None:  # fmt: skip
        self.ref, self.name, self.folder, self.snapshot = ref, ref.text, folder, snapshot
        self.config = read_json(folder / config, self.name)
        self.file_sizes = dict(sizes)
        self.tensors = {name: spec for header in headers.values() for name, spec in header.tensors.items()}
        self._place = {n: (file, at) for file, h in headers.items() for n, at in h.offsets.items()}
        if len(self.tensors) < sum(len(header.tensors) for header in headers.values()):
            twice = next(n for n in self.tensors if sum(n in header.tensors for header in headers.values()) > 1)
            raise CheckpointError(f"{self.name}: the tensor {twice!r} is stored in two of its files")
        check_names(self.name, self.tensors)
        self._identity = dict(identities or {})
        self._staging = threading.local()

    def fetch(self) -> None:
        if self.snapshot is not None:
            self.folder = hub.download(self.snapshot, self.file_sizes)

    def stored_as(self, tensor: str) -> str | None:
        return self.tensors[tensor].dtype

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        spec = self.tensors[tensor]
        dtype = torch_dtype(spec.dtype)
        file, offset = self._place[tensor]
        offset += start * dtype.itemsize
        descriptor = self._open(file)
        try:
            if out.dtype == dtype:
                self._read_bytes(descriptor, raw_bytes(out), offset, file, tensor)
                return
            for begin, end in chunks(out.numel()):
                staged = self._stage(end - begin, dtype)
                self._read_bytes(descriptor, raw_bytes(staged), offset + begin * dtype.itemsize, file, tensor)
                out[begin:end].copy_(staged)
        finally:
            os.close(descriptor)

    def mapped(self, tensor: str) -> MappedFile | None:
        file, offset = self._place[tensor]
        descriptor = self._open(file)
        try:
            return MappedFile(descriptor, offset, self.tensors[tensor].nbytes)
        except (OSError, ValueError):
            return None
        finally:
            os.close(descriptor)

    def _open(self, file: str) -> int:
        """Open a weight file; refuse one that is not the file whose header was read."""
        try:
            descriptor = os.open(os.path.join(self.folder, file), os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.name}: {file} cannot be read: {error.strerror}") from None
        identity = _identity(descriptor)
        if self._identity.setdefault(file, identity) != identity or identity[2] != self.file_sizes[file]:
            os.close(descriptor)
            raise CheckpointError(f"{self.name}: {file} changed while it was being read: start the merge again")
        return descriptor

    def _read_bytes(self, descriptor: int, target: memoryview, offset: int, file: str, tensor: str) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(descriptor, [target[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.name}: reading {tensor!r} from {file}: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{self.name}: {file} ends in the middle of {tensor!r}: download it again")
            done += count

    def _stage(self, count: int, dtype: torch.dtype) -> Tensor:
        """This thread's buffer: fresh memory for every chunk would cost more than the arithmetic."""
        buffer = getattr(self._staging, "buffer", None)
        if buffer is None:
            buffer = self._staging.buffer = torch.empty(CHUNK * 8, dtype=torch.uint8)
        return buffer[: count * dtype.itemsize].view(dtype)


def check_names(model: str, names: Iterable[str]) -> None:
    """Refuse tensors whose names a terminal would obey, or that would break the lines of a card."""
    odd = next((name for name in names if _CONTROLS.search(name)), None)
    if odd is not None:
        raise CheckpointError(f"{model}: the tensor's name {odd!r} has control characters: refused")


def _identity(file: Path | int) -> Identity:
    """What tells a file from another one that has taken its place, and from itself after a change."""
    try:
        stat = os.stat(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def companion_folder(ref: ModelRef) -> Path:
    """The folder with a model's files beside its weights, of which nothing is read. Raises HubError."""
    if ref.folder is not None:
        return ref.folder
    assert ref.repo_id is not None
    snapshot = hub.resolve(ref.repo_id, ref.revision)
    return hub.download(snapshot, [file.path for file in snapshot.files if is_companion(file.path)])


def read_json(path: Path, name: str, most: int = MOST_CONFIG) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint, of at most so many bytes. Raises CheckpointError."""
    try:
        data = parse_bounded(read_bounded(path, most).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{name} has no {path.name}: is it a model in the Hugging Face format?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: {path.name} is not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{name}: {path.name} is not a JSON object")
    return data


def remote_header(snapshot: hub.HubSnapshot, path: str, size: int) -> Header:
    """The checked header of a safetensors file on the Hub, by range requests."""
    where = f"{snapshot.repo_id}@{snapshot.revision}: {path}"
    guess = min(size, 1 << 17)  # most headers fit, so that one request does
    first = hub.read_range(snapshot, path, 0, guess)
    length = parse_length(first[:8], size, where)
    raw = first[8 : 8 + length]
    if len(raw) < length <= MAX_HEADER_BYTES:
        raw += hub.read_range(snapshot, path, len(first), 8 + length)
    return parse_header(raw, size, where)


def open_checkpoint(ref: ModelRef, complete: bool = False) -> FileCheckpoint:
    """The checkpoint that a reference names, from its headers: no weight is read or, if it can be avoided, downloaded.

    An adapter that is named alone is applied to the model that its config names, or refused (`complete`). Raises
    CheckpointError or HubError.
    """
    if ref.adapter is not None:
        from ctl_merge.adapter import AdaptedCheckpoint

        return AdaptedCheckpoint(ref, open_checkpoint(ref.bare), ref.adapter)
    listing, snapshot = listed(ref)
    if ADAPTER_CONFIG in listing and not _WEIGHTS & listing.keys() and not complete:
        from ctl_merge.adapter import adapted_alone

        return adapted_alone(ref)
    folder = with_files(ref, snapshot, lambda p: is_companion(p) or p.endswith(".index.json") or p == "README.md")
    return _open(ref, folder, listing, snapshot)


def listed(ref: ModelRef) -> tuple[dict[str, int], hub.HubSnapshot | None]:
    """The files that a reference's folder or repository has, with their sizes; the Hub's state, None for a folder."""
    if ref.folder is not None:
        try:
            return {p.name: p.stat().st_size for p in ref.folder.iterdir() if p.is_file()}, None
        except OSError as error:
            raise CheckpointError(f"{ref} cannot be read: {error.strerror}") from None
    assert ref.repo_id is not None
    try:
        snapshot = hub.resolve(ref.repo_id, ref.revision)
    except HubError as error:
        raise HubError(f"{error} (There is no folder {ref.text!r} either.){near_folder(ref.text)}") from error
    return {file.path: file.size for file in snapshot.files}, snapshot


def with_files(ref: ModelRef, snapshot: hub.HubSnapshot | None, wanted: Callable[[str], bool]) -> Path:
    """The reference's folder in which the files lie that are wanted: downloaded where it is on the Hub."""
    if snapshot is None:
        assert ref.folder is not None
        return ref.folder
    return hub.download(snapshot, [file.path for file in snapshot.files if wanted(file.path)])


def _open(ref: ModelRef, folder: Path, listing: Mapping[str, int], snapshot: hub.HubSnapshot | None) -> FileCheckpoint:
    files, named = _weight_files(ref.text, folder, listing)
    checkpoint = open_files(ref, folder, files, listing, snapshot)
    lost = sorted(named - checkpoint.tensors.keys())
    if lost:
        raise CheckpointError(
            f"{ref}: its index names {len(lost)} tensors that its files lack, such as {lost[0]}: download it again"
        )
    return checkpoint


def open_files(
    ref: ModelRef, folder: Path, files: list[str], listing: Mapping[str, int], snapshot: hub.HubSnapshot | None,
    config: str = "config.json",
) -> FileCheckpoint:  # fmt: skip
    """The tensors of these files, with the config of that name beside them; an adapter's counts like its weights."""
    sizes = {file: listing[file] for file in (*files, *([] if config == "config.json" else [config]))}
    if files[0].endswith(".bin"):
        from ctl_merge.pickled import PickledCheckpoint

        if snapshot:  # a pickle has no header that could be read before
            hub.check_space(sum(listing[file] for file in files))
            folder = hub.download(snapshot, files)
        return PickledCheckpoint(ref, folder, files, sizes, snapshot, config)
    identities = {}
    if snapshot is None or snapshot.folder is not None:
        identities = {file: _identity(folder / file) for file in files}  # first: a file replaced in between is noticed
        headers = {file: local_header(folder / file) for file in files}
    else:
        headers = _in_parallel(lambda file: remote_header(snapshot, file, sizes[file]), files)
    return StoredCheckpoint(ref, folder, headers, sizes, snapshot, config, identities)


def _in_parallel(function: Callable[[str], Header], files: list[str]) -> dict[str, Header]:
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(files, pool.map(function, files), strict=True))


def _weight_files(name: str, folder: Path, listing: Mapping[str, int]) -> tuple[list[str], set[str]]:
    """The files that hold the weights, and the tensors that their index names.

    As transformers chooses them: one file before an index, safetensors first.
    """
    for single in _SINGLE:
        index = f"{single}.index.json"
        if single in listing:
            return [single], set()
        if index in listing:
            weight_map: Any = read_json(folder / index, name, MOST_INDEX).get("weight_map")
            files = _indexed(name, weight_map, index)
            for file in files:
                if file not in listing:
                    raise CheckpointError(f"{name}: {file}, which {index} names, is missing: download it again")
            return files, set(weight_map)
    found = ", ".join(sorted(listing)[:8]) or "nothing"
    if ADAPTER_CONFIG in listing:
        raise CheckpointError(f"{name} is an adapter: name it after a model that has weights, as model+adapter")
    raise CheckpointError(
        f"{name} has no model.safetensors, pytorch_model.bin, or index of either; it has: {found}. "
        "Only weights in the Hugging Face format can be merged."
    )


def _indexed(name: str, weight_map: Any, index: str) -> list[str]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{name}: {index} has no weight_map")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        if "/" in file or "\\" in file or file.startswith("."):
            raise CheckpointError(f"{name}: {index} points to {file!r}, out of the model's folder: refused")
    return files
