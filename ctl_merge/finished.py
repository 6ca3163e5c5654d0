"""A finished folder, checked before it is pushed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ctl_merge.errors import OutputError
from ctl_merge.header import parse_header, parse_length
from ctl_merge.hub_push import Outgoing
from ctl_merge.local_paths import local_path
from ctl_merge.output import MANIFEST, WORKING_FILES

INDEX = "model.safetensors.index.json"
_CONFIG, _ADAPTER_CONFIG, _ADAPTER = "config.json", "adapter_config.json", "adapter_model.safetensors"
# What an earlier push may have left, and what would now be loaded, or said, in place of what is pushed.
_STALE = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json",
    "adapter_model.bin", _ADAPTER_CONFIG, MANIFEST, "ctl_merge_recipe.yaml",
)  # fmt: skip
_SPOKEN = ("README.md", "ctl_merge_recipe.yaml", MANIFEST, _ADAPTER_CONFIG)  # files in which a path may have been left


def is_stale(path: str) -> bool:
    """Whether a repository's file, which is not in the folder that is pushed, is to go: the Hub's `path`."""
    return path.startswith("probe/") or ("/" not in path and any(fnmatchcase(path, pattern) for pattern in _STALE))


def read_finished(folder: Path) -> list[Outgoing]:
    """The files of a merge or of an adapter, whole and unchanged; hidden files are left out.

    Raises OutputError for what is no finished merge.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: there is no such folder")
    if folder.name.endswith(".partial") or any(any(folder.glob(name)) for name in WORKING_FILES):
        raise OutputError(f"{folder} is an unfinished merge: finish it with --resume, then push the folder")
    names = {path.relative_to(folder).as_posix(): path for path in _paths(folder)}
    listed = _listed(folder, names)
    for name in names:
        if name not in listed and is_stale(name) and name.endswith((".safetensors", ".bin")):
            raise OutputError(f"{folder / name} is not of this merge (see {MANIFEST}): move it away, then push again")
    files = public_files(folder)
    for file in files:
        if (expected := listed.get(file.path)) and file.sha256 != expected:
            raise OutputError(f"{folder / file.path} is not as it was written ({MANIFEST} has its sha256): merge again")
    return files


def public_files(folder: Path) -> list[Outgoing]:
    """Every file of a folder that may be seen by others, hashed. Raises OutputError for what may not."""
    names = {path.relative_to(folder).as_posix(): path for path in _paths(folder)}
    for name in WORKING_FILES:
        names.pop(name, None)
    for name in _SPOKEN:
        if name in names and (found := local_path(names[name].read_text("utf-8", errors="replace"))):
            raise OutputError(
                f"{names[name]} names the local path {found}, which would become public: write a name of the Hub, or "
                "none, in its place, then push again"
            )
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(sha256_of, names.values()))
    return [
        Outgoing(name, path.stat().st_size, digest, path)
        for (name, path), digest in zip(names.items(), digests, strict=True)
    ]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _paths(folder: Path) -> Iterator[Path]:
    """Every file that is not hidden. Raises OutputError for links that lead out of the folder, and for no files."""
    root = folder.resolve()
    for place, folders, files in os.walk(folder):
        kept = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        folders[:] = kept
        for name in [*kept, *sorted(name for name in files if not name.startswith("."))]:
            path = Path(place, name)
            if path.is_symlink() and not (name in files and path.is_file() and path.resolve().is_relative_to(root)):
                raise OutputError(f"{path} is a link that leads out of the folder, or to none: put the file there")
            if name in files:
                if not stat.S_ISREG(path.stat().st_mode):
                    raise OutputError(f"{path} is no ordinary file: move it away, then push again")
                yield path


def _listed(folder: Path, names: dict[str, Path]) -> dict[str, str | None]:
    """The weight files that there must be, each with its sha256 where that is known."""
    if MANIFEST in names:
        written = _json(names[MANIFEST]).get("output")
        try:
            entries = {entry["file"]: (entry["bytes"], entry.get("sha256")) for entry in written or []}
        except (TypeError, KeyError, AttributeError):
            entries = {}
        if not entries:
            raise OutputError(f"{names[MANIFEST]} lists no weight files: it is no manifest of a merge")
    elif _ADAPTER_CONFIG in names:
        entries = {_ADAPTER: (None, None)}
    else:
        raise OutputError(
            f"{folder} is no merge of ctl-merge, as it has no {MANIFEST}, and no adapter: push other folders with "
            "`hf upload`"
        )
    config = _ADAPTER_CONFIG if _ADAPTER_CONFIG in names else _CONFIG
    for name in (config, *entries):
        if name not in names:
            raise OutputError(f"{folder / name} is missing: the folder is not whole, merge again")
    _json(names[config])
    for name, (size, _) in entries.items():
        _check_weights(names[name], size)
    if INDEX in names:
        index = set(_json(names[INDEX]).get("weight_map", {}).values())
        if index != set(entries):
            raise OutputError(f"{names[INDEX]} does not name the weight files that {MANIFEST} lists: merge again")
    elif len(entries) > 1:
        raise OutputError(f"{folder / INDEX} is missing: the folder is not whole, merge again")
    return {name: digest for name, (_, digest) in entries.items()}


def _check_weights(path: Path, size: int | None) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise OutputError(f"{path} has {found:,} bytes where {MANIFEST} says {size:,}: merge again")
    with path.open("rb") as file:
        length = parse_length(file.read(8), found, str(path))
        parse_header(file.read(length), found, str(path))


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{path} is no JSON ({error}): merge again") from None
    if not isinstance(data, dict):
        raise OutputError(f"{path} is no JSON object: merge again")
    return data
