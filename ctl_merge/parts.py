"""Shards by processes that never meet, made one output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ctl_merge.errors import DeviceError, OutputError
from ctl_merge.finishing import finish
from ctl_merge.header import build_header
from ctl_merge.merging import Merge, MergeResult, Meter, no_meter
from ctl_merge.output import OutputFolder, disk_errors
from ctl_merge.processes import Ranks
from ctl_merge.workers import pool
from ctl_merge.writer import JOURNAL, METADATA, Shard, checksum_of, journaled, owned

_SHOWN = 8  # of the ranks whose shards are missing


def write_part(
    opened: Merge, output: str | Path, index: int, count: int, *, overwrite: bool = False, meter: Meter = no_meter
) -> int:
    """Write the shards of process `index` of `count` into `output`.partial, alone or beside others, in any order.

    What is there already is kept. `overwrite`: an output that exists will be replaced, by `finalize`. Returns how many
    tensors were there.
    """
    target = _target(opened, output, overwrite)
    opened.fetch()
    folder = target.join(opened.fingerprint())
    try:
        return opened.write_shards(folder, Ranks(index, count), meter, shared=False)
    finally:
        target.close()


def finalize(
    opened: Merge, output: str | Path, *, overwrite: bool = False, hash_files: bool = True, meter: Meter = no_meter,
    attach: Callable[[Path], str] | None = None,
) -> MergeResult:  # fmt: skip
    """Make the output of the shards that `write_part` wrote, once all are there. Arguments as `Merge.write`'s.

    Raises OutputError where shards are missing or not as they were written, and says which processes make them.
    """
    target = _target(opened, output, overwrite)
    opened.fetch()
    fingerprint = opened.fingerprint()
    target.check_same(fingerprint)
    target.open(fingerprint)
    try:
        opened.recall(target.path)
        with disk_errors(target.path):
            _check_shards(opened, target, meter)
        manifest = finish(opened, target, hash_files, attach)
    finally:
        target.close()
    return MergeResult(target.final, manifest, 0)


def _target(opened: Merge, output: str | Path, overwrite: bool) -> OutputFolder:
    """The output that parts go into. Refuses what is written in one piece."""
    if opened.lora:
        raise DeviceError("an adapter is the work of one process: run `ctl-merge RECIPE` without --shard-rank")
    target = OutputFolder(Path(output), overwrite=overwrite, resume=True)
    opened.check_output(target)
    return target


def _check_shards(opened: Merge, target: OutputFolder, meter: Meter) -> None:
    sums: dict[str, set[int]] = {}
    for name, checksum in journaled(target.path):
        sums.setdefault(name, set()).add(checksum)
    missing = []
    with pool(opened.workers) as mapped, meter("checking", sum(s.nbytes for s in opened.shards)) as told:
        for shard, whole in mapped(lambda shard: (shard, _is_whole(target.path, shard, sums, told)), opened.shards):
            if not whole:
                missing.append(shard)
    if missing:
        listed = ", ".join(shard.file for shard in missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise OutputError(
            f"{len(missing)} of {len(opened.shards)} shards are not there or not whole: {listed}. "
            + _remedy(opened, target, missing)
        )


def _is_whole(folder: Path, shard: Shard, sums: dict[str, set[int]], told: Callable[[int], object]) -> bool:
    """Whether a file has the plan's header and, for each tensor, bytes of which a journal tells."""
    header, offsets = build_header(shard.specs, METADATA)
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != len(header) + shard.nbytes:
        return False
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return False
        for name in sorted(offsets, key=lambda name: (offsets[name], shard.specs[name].nbytes)):
            if checksum_of(file, shard.specs[name].nbytes, told) not in sums.get(name, ()):
                return False
    return True


def _remedy(opened: Merge, target: OutputFolder, missing: list[Shard]) -> str:
    """The commands that make them, for as many processes as wrote journals."""
    files = {shard.file for shard in missing}
    worlds = sorted(set(_worlds(target.path)))
    if not worlds:
        return f"Write them with --shard-rank and --shard-world, or all in one process with --resume -o {target.final}"
    count = worlds[-1]
    ranks = [i for i in range(count) if files & {shard.file for shard in owned(opened.shards, i, count)}]
    more = ", …" if len(ranks) > _SHOWN else ""
    listed = ", ".join(map(str, ranks[:_SHOWN]))
    several = f"each of {listed}{more} as RANK" if len(ranks) > 1 else ""
    rank = "RANK" if several else listed
    return (
        f"Run `ctl-merge RECIPE -o {target.final} --shard-rank {rank} --shard-world {count}`"
        + (f", with {several}" if several else "")
        + " and the options that the others had, then finalize again"
    )


def _worlds(folder: Path) -> Iterator[int]:
    for path in folder.glob(f"{JOURNAL}.*-of-*"):
        count = path.name.rpartition("-of-")[2]
        if count.isdecimal() and int(count) > 0:
            yield int(count)
