"""merge_manifest.json: sources, versions, decisions, hashes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

import ctl_merge
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.deferred import torch_version
from ctl_merge.digests import sha256_of
from ctl_merge.finished import written_files
from ctl_merge.hub_push import Outgoing
from ctl_merge.merged import MergedCheckpoint
from ctl_merge.number_policy import number_policy
from ctl_merge.output import MANIFEST
from ctl_merge.plan import parameter_ranges
from ctl_merge.processes import Ranks
from ctl_merge.public_recipe import PublicRecipe
from ctl_merge.reference import ModelRef
from ctl_merge.writer import Shard, check_shards

Map = Callable[[Callable[[Path], str], Iterable[Path]], Iterator[str]]


def build_manifest(
    merged: MergedCheckpoint,
    checkpoints: Mapping[ModelRef, FileCheckpoint],
    public: PublicRecipe,
    folder: Path,
    shards: tuple[Shard, ...],
    devices: Mapping[str, str],
    hash_with: Map | None,
    gone: Mapping[str, Outgoing] = MappingProxyType({}),
) -> dict[str, Any]:
    """The manifest of a written merge.

    shards, gone: the weight files, those of `gone` (by name) sent away already. `hash_with` maps a function over files,
    maybe in parallel; None hashes none.
    """
    plan = merged.plan
    output = [folder / shard.file for shard in shards]
    hashes = _hashes([*(path for path in output if path.name not in gone), *local_files(checkpoints)], hash_with)
    operations = Counter(tensor.operation for tensor in plan.tensors.values())
    tensors = {
        "merged": operations["merge"], "copied": operations["copy"],
        "parameters": sum(spec.numel for spec in plan.specs.values()),
        "dtypes": dict(Counter(spec.dtype for spec in plan.specs.values())),
    }  # fmt: skip
    return {
        "format": 1,
        "versions": {
            "ctl_merge": ctl_merge.__version__, "torch": torch_version(), "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "method": plan.method.name, "parameters": parameter_ranges(plan), "seed": plan.recipe.seed,
        "numbers": number_policy(plan, folder),
        "recipe_sha256": hashlib.sha256(public.text.encode()).hexdigest(),
        "sources": [_source(ref, checkpoint, public, hashes) for ref, checkpoint in checkpoints.items()],
        "tensors": tensors, "devices": dict(Counter(device.partition(":")[0] for device in devices.values())),
        "decisions": [public.line(line) for line in (*plan.decisions, *method_notes(merged))],
        "warnings": [public.line(line) for line in plan.warnings],
        "output": [_written(path, gone.get(path.name), hashes) for path in output],
    }  # fmt: skip


def method_notes(merged: MergedCheckpoint) -> list[str]:
    """What the method has to say of its measures, now that they are taken."""
    note = merged.method.report(merged.measures.all()) if merged.method.report else None
    return [note] if note else []


def write_manifest(folder: Path, manifest: dict[str, Any], shards: Iterable[Shard]) -> None:
    """Complete the manifest with the files beside the weights, and write it: the last file of an output.

    Before, the weights that lie in the folder are checked against the plan. Raises OutputError.
    """
    check_shards(folder, shards)
    manifest["files"] = written_files(folder, [entry["file"] for entry in manifest["output"]])
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")


def local_files(checkpoints: Mapping[ModelRef, FileCheckpoint]) -> list[Path]:
    """The files of local sources; the Hub has published the hashes of its own."""
    return [c.folder / file for c in checkpoints.values() if c.snapshot is None for file in c.file_sizes]


def shared_hashes(paths: Sequence[Path], owners: Sequence[int], hash_with: Map, ranks: Ranks) -> dict[Path, str]:
    """The SHA-256 of files that ranks share as `owners` says; `hash_with` maps a function, maybe in parallel."""
    own = [path for path, owner in zip(paths, owners, strict=True) if owner == ranks.index]
    found = ranks.gather(_hashes(own, hash_with))
    return {path: digest for part in found for path, digest in part.items()}


def _hashes(paths: list[Path], hash_with: Map | None) -> dict[Path, str]:
    return dict(zip(paths, hash_with(sha256_of, paths), strict=True)) if hash_with else {}


def _written(path: Path, sent: Outgoing | None, hashes: Mapping[Path, str]) -> dict[str, Any]:
    if sent is not None:
        return {"file": path.name, "bytes": sent.size, "sha256": sent.sha256}
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": hashes.get(path)}


def _source(
    ref: ModelRef, checkpoint: FileCheckpoint, public: PublicRecipe, hashes: Mapping[Path, str]
) -> dict[str, Any]:
    snapshot = checkpoint.snapshot
    published = {file.path: file.sha256 for file in snapshot.files} if snapshot else {}
    files = [
        {"file": file, "bytes": size, "sha256": published.get(file) or hashes.get(checkpoint.folder / file)}
        for file, size in sorted(checkpoint.file_sizes.items())
    ]
    on = {"adapter_on": public.name(checkpoint.applied_to)} if checkpoint.applied_to else {}
    if snapshot:
        pinned = {"revision": snapshot.revision, "commit": snapshot.commit}
        return {"model": snapshot.repo_id, **on, **pinned, "files": files}
    return {"model": public.name(ref), **on, "local": True, "files": files}
