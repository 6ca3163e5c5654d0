"""What follows the weights: hashes, manifest, card, companions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctl_merge.card import RECIPE, build_card
from ctl_merge.front_matter import stated_licence
from ctl_merge.hub_push import Outgoing
from ctl_merge.manifest import build_manifest, local_files, shared_hashes, write_manifest
from ctl_merge.output import OutputFolder, disk_errors
from ctl_merge.processes import ALONE, Ranks, deal
from ctl_merge.public_recipe import PublicRecipe
from ctl_merge.shard_stream import ShardStream
from ctl_merge.workers import pool
from ctl_merge.writer import INDEX, write_index

if TYPE_CHECKING:
    from ctl_merge.merging import Merge


def finish(
    merge: Merge, target: OutputFolder, hash_files: bool, attach: Callable[[Path], str] | None, ranks: Ranks = ALONE,
    stream: ShardStream | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make the folder whole once its shards are, with hashes, what is attached, the small files: the manifest."""
    gone = stream.sent if stream else {}
    if merge.plan.method.report:
        for known in ranks.gather(merge.merged.measures.known()):
            merge.merged.measures.recall(known)
    with disk_errors(target.path):
        hashes = _hashes(merge, target.path, gone, ranks) if hash_files else None
        attached = attach(target.path) if attach else ""

    def last() -> dict[str, Any]:
        with disk_errors(target.path):
            manifest = _write_small_files(merge, target.path, hashes, attached, gone)
        if stream:
            stream.commit()  # until this is done, --resume can go on
        with disk_errors(target.path):
            target.commit()
        return manifest

    return ranks.at_first(last) or {}


def _hashes(merge: Merge, folder: Path, gone: Mapping[str, Outgoing], ranks: Ranks) -> dict[Path, str]:
    """Of the output's files, each by the rank that wrote it, and of local sources."""
    shards, sources = [s for s in merge.shards if s.file not in gone], local_files(merge.sources)
    owners = deal([shard.nbytes for shard in shards], ranks.count)
    owners += deal([path.stat().st_size for path in sources], ranks.count)
    with pool(merge.workers) as mapped:
        return shared_hashes([*(folder / shard.file for shard in shards), *sources], owners, mapped, ranks)


def _write_small_files(
    merge: Merge, folder: Path, hashes: Mapping[Path, str] | None, attached: str, gone: Mapping[str, Outgoing]
) -> dict[str, Any]:
    """All that is not weights; index and config late, as readers look for those first, and the manifest last."""
    public = PublicRecipe.of(merge.recipe, merge.sources)
    (folder / RECIPE).write_text(public.text, "utf-8")
    hashed = None if hashes is None else lambda _, paths: map(hashes.__getitem__, paths)
    manifest = build_manifest(merge.merged, merge.sources, public, folder, merge.shards, merge.devices, hashed, gone)
    manifest["max_shard_bytes"] = merge.shard_bytes
    licences = {ref: stated_licence(source.folder) for ref, source in merge.sources.items()}
    name = folder.name.removesuffix(".partial")
    (folder / "README.md").write_text(build_card(merge.plan, manifest, licences, name, public, attached), "utf-8")
    (folder / INDEX).unlink(missing_ok=True)
    write_index(folder, merge.shards)
    merge.write_companions(folder)
    write_manifest(folder, manifest, [shard for shard in merge.shards if shard.file not in gone])
    return manifest
