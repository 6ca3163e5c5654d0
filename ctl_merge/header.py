"""The safetensors header: parsed, checked, laid out.

Format: 8 bytes little-endian length N, N bytes of JSON `{name: {dtype, shape, data_offsets}, "__metadata__": {...}}`,
then the data without holes. Source: the safetensors format description and its reference implementation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ctl_merge.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit

# code -> (bits per element, rank). `save_file` orders tensors by descending rank, which also keeps the data aligned.
_DTYPES = {
    code: (bits, rank)
    for rank, (code, bits) in enumerate(
        [
            ("BOOL", 8), ("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("U8", 8), ("I8", 8), ("F8_E5M2", 8),
            ("F8_E4M3", 8), ("F8_E8M0", 8), ("F8_E4M3FNUZ", 8), ("F8_E5M2FNUZ", 8), ("I16", 16), ("U16", 16),
            ("F16", 16), ("BF16", 16), ("I32", 32), ("U32", 32), ("F32", 32), ("C64", 64), ("F64", 64), ("I64", 64),
            ("U64", 64),
        ]
    )
}  # fmt: skip
MERGEABLE = frozenset({"F16", "BF16", "F32", "F64"})
_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_CODES = {code: name for name, code in _NAMES.items()}


def dtype_code(name: str) -> str:
    """The safetensors code of a torch dtype's name: `bfloat16` -> `BF16`."""
    return _NAMES[name]


def dtype_name(code: str) -> str:
    """The torch name of a mergeable dtype's code: `BF16` -> `bfloat16`."""
    return _CODES[code]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of one tensor: a safetensors dtype code and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * _DTYPES[self.dtype][0] // 8

    @property
    def itemsize(self) -> int:
        """Bytes of an element; those of fewer bits are no tensor that is written."""
        return _DTYPES[self.dtype][0] // 8

    @property
    def width(self) -> int:
        """How many entries a row has: the last axis; a vector is one row."""
        return max(1, self.shape[-1]) if self.shape else 1


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of one file, with each one's first byte counted from the start of the file."""

    tensors: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _natural(digits: str) -> int:
    if digits.startswith("-"):  # -0 too, as safetensors has it
        raise ValueError(f"{digits} is no natural number")
    return int(digits)


def parse_length(first: bytes, file_size: int, where: str) -> int:
    """Bytes of JSON that follow the first eight bytes of a file of `file_size` bytes."""
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(file_size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{where} is not a safetensors file, or is cut short: its header claims {length:,} bytes, "
            f"the file has {file_size:,}. Download it again."
        )
    return length


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Parse and check the JSON part `raw` of the header of a file of `file_size` bytes.

    Raises CheckpointError for anything that is not exactly a safetensors header covering the whole file.
    """
    try:
        entries = json.loads(
            raw.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_int=_natural
        )
        if not isinstance(entries, dict):
            raise ValueError("it is no JSON object")
        metadata = _parse_metadata(entries.pop("__metadata__", None))
        "".join(entries).encode()  # a name that UTF-8 cannot write could not be written again
        specs = {name: _parse_entry(name, entry) for name, entry in entries.items()}
        _check_cover([(begin, end, name) for name, (_, begin, end) in specs.items()], file_size - 8 - len(raw))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: the safetensors header is corrupt ({error}). Download the file again."
        ) from None
    start = 8 + len(raw)
    return Header(
        tensors={name: spec for name, (spec, _, _) in specs.items()},
        offsets={name: start + begin for name, (_, begin, _) in specs.items()},
        metadata=metadata,
    )


def local_header(path: Path) -> Header:
    """The checked header of a local safetensors file. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = parse_length(file.read(8), size, str(path))
            return parse_header(file.read(length), size, str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _parse_metadata(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no table of texts")
    "".join([*metadata, *metadata.values()]).encode()
    return metadata


def _parse_entry(name: str, entry: object) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict):
        raise ValueError(f"entry of {name!r} is no object")
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r} of {name!r}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in [*shape, begin, end]):
        raise ValueError(f"shape or offsets of {name!r} are no natural numbers")
    elements = 1
    for n in shape:
        elements *= max(n, 1)
        if elements >= 2**63:
            raise ValueError(f"{name!r} claims more elements than a file can hold")
    spec = TensorSpec(dtype, tuple(shape))
    if spec.numel * _DTYPES[dtype][0] % 8:
        raise ValueError(f"{name!r} ends within a byte")
    if end - begin != spec.nbytes:
        raise ValueError(f"{name!r} has {end - begin} bytes where {spec.dtype} {list(spec.shape)} takes {spec.nbytes}")
    return spec, begin, end


def _check_cover(spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Tensors must tile the data exactly: no overlap, no hole, nothing past the end."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"{name!r} begins at byte {begin} of the data where {position} was due")
        position = end
    if position != data_bytes:
        raise ValueError(
            f"the tensors take {position:,} bytes and the file holds {data_bytes:,}: it is cut short or padded"
        )


def save_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Names in the order in which `safetensors.torch.save_file` stores them."""
    return sorted(specs, key=lambda name: (-_DTYPES[specs[name].dtype][1], name))


def build_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, length included, and each tensor's first byte in the file.

    Byte-identical to what `safetensors.torch.save_file` writes for the same tensors and metadata.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, position = {}, 0
    for name in save_order(specs):
        spec = specs[name]
        offsets[name] = position
        entries[name] = {
            "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, position + spec.nbytes]
        }  # fmt: skip
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + at for name, at in offsets.items()}


def total_bytes(specs: Iterable[TensorSpec]) -> int:
    """Sum of the tensors' sizes in bytes."""
    return sum(spec.nbytes for spec in specs)
