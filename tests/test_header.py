"""The safetensors header: laid out as the reference implementation does it, and refused where it would refuse."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ctl_merge.errors import CheckpointError
from ctl_merge.header import (
    MAX_HEADER_BYTES,
    Header,
    TensorSpec,
    build_header,
    parse_header,
    parse_length,
    save_order,
    total_bytes,
)
from ctl_merge.stored import local_header

WHERE = "folder/model.safetensors"
U8 = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def parse(file: bytes) -> Header:
    length = parse_length(file[:8], len(file), WHERE)
    return parse_header(file[8 : 8 + length], len(file), WHERE)


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(**changes: Any) -> bytes:
    """A file of a tensor `a` of one byte, with changes to its entry."""
    return pack({"a": U8 | changes}, b"x")


ENTRY = json.dumps(U8).encode()
CORRUPT = {
    "empty file": b"",
    "shorter than its length field": b"\x10\0\0",
    "cut in the header": pack({"a": U8}, b"x")[:20],
    "cut in the data": pack({"a": U8 | {"shape": [4], "data_offsets": [0, 4]}}, b"xyz"),
    "trailing bytes": pack({"a": U8}, b"xy"),
    "huge length": struct.pack("<Q", 2**63) + b"{}",
    "no header at all": pack(b""),
    "not JSON": pack(b"<!DOCTYPE html>"),
    "not UTF-8": pack(b'{"\xff": 1}'),
    "UTF-16": pack("{}".encode("utf-16")),
    "byte order mark": pack(b"\xef\xbb\xbf{}"),
    "not an object": pack([]),
    "entry is a list": pack({"a": ["U8", [1], [0, 1]]}, b"x"),
    "entry without shape": pack({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"),
    "unknown dtype": one(dtype="F128"),
    "dtype is a list": one(dtype=["U8"]),
    "shape is a number": one(shape=1),
    "negative size": one(shape=[-1]),
    "fractional size": one(shape=[1.0]),
    "size is a truth value": one(shape=[True]),
    "size is not a number": pack(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x"),
    "negative offset": one(data_offsets=[-1, 0]),
    "end before begin": one(data_offsets=[1, 0]),
    "three offsets": one(data_offsets=[0, 1, 1]),
    "wrong number of bytes": one(shape=[2]),
    "more elements than memory has bytes": one(shape=[2**62, 2**62, 0], data_offsets=[0, 0]),
    "ends within a byte": one(dtype="F4", shape=[3]),
    "hole before the first tensor": pack({"a": U8 | {"data_offsets": [1, 2]}}, b"xx"),
    "hole between tensors": pack({"a": U8, "b": U8 | {"data_offsets": [2, 3]}}, b"xxx"),
    "overlap": pack({"a": U8, "b": U8}, b"x"),
    "empty tensor within another": pack(
        {"a": U8 | {"shape": [2], "data_offsets": [0, 2]}, "b": U8 | {"shape": [0], "data_offsets": [1, 1]}}, b"xx"
    ),
    "the same name twice": pack(b'{"a":%s,"a":%s}' % (ENTRY, ENTRY), b"x"),
    "the same key twice in an entry": pack(b'{"a":{"dtype":"U8","shape":[0],"shape":[1],"data_offsets":[0,1]}}', b"x"),
    "name that UTF-8 cannot write": pack(b'{"\\ud800":%s}' % ENTRY, b"x"),
    "metadata is a list": pack({"__metadata__": []}),
    "metadata holds numbers": pack({"__metadata__": {"epochs": 3}}),
    "metadata holds NaN": pack(b'{"__metadata__": {"x": NaN}}'),
    "deep nesting": pack(b'{"a":' * 100_000),
    "deep lists": pack(b'{"a":' + b"[" * 100_000),
    "shape of a million sizes": one(shape=[2**62] * 1_000_000),
    "number of a million digits": pack(b'{"a":' + b"9" * 1_000_000 + b"}"),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_a_corrupt_header_is_refused_by_the_name_of_its_file_and_soon(what: str) -> None:
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"^folder/model\.safetensors.*Download"):
        parse(CORRUPT[what])
    assert time.monotonic() - start < 2


def test_a_file_with_a_corrupt_header_is_named_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CORRUPT["overlap"])
    with pytest.raises(CheckpointError, match=f"^{path}: the safetensors header is corrupt"):
        local_header(path)
    with pytest.raises(CheckpointError, match=r"absent.*cannot be read: No such file"):
        local_header(tmp_path / "absent")


def test_the_length_is_refused_beyond_the_reference_limit_however_large_the_file() -> None:
    assert parse_length(struct.pack("<Q", MAX_HEADER_BYTES), 10**12, WHERE) == MAX_HEADER_BYTES
    with pytest.raises(CheckpointError, match="100,000,001 bytes"):
        parse_length(struct.pack("<Q", MAX_HEADER_BYTES + 1), 10**12, WHERE)


def test_offsets_count_from_the_start_of_the_file() -> None:
    file = pack({"b": U8 | {"data_offsets": [1, 2]}, "a": U8, "__metadata__": {"format": "pt"}}, b"xy")
    header = parse(file)
    assert {name: file[at : at + 1] for name, at in header.offsets.items()} == {"a": b"x", "b": b"y"}
    assert header.tensors == {"a": TensorSpec("U8", (1,)), "b": TensorSpec("U8", (1,))}
    assert header.metadata == {"format": "pt"}


def test_spaces_unknown_keys_and_no_metadata_are_fine() -> None:
    assert parse(pack(b'  {"__metadata__": null}   ')).metadata == {}
    assert parse(one(comment="x")).tensors == {"a": TensorSpec("U8", (1,))}


def test_sizes_in_bytes() -> None:
    assert TensorSpec("BF16", (3, 5)).nbytes == 30
    assert TensorSpec("F64", ()).nbytes == 8
    assert TensorSpec("F4", (4,)).nbytes == 2
    assert TensorSpec("F32", (0, 7)).nbytes == 0
    assert total_bytes([TensorSpec("U8", (3,)), TensorSpec("I64", (2,))]) == 19


def test_built_headers_are_those_of_save_file(tmp_path: Path) -> None:
    tensors = {'quote"\\\n\x01': torch.zeros(3), "é 名": torch.zeros(2, 2, dtype=torch.int8), "z": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    file = (tmp_path / "a").read_bytes()
    specs = {
        'quote"\\\n\x01': TensorSpec("F32", (3,)), "é 名": TensorSpec("I8", (2, 2)), "z": TensorSpec("F32", ())
    }  # fmt: skip
    built, offsets = build_header(specs, {"format": "pt"})
    assert file.startswith(built)
    assert len(file) == len(built) + 20
    assert parse(file).offsets == offsets
    assert save_order(specs) == ['quote"\\\n\x01', "z", "é 名"]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
DTYPES = st.sampled_from(["BOOL", "U8", "I16", "F16", "BF16", "F32", "I64", "F64", "C64", "F8_E4M3"])
SPECS = st.builds(TensorSpec, DTYPES, st.lists(st.integers(0, 5), max_size=3).map(tuple))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, SPECS, max_size=6), st.dictionaries(NAMES, NAMES, max_size=2))
def test_what_is_built_is_parsed_back(specs: dict[str, TensorSpec], metadata: dict[str, str]) -> None:
    raw, offsets = build_header(specs, metadata)
    assert len(raw) % 8 == 0
    header = parse(raw + bytes(total_bytes(specs.values())))
    assert (header.tensors, header.offsets, header.metadata) == (specs, offsets, metadata)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {"dtype": DTYPES | JSON, "shape": st.lists(st.integers(0, 3), max_size=2) | JSON},
    optional={"data_offsets": st.tuples(st.integers(0, 9), st.integers(0, 9)) | JSON},
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | JSON, max_size=3), st.integers(0, 20))
def test_only_checkpoint_errors_come_out_and_what_we_accept_the_reference_accepts(header: dict, size: int) -> None:
    file = pack(header, bytes(size))
    try:
        ours = parse(file)
    except CheckpointError:
        return
    theirs = dict(safetensors.deserialize(file))
    assert {name: (spec.dtype, list(spec.shape)) for name, spec in ours.tensors.items()} == {
        name: (entry["dtype"], entry["shape"]) for name, entry in theirs.items()
    }


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 100))
def test_only_checkpoint_errors_come_out_of_arbitrary_bytes(raw: bytes, file_size: int) -> None:
    for attempt in (lambda: parse(raw), lambda: parse_header(raw, file_size, WHERE)):
        try:
            assert isinstance(attempt(), Header)
        except CheckpointError as error:
            assert WHERE in str(error)
