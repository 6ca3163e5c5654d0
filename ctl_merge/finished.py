"""A finished folder, checked against its manifest."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ctl_merge.bounded import MOST_INDEX, parse_bounded, read_bounded
from ctl_merge.digests import sha256_of
from ctl_merge.errors import CheckpointError, OutputError
from ctl_merge.header import Header, local_header
from ctl_merge.hub_push import Outgoing
from ctl_merge.local_paths import local_path
from ctl_merge.output import MANIFEST, WORKING_FILES

INDEX = "model.safetensors.index.json"
_CARD, _CONFIG, _ADAPTER_CONFIG, _ADAPTER = (
    "README.md", "config.json", "adapter_config.json", "adapter_model.safetensors",
)  # fmt: skip
# What an earlier push may have left, and what would now be loaded, or said, in place of what is pushed.
_STALE = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json",
    "adapter_model.bin", _ADAPTER_CONFIG, MANIFEST, "ctl_merge_recipe.yaml",
)  # fmt: skip
_REPORT = ("probe.json", "statistics.npz")
_SPOKEN = (_CARD, "ctl_merge_recipe.yaml", MANIFEST, _ADAPTER_CONFIG)  # files in which a path may have been left

Meter = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


def is_stale(path: str) -> bool:
    """Whether a repository's file, which is not in the folder that is pushed, is to go: the Hub's `path`."""
    return path.startswith("probe/") or ("/" not in path and any(fnmatchcase(path, pattern) for pattern in _STALE))


@dataclass(frozen=True)
class Finding:
    """What is wrong with one file of a folder, and what to do."""

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file} {self.problem}"


@dataclass(frozen=True)
class Inspection:
    """What a folder is, beside what its manifest says of it.

    `digests`: sha256 of each file that was hashed. `unhashed`: weight files whose sha256 nothing states; of those the
    size and the header were looked at. `unlisted`: files that are not the merge's, and do it no harm. `listed`:
    whether there is a manifest; an adapter of elsewhere has none.
    """

    folder: Path
    findings: tuple[Finding, ...]
    digests: Mapping[str, str]
    unhashed: tuple[str, ...]
    unlisted: tuple[str, ...]
    listed: bool = True

    @property
    def data(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder), "whole": not self.findings,
            "findings": [{"file": finding.file, "problem": finding.problem} for finding in self.findings],
            "hashed": sorted(self.digests), "unhashed": list(self.unhashed), "unlisted": list(self.unlisted),
        }  # fmt: skip


def inspect(folder: Path, meter: Meter = lambda what, total: nullcontext(lambda count: None)) -> Inspection:
    """Check every file that a merge, or an adapter, has written: all that is wrong is found at once.

    `meter("verifying", bytes)` tells progress. Raises OutputError for what is no finished merge.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: there is no such folder")
    if folder.name.endswith(".partial") or any(any(folder.glob(name)) for name in WORKING_FILES):
        raise OutputError(f"{folder} is an unfinished merge: finish it with --resume before")
    check = _Check(folder)
    check.names()
    check.weights()
    check.index()
    check.others()
    expected = {name: digest for name, digest in check.expected.items() if name not in check.bad}
    digests = hash_all({name: check.paths[name] for name in expected}, meter)
    for name, digest in digests.items():
        if digest != expected[name]:
            check.found(name, f"is not as it was written ({MANIFEST} has its sha256): {_ANEW}")
    listed = MANIFEST in check.paths
    return Inspection(folder, tuple(check.findings), digests, check.unhashed(), check.unlisted(), listed)


_ANEW = "merge again, or copy it anew"


