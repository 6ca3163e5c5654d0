"""A merge that is there, and how it was made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctl_merge import hub
from ctl_merge.bounded import MOST_CONFIG, MOST_INDEX, parse_bounded, read_bounded
from ctl_merge.card import RECIPE
from ctl_merge.digests import sha256_of
from ctl_merge.errors import CheckpointError, OutputError
from ctl_merge.output import MANIFEST
from ctl_merge.reference import ModelRef

# Written anew by every merge: the versions stand in it, and the card may have been edited.
DESCRIPTIONS = frozenset({"README.md", MANIFEST})


@dataclass(frozen=True)
class Original:
    """A merge in a folder or on the Hub: its recipe and manifest, and the sha256 of every file that a merge writes.

    `files`: those of the folder or the repository as they are now; weights that a folder has no more are as the
    manifest has them. None where no sha256 is known.
    """

    ref: ModelRef
    recipe: str
    manifest: Mapping[str, Any]
    files: Mapping[str, str | None]

    @property
    def weights(self) -> frozenset[str]:
        return frozenset(entry["file"] for entry in self.manifest["output"])

    @classmethod
    def open(cls, source: str) -> Original:
        """Read `folder`, `org/name` or `org/name@revision`. Raises CheckpointError, HubError."""
        ref = ModelRef.parse(source)
        if ref.adapter is not None:
            raise CheckpointError(f"{source}: name one folder or repository, without an adapter")
        snapshot = hub.resolve(str(ref.repo_id), ref.revision) if ref.folder is None else None
        if snapshot is not None:
            listed = [file.path for file in snapshot.files]
            small = [file.path for file in snapshot.files if file.sha256 is None and not file.path.startswith("probe/")]
            folder = hub.download(snapshot, _needed(small, listed, source))
        else:
            assert ref.folder is not None
            folder = ref.folder
            listed = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
            _needed([], listed, source)
        text, manifest = _read(folder, source)
        recorded = {entry["file"]: entry.get("sha256") for entry in manifest["output"]}
        files: dict[str, str | None] = dict(recorded)
        for path in listed:
            if path.startswith((".", "probe/")) or path in DESCRIPTIONS:
                continue
            published = snapshot.file(path).sha256 if snapshot else None
            files[path] = published or sha256_of(folder / path)
        return cls(ref, text, manifest, files)


def _needed(paths: list[str], listed: list[str], source: str) -> list[str]:
    """The paths, with those that reproducing needs. Raises CheckpointError."""
    for name in (RECIPE, MANIFEST):
        if name not in listed:
            raise CheckpointError(f"{source} has no {name}: nothing says how it was made")
    return list(dict.fromkeys([RECIPE, MANIFEST, *paths]))


def _read(folder: Path, source: str) -> tuple[str, dict[str, Any]]:
    """The recipe and the manifest, which belong together."""
    try:
        manifest = parse_bounded(read_bounded(folder / MANIFEST, MOST_INDEX))
        recipe = read_bounded(folder / RECIPE, MOST_CONFIG)
        if not isinstance(manifest, dict) or not isinstance(manifest["output"], list):
            raise TypeError
        fits = hashlib.sha256(recipe).hexdigest() == manifest["recipe_sha256"]
        files = [
            entry["file"]
            for own in (manifest, *manifest["sources"])
            for entry in own["output" if own is manifest else "files"]
        ]
        names = [source["model"] for source in manifest["sources"]]
        if any(hub.UNSAFE_PATH.search(path) for path in (*files, *names)):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source}: {MANIFEST} cannot be read ({type(error).__name__}): it is damaged") from None
    if manifest.get("format") != 1:
        raise CheckpointError(f"{source}: {MANIFEST} has format {manifest.get('format')!r}: a newer ctl-merge made it")
    if manifest.get("method") == "extract-lora":
        raise CheckpointError(f"{source} was extracted: `ctl-merge extract-lora` makes it again, from its sources")
    if not fits:
        raise OutputError(f"{source}: {RECIPE} was changed after the merge: put back the one of {MANIFEST}")
    return recipe.decode(), manifest
