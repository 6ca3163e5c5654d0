"""A coverage-guided fuzzer of the safetensors header reader: `python tests/fuzz_header.py --seconds 300`.

Inputs are mutated; those that take the reader along an edge between two of its lines that no input took before, or
make it say something new, are kept and mutated further. Of every case is asked: nothing but a CheckpointError comes
out, within a second and 256 MiB; what is accepted, safetensors itself reads as the same tensors, and comes back when it
is written anew. Prints what it found, and exits with 1 if that is a defect.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import safetensors
from fuzzing import within

import ctl_merge.header
from ctl_merge.errors import CheckpointError
from ctl_merge.header import Header, build_header, parse_header, parse_length, total_bytes

LONGEST = 4096  # bytes of a case
SECONDS, MEMORY = 1.0, 256 << 20  # of one case; of all beyond what the process holds at the start
BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "U8": 8, "F8_E8M0": 8, "I16": 16, "BF16": 16, "F32": 32, "C64": 64, "F64": 64}
WORDS = [
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'{"a":', b'"b":', b"{}", b"[]", b"[", b"]", b"{",
    b"}", b",", b":", b"null", b"true", b"1e999", b"NaN", b"-0", b"-1", b"0", b"1", b"2", b"4", b"8", b"1.0", b"1e0",
    b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"4611686018427387904", b'"F32"', b'"U8"',
    b'"BF16"', b'"F4"', b'"F6_E2M3"', b'"F8_E8M0"', b'"\\ud800"', b'"\\u0000"', b"\xff", b"\xef\xbb\xbf",
    b"\xed\xa0\x80", b'\\"', b"9" * 300, b"[" * 300,
]  # fmt: skip


def parse(file: bytes) -> Header:
    """As files are read: the length, and the header that it says."""
    length = parse_length(file[:8], len(file), "file")
    return parse_header(file[8 : 8 + length], len(file), "file")


def packed(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def seeds() -> list[bytes]:
    """Files that are right, and the smallest that are not."""
    u8 = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    right = [
        ({}, 0), ({"a": u8}, 1), ({"__metadata__": {"format": "pt"}, "a": u8}, 1),
        ({"a": u8, "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [1, 25]}}, 25),
        ({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, 2),
        ({"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}, 8),
        ({"a": {"dtype": "BF16", "shape": [0, 7], "data_offsets": [0, 0]}, "b": u8}, 1),
        ({"__metadata__": None}, 0),
    ]  # fmt: skip
    return [b"", bytes(8), packed(b"[]"), *(packed(json.dumps(head).encode(), bytes(n)) for head, n in right)]


def tidy(random: random.Random) -> bytes:
    """A file of up to four tensors that is right, or would be but for one offset or size."""
    entries: dict[str, Any] = {"__metadata__": {"format": random.choice(["pt", "é", "\x00", '"'])}}
    position = 0
    for name in random.sample(["a", "b", "__metadata__x", "é 名", "\x7f", "", "\\", "a" * 200], random.randint(0, 4)):
        dtype = random.choice([*BITS])
        shape = [random.choice([0, 1, 2, 3, 8]) for _ in range(random.randint(0, 4))]
        count = math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + count]}
        position += count
        if random.random() < 0.1:
            wrong = entries[name][random.choice(["shape", "data_offsets"])]
            wrong[-1:] = [random.choice([-1, 0, 1, 5, 2**31, 2**62, 2**63, 2**64, True, 1.0, None])]
    names = [*entries]
    random.shuffle(names)
    text = json.dumps({name: entries[name] for name in names}, ensure_ascii=random.random() < 0.5).encode()
    return packed(text + b" " * random.randint(0, 8), random.randbytes(min(position, 4 * LONGEST)))


def mutated(case: bytes, other: bytes, random: random.Random) -> bytes:
    """The case after one to four edits, nine times out of ten with a length that is right again."""
    length = int.from_bytes(case[:8], "little") if len(case) >= 8 else 0
    text, data = bytearray(case[8 : 8 + length]), case[8 + length :]
    for _ in range(random.choice([1, 1, 2, 4])):
        _edit(text, other[8:], random)
    if random.random() < 0.25:
        data = bytes(random.choice([0, 1, 2, 8, 25, len(data) + 1]))
    file = packed(bytes(text[:LONGEST]), data[:LONGEST])
    if random.random() < 0.1:
        file = random.randbytes(random.randint(0, 8)) + file[random.randint(0, 8) :]
    return file[: random.randint(0, len(file))] if random.random() < 0.05 else file


def _edit(text: bytearray, other: bytes, random: random.Random) -> None:
    at = random.randint(0, len(text))
    end = at + random.choice([0, 1, 1, 2, 4, 8, 32])
    kind = random.randrange(6)
    numbers = [match.span() for match in re.finditer(rb"\d+", text)]
    if kind == 0 and numbers:  # a number becomes another
        at, end = random.choice(numbers)
        near = int(text[at : min(end, at + 20)]) + random.choice([-1, 1])
        text[at:end] = str(random.choice([near, random.randint(0, 30), 2 ** random.randint(0, 70)])).encode()
    elif kind == 1:
        text[at:end] = random.choice(WORDS)
    elif kind == 2:
        text[at:at] = text[at : at + random.randint(1, 64)]
    elif kind == 3:
        del text[at:end]
    elif kind == 4 and other:
        start = random.randrange(len(other))
        text[at:end] = other[start : start + random.randint(1, 128)]
    elif text:
        text[min(at, len(text) - 1)] = random.choice([random.randrange(256), *b'{}[]",:0123456789\\'])


class Edges:
    """The pairs of lines of one module that were run after each other, while it is entered."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.taken: set[tuple[int, int]] = set()

    def _enter(self, frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != self.file:
            return None
        last = -frame.f_code.co_firstlineno

        def line(frame: Any, event: str, argument: Any) -> Any:
            nonlocal last
            self.taken.add((last, frame.f_lineno))
            last = frame.f_lineno
            return line

        return line

    def of(self, call: Callable[[], Any]) -> set[tuple[int, int]]:
        """What the call takes, whatever it raises."""
        self.taken = set()
        before = sys.gettrace()  # a debugger's, or that of a coverage report
        sys.settrace(self._enter)
        try:
            call()
        finally:
            sys.settrace(before)
        return self.taken


@dataclass
class Found:
    """What a run came to. stricter: what we refuse and safetensors reads, by what we say of it."""

    cases: int = 0
    accepted: int = 0
    edges: set[tuple[int, int]] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    stricter: Counter[str] = field(default_factory=Counter)
    defect: tuple[bytes, str] | None = None
    kept: list[bytes] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"header reader: {self.cases:,} cases, {self.accepted:,} accepted; {len(self.edges)} edges between lines, "
            f"{len(self.said)} messages, {len(self.kept)} inputs kept",
            *(f"  refused, though safetensors reads it ({n:,}×): {text}" for text, n in self.stricter.most_common()),
        ]
        if self.defect:
            lines.append(f"DEFECT: {self.defect[1]}\n  file: {self.defect[0]!r}")
        return "\n".join(lines)