@dataclass
class _Check:
    """The checks of one folder, all but the hashes."""

    folder: Path
    findings: list[Finding] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    output: dict[str, _Entry] = field(default_factory=dict)  # the weight files
    rest: dict[str, _Entry] = field(default_factory=dict)
    headers: dict[str, Header] = field(default_factory=dict)

    def found(self, file: str, problem: str) -> None:
        self.findings.append(Finding(file, problem))

    @property
    def bad(self) -> set[str]:
        return {finding.file for finding in self.findings}

    @property
    def expected(self) -> dict[str, str]:
        listed = {**self.output, **self.rest}
        return {name: e.sha256 for name, e in listed.items() if e.sha256 is not None and name in self.paths}

    def unhashed(self) -> tuple[str, ...]:
        return tuple(name for name, entry in self.output.items() if entry.sha256 is None and name in self.headers)

    def unlisted(self) -> tuple[str, ...]:
        known = {*self.output, *self.rest, _CARD, MANIFEST, *self.bad}
        return tuple(name for name in self.paths if name not in known) if self.rest else ()

    def names(self) -> None:
        """Which files there are, and which there must be."""
        for name, path, problem in _walk(self.folder):
            if problem:
                self.found(name, problem)
            else:
                self.paths[name] = path
        if MANIFEST in self.paths:
            self._read_manifest()
        elif _ADAPTER_CONFIG in self.paths:
            self.output = {_ADAPTER: _Entry(None, None)}
        else:
            raise OutputError(f"{self.folder} {self._other()}")
        adapter = _ADAPTER in self.output
        self._must_have(_ADAPTER_CONFIG if adapter else _CONFIG)
        for name in self.paths:
            weights = name.endswith((".safetensors", ".bin")) or (name == _ADAPTER_CONFIG and not adapter)
            if self.output and weights and is_stale(name) and name not in {*self.output, *self.rest}:
                self.found(name, f"is not of this merge (see {MANIFEST}): move it away")

    def _other(self) -> str:
        """What a folder is that is no merge, and what to do."""
        above = self.folder.absolute().parent
        if (above / MANIFEST).is_file():
            return f"is a part of the merge {above.name}: name that folder"
        if any(name in self.paths for name in _REPORT):
            return (
                "is the report of a probe, which states no hashes: `ctl-merge probe -o` makes it again; a report "
                "within a merge (`merge --probe`) is checked with the merge"
            )
        but = "but a model of elsewhere" if _CONFIG in self.paths else "and no adapter"
        return (
            f"is no merge of ctl-merge {but}: there is no {MANIFEST} to check it against. Push other folders with "
            "`hf upload`"
        )

    def _read_manifest(self) -> None:
        manifest = self._json(MANIFEST)
        if manifest is None:
            return
        try:
            self.output = {entry["file"]: _Entry.read(entry) for entry in manifest.get("output") or []}
            self.rest = {entry["file"]: _Entry.read(entry) for entry in manifest.get("files") or []}
            self.manifest = manifest
        except (TypeError, KeyError, AttributeError, ValueError):
            self.output = {}
        if not self.output:
            self.found(MANIFEST, "lists no weight files: it is no manifest of a merge")

    def _must_have(self, name: str) -> bool:
        if name in self.paths:
            return name.endswith(".json") and self._json(name) is not None
        if name not in self.bad:
            self.found(name, "is missing: the folder is not whole, merge again")
        return False

    def weights(self) -> None:
        for name, entry in self.output.items():
            if name not in self.paths:
                self._must_have(name)
            elif (problem := entry.size_problem(self.paths[name])) is not None:
                self.found(name, problem)
            else:
                try:
                    self.headers[name] = local_header(self.paths[name])
                except CheckpointError as error:
                    self.found(name, str(error).removeprefix(str(self.paths[name])).lstrip(": "))

    def index(self) -> None:
        """Whether the index, and the manifest's counts, say what the headers do."""
        place = {tensor: name for name, header in self.headers.items() for tensor in header.tensors}
        if INDEX in self.paths:
            stated = (self._json(INDEX) or {}).get("weight_map", {})
            if INDEX in self.bad or not self.output:
                return
            files = {str(file) for file in stated.values()} if isinstance(stated, dict) else set()
            if files != set(self.output):
                self.found(INDEX, f"does not name the weight files that {MANIFEST} lists: {_ANEW}")
            elif len(self.headers) == len(self.output) and stated != place:
                wrong = min(name for name in {*stated, *place} if stated.get(name) != place.get(name))
                self.found(INDEX, f"does not say in which file tensors are, such as {wrong}: {_ANEW}")
        elif len(self.output) > 1:
            self._must_have(INDEX)
        self._counts()

    def _counts(self) -> None:
        stated = self.manifest.get("tensors")
        if "adapter" in self.manifest or not isinstance(stated, dict) or len(self.headers) != len(self.output):
            return
        specs = [spec for header in self.headers.values() for spec in header.tensors.values()]
        counts = {"parameters": sum(spec.numel for spec in specs), "dtypes": Counter(spec.dtype for spec in specs)}
        for what, count in counts.items():
            if what in stated and stated[what] != count:
                self.found(MANIFEST, f"states other {what} than the weight files have: {_ANEW}")

    def others(self) -> None:
        for name, entry in self.rest.items():
            if name not in self.paths:
                self._must_have(name)
            elif name not in self.bad and (problem := entry.size_problem(self.paths[name])) is not None:
                self.found(name, problem)

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            data = parse_bounded(read_bounded(self.paths[name], MOST_INDEX))
        except (ValueError, OSError) as error:
            self.found(name, f"is no JSON ({error}): {_ANEW}")
            return None
        if not isinstance(data, dict):
            self.found(name, f"is no JSON object: {_ANEW}")
            return None
        return data


