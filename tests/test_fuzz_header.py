"""The coverage-guided fuzzer finds no defect in the header reader, and does find defects that are put there."""

from __future__ import annotations

import pytest
from fuzz_header import fuzz, parse

from ctl_merge.header import Header


def test_a_slice_of_fixed_seed() -> None:
    found = fuzz(seed=7, cases=2000)
    assert found.defect is None, str(found)
    assert found.cases == 2000 and found.accepted > 20 and len(found.edges) > 90 and len(found.said) > 20


def deep(file: bytes) -> Header:
    """A defect behind two conditions of its own, of which only the lines that were taken tell."""
    header = parse(file)
    if len(header.tensors) > 1:
        shapes = [spec.shape for spec in header.tensors.values()]
        if () in shapes:
            raise IndexError("of no axes")
    return header


def lenient(file: bytes) -> Header:
    """A file of which some is no tensor's."""
    return parse(file[:-1]) if len(file) % 3 else parse(file)


@pytest.mark.parametrize(("reader", "said"), [(deep, "IndexError: of no axes"), (lenient, "safetensors")])
def test_a_defect_is_found(reader: object, said: str) -> None:
    found = fuzz(seed=7, cases=5000, read=reader)  # type: ignore[arg-type]
    assert found.defect is not None and said in found.defect[1] and "DEFECT" in str(found)


def test_a_reader_that_does_not_end_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(file: bytes) -> Header:
        while True:
            pass

    monkeypatch.setattr("fuzz_header.SECONDS", 0.05)
    found = fuzz(seed=7, cases=1, read=endless)
    assert found.defect is not None and "TimeoutError" in found.defect[1]
