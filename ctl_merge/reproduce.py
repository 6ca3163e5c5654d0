"""A merge made again and compared with the original."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ctl_merge import hub
from ctl_merge.card import RECIPE
from ctl_merge.checkpoint import Checkpoint
from ctl_merge.companions import companions
from ctl_merge.deferred import torch
from ctl_merge.digests import sha256_of
from ctl_merge.errors import CheckpointError, DataError, MismatchError
from ctl_merge.merging import Merge, Meter, no_meter
from ctl_merge.original import Original
from ctl_merge.probing.rows import DataSpec
from ctl_merge.reference import ModelRef
from ctl_merge.stored import open_checkpoint


@dataclass(frozen=True)
class Reproduction:
    """What came of it: `files` that differ with why, `tensors` that differ and how far, versions then and now."""

    files: Mapping[str, str]
    tensors: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, tuple[Any, Any]]
    same: int  # files that are the same to the byte
    folder: Path

    @property
    def identical(self) -> bool:
        return not self.files

    @property
    def data(self) -> dict[str, Any]:
        return {
            "identical": self.identical, "files_identical": self.same, "files": dict(self.files),
            "tensors": list(self.tensors),
            "versions": {name: {"then": then, "now": now} for name, (then, now) in self.versions.items()},
        }  # fmt: skip


def reproduce(
    original: Original, output: Path, given: Mapping[str, Path], *, overwrite: bool = False, meter: Meter = no_meter
) -> Reproduction:
    """Make the merge again, into the folder `output`, and compare every file but the card and the manifest.

    Sources on the Hub are taken at the manifest's commits. Local ones, and files of text, are those of `given` by name,
    else what lies under their name beside the merge or in the working directory; what differs from the manifest's
    hashes is refused before the merge starts. Raises a CtlMergeError for all that keeps it from being made.
    """
    output = output.absolute()
    with tempfile.TemporaryDirectory(prefix="ctl-merge-reproduce-") as scratch:
        place = Path(scratch)
        _lay_out(original, place, {name: path.absolute() for name, path in given.items()})
        with contextlib.chdir(place), hub.pinned(_pins(original.manifest)):
            shard_bytes = original.manifest.get("max_shard_bytes", 5_000_000_000)
            opened = Merge(place / RECIPE, max_shard_size=f"{shard_bytes}B")
            result = opened.write(output, overwrite=overwrite, meter=meter)
    return _compare(original, output, result.manifest)


def _pins(manifest: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    return {(s["model"], s["revision"]): s["commit"] for s in manifest["sources"] if "commit" in s}


def _lay_out(original: Original, place: Path, given: Mapping[str, Path]) -> None:
    """The recipe, and beside it what it names: a folder for each local model, with links to its files."""
    (place / RECIPE).write_text(original.recipe, "utf-8")
    beside = [folder for folder in (original.ref.folder, Path.cwd()) if folder]
    beside = [*([original.ref.folder.parent] if original.ref.folder else []), *beside]
    local = {source["model"]: source for source in original.manifest["sources"] if source.get("local")}
    texts = set(_text_files(original.recipe))
    if unknown := sorted(given.keys() - local.keys() - texts):
        known = ", ".join(sorted({*local, *texts})) or "none"
        raise CheckpointError(f"--source {unknown[0]}=…: the merge has no local source of this name (but: {known})")
    for name, source in local.items():
        folder = _found(name, given, beside, Path.is_dir)
        if folder is None:
            raise CheckpointError(
                f"the merge was made of a local folder {name!r}, which lies neither beside it nor in the working "
                f"directory: give it with --source '{name}=FOLDER'"
            )
        _check_source(name, folder, source["files"])
        (place / name).mkdir(parents=True)
        copied = companions(folder)
        for path in folder.rglob("*"):
            if path.is_file():
                link = place / name / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                if path.relative_to(folder).as_posix() in copied:  # a link would lead out of the model's folder
                    shutil.copyfile(path, link)
                else:
                    link.symlink_to(path.resolve())
    for name in texts:
        if file := _found(name, given, beside, Path.is_file):
            (place / name).symlink_to(file.resolve())


def _found(name: str, given: Mapping[str, Path], beside: list[Path], fits: Any) -> Path | None:
    places = [given[name]] if name in given else [folder / name for folder in beside]
    return next((path for path in places if fits(path)), None)


def _check_source(name: str, folder: Path, files: list[Mapping[str, Any]]) -> None:
    """Refuse a local model that is not the one of the manifest. Raises MismatchError."""
    for entry in files:
        path = folder / entry["file"]
        if not path.is_file():
            raise MismatchError(f"{folder}: {entry['file']} is missing, so it is not the {name!r} that was merged")
        size = path.stat().st_size
        if size != entry["bytes"] or (entry.get("sha256") and sha256_of(path) != entry["sha256"]):
            raise MismatchError(f"{path} is not the file of {name!r} that was merged: its size or sha256 differs")


def _text_files(recipe: str) -> Iterator[str]:
    """Names of the files beside the recipe that it may take text from."""
    for token in yaml.scan(recipe, yaml.SafeLoader):
        if isinstance(token, yaml.ScalarToken) and "./" in token.value:
            with contextlib.suppress(DataError):
                source = DataSpec.parse(token.value).source
                if source.startswith("./") and not hub.UNSAFE_PATH.search(source[2:]) and "/" not in source[2:]:
                    yield source[2:]


def _compare(original: Original, folder: Path, manifest: Mapping[str, Any]) -> Reproduction:
    made = {entry["file"]: entry["sha256"] for entry in manifest["output"]}
    here = {**Original.open(str(folder)).files, **made}
    files: dict[str, str] = {}
    for name in sorted({*original.files, *here}):
        if name not in original.files:
            files[name] = "is new: the original has no such file"
        elif name in original.weights and name not in here:
            files[name] = "is missing: the merge gives other files"
        elif name in here and original.files[name] is None:
            files[name] = "cannot be compared: the original has no sha256 of it (--no-hash)"
        elif name in here and original.files[name] != here[name]:
            files[name] = "differs"
    then, now = original.manifest["versions"], manifest["versions"]
    versions = {key: (then.get(key), now.get(key)) for key in {**then, **now} if then.get(key) != now.get(key)}
    if original.manifest.get("devices") != manifest["devices"]:
        versions["devices"] = (original.manifest.get("devices"), manifest["devices"])
    differ = any(name.endswith(".safetensors") for name in files)
    tensors = tuple(_tensors(original.ref, folder)) if differ else ()
    same = sum(name in here and name not in files for name in original.files)
    return Reproduction(files, tensors, versions, same, folder)


def _tensors(ref: ModelRef, folder: Path) -> Iterator[Mapping[str, Any]]:
    """Of every tensor that differs, how far: the largest difference and the share of entries."""
    try:
        before = open_checkpoint(ref)
        before.fetch()
        after = open_checkpoint(ModelRef(str(folder), folder=folder))
    except CheckpointError:
        return  # weights that are not there any more, or an adapter's
    for name in sorted({*before.tensors, *after.tensors}):
        there, here = before.tensors.get(name), after.tensors.get(name)
        if there is None or here is None:
            yield {"tensor": name, "why": "only in the original" if here is None else "only here"}
        elif there != here:
            old, new = (f"{spec.dtype} {list(spec.shape)}" for spec in (there, here))
            yield {"tensor": name, "why": f"{old} there, {new} here"}
        elif found := _distance(before, after, name):
            yield {"tensor": name, "largest_difference": found[0], "entries": found[1], "of": there.numel}


def _distance(before: Checkpoint, after: Checkpoint, name: str) -> tuple[float, int] | None:
    """The largest absolute difference, and how many entries differ; None if none does."""
    largest, count, step = 0.0, 0, after.block(name)
    for start in range(0, after.tensors[name].numel, step):
        size = min(step, after.tensors[name].numel - start)
        one, two = torch.empty(size, dtype=torch.float64), torch.empty(size, dtype=torch.float64)
        before.read_into(name, one, start)
        after.read_into(name, two, start)
        differ = (one != two) & ~(one.isnan() & two.isnan())
        if differ.any():
            count += int(differ.sum())
            largest = max(largest, float((one - two)[differ].abs().nan_to_num(nan=torch.inf).max()))
    return (largest, count) if count else None