@dataclass(frozen=True)
class _Entry:
    """What a manifest states of a file."""

    size: int | None
    sha256: str | None

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> _Entry:
        size, digest = entry["bytes"], entry.get("sha256")
        if not isinstance(entry["file"], str) or type(size) is not int or not isinstance(digest, str | None):
            raise ValueError
        return cls(size, digest)

    def size_problem(self, path: Path) -> str | None:
        found = path.stat().st_size
        if self.size is None or found == self.size:
            return None
        return f"has {found:,} bytes where {MANIFEST} says {self.size:,}: {_ANEW}"


def read_finished(folder: Path) -> list[Outgoing]:
    """The files of a merge or of an adapter, whole and unchanged; hidden files are left out.

    Raises OutputError for what is no finished merge.
    """
    inspection = inspect(folder)
    if inspection.findings:
        raise OutputError("\n".join(f"{folder / finding.file} {finding.problem}" for finding in inspection.findings))
    return public_files(folder, inspection.digests)


def public_files(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> list[Outgoing]:
    """Every file of a folder that may be seen by others, hashed. Raises OutputError for what may not.

    known: the sha256 of files that were hashed already.
    """
    paths = {}
    for name, path, problem in _walk(folder):
        if problem:
            raise OutputError(f"{path} {problem}")
        if not _is_working(name):
            paths[name] = path
    for name in _SPOKEN:
        if name in paths and (found := local_path(paths[name].read_text("utf-8", errors="replace"))):
            raise OutputError(
                f"{paths[name]} names the local path {found}, which would become public: write a name of the Hub, or "
                "none, in its place, then push again"
            )
    digests = {**hash_all({name: path for name, path in paths.items() if name not in known}), **known}
    return [Outgoing(name, path.stat().st_size, digests[name], path) for name, path in paths.items()]


def written_files(folder: Path, weights: Iterable[str]) -> list[dict[str, Any]]:
    """What a manifest states of the files beside the weights; not of itself, nor of the card, which people edit."""
    left = {*weights, _CARD, MANIFEST}
    paths = {name: path for name, path, _ in _walk(folder) if name not in left and not _is_working(name)}
    digests = hash_all(paths)
    return [{"file": name, "bytes": path.stat().st_size, "sha256": digests[name]} for name, path in paths.items()]


def hash_all(
    paths: Mapping[str, Path], meter: Meter = lambda what, total: nullcontext(lambda count: None)
) -> dict[str, str]:
    """The sha256 of each file by its name, several at once."""
    total = sum(path.stat().st_size for path in paths.values())
    with meter("verifying", total) as told, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return dict(zip(paths, threads.map(lambda path: sha256_of(path, told), paths.values()), strict=True))


def _is_working(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in WORKING_FILES)


def _walk(folder: Path) -> Iterator[tuple[str, Path, str | None]]:
    """Every file that is not hidden, by its path in the folder, and why it is none to be sent: links that lead out."""
    root = folder.resolve()
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in [*folders, *sorted(name for name in files if not name.startswith("."))]:
            path = Path(place, name)
            problem = None
            if path.is_symlink() and not (name in files and path.is_file() and path.resolve().is_relative_to(root)):
                problem = "is a link that leads out of the folder, or to none: put the file there"
            elif name in files and not stat.S_ISREG(path.stat().st_mode):
                problem = "is no ordinary file: move it away"
            if problem or name in files:
                yield path.relative_to(folder).as_posix(), path, problem