def stem(message: object) -> str:
    """A message without what it quotes."""
    return re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|[\d,]+|\[.*\]", "…", str(message))[:120]


def fuzz(
    seed: int, cases: int | None = None, seconds: float = float("inf"),
    read: Callable[[bytes], Header] = parse, module: str = ctl_merge.header.__file__,
) -> Found:  # fmt: skip
    """Mutate until a defect is found, or so many cases are read, or the time is over."""
    chance, edges, found, end = random.Random(seed), Edges(module), Found(), time.monotonic() + seconds
    waiting = seeds()
    while found.defect is None and (cases is None or found.cases < cases) and time.monotonic() < end:
        if waiting:
            case = waiting.pop()
        else:  # what was found last is as likely as all before
            pool = found.kept[-20:] if chance.random() < 0.5 else found.kept
            case = tidy(chance) if chance.random() < 0.2 else chance.choice(pool)
            case = case if chance.random() < 0.2 else mutated(case, chance.choice(found.kept), chance)
        _try(case, read, edges, found)
    return found


def _try(case: bytes, read: Callable[[bytes], Header], edges: Edges, found: Found) -> None:
    result: list[Any] = []

    def call() -> None:
        try:
            with within(SECONDS):
                result.append(read(case))
        except BaseException as error:  # judged below; Ctrl-C is raised again there
            result.append(error)

    taken = edges.of(call)
    outcome = result[0]
    found.cases += 1
    said = stem(outcome) if isinstance(outcome, Exception) else ""
    if not found.kept or taken - found.edges or said not in found.said:
        found.kept.append(case)
        found.edges |= taken
        found.said.add(said)
    if isinstance(outcome, KeyboardInterrupt):
        raise outcome
    if isinstance(outcome, CheckpointError):
        if _reference(case) is not None:
            found.stricter[said] += 1
    elif isinstance(outcome, Header):
        found.accepted += 1
        if (problem := _disagreement(case, outcome)) is not None:
            found.defect = case, problem
    else:
        found.defect = case, f"{type(outcome).__name__}: {outcome}"


def _reference(case: bytes) -> dict[str, Any] | None:
    """What safetensors reads: None where it refuses."""
    try:
        return dict(safetensors.deserialize(case))
    except safetensors.SafetensorError:
        return None


def _disagreement(case: bytes, ours: Header) -> str | None:
    theirs = _reference(case)
    if theirs is None:
        return "accepted, and safetensors refuses it"
    if {n: (s.dtype, list(s.shape)) for n, s in ours.tensors.items()} != {
        n: (entry["dtype"], entry["shape"]) for n, entry in theirs.items()
    }:
        return f"read as {ours.tensors}, where safetensors reads {theirs}"
    for name, spec in ours.tensors.items():
        at = ours.offsets[name]
        if case[at : at + spec.nbytes] != bytes(theirs[name]["data"]):
            return f"the data of {name!r} are not where safetensors finds them"
    raw, _ = build_header(ours.tensors, ours.metadata)
    again = parse(raw + bytes(total_bytes(ours.tensors.values())))
    if (again.tensors, again.metadata) != (ours.tensors, ours.metadata):
        return "written anew it is another"
    return None


@contextmanager
def limited(more: int) -> Any:
    """No more address space than the process has, and so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with limited(MEMORY):
        found = fuzz(arguments.seed, seconds=arguments.seconds)
    print(found)
    return 1 if found.defect else 0


if __name__ == "__main__":
    sys.exit(main())
