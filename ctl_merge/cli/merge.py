"""`ctl-merge merge RECIPE`: a recipe becomes a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctl_merge.cli.arguments import (
    DeviceMapOption,
    DeviceOption,
    JsonFlag,
    MaxMemoryOption,
    NoHashFlag,
    OutputOption,
    OverwriteFlag,
    ProbeFlag,
    QuietFlag,
    RecipeArgument,
    RemoteCodeFlag,
    ShardSizeOption,
    VerboseFlag,
    WorkersOption,
    one_device,
    require_recipe,
)
from ctl_merge.cli.push import MessageOption, PrivateFlag, PullRequestFlag, RevisionOption
from ctl_merge.cli.terminal import Meter, configure, meter, print_json, print_table, print_text, say, warn
from ctl_merge.processes import check_launcher, launched

if TYPE_CHECKING:
    from ctl_merge.hub_push import Pushed
    from ctl_merge.merging import Merge, MergeResult
    from ctl_merge.processes import Ranks


def merge(
    recipe: RecipeArgument,
    output: OutputOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, from headers alone, and stop.")] = False,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="With --dry-run: measure for some seconds, tell how long the merge takes."),
    ] = False,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemoryOption = None,
    num_workers: WorkersOption = None,
    max_shard_size: ShardSizeOption = "5GB",
    overwrite: OverwriteFlag = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted merge.")] = False,
    no_hash: NoHashFlag = False,
    shard_rank: Annotated[
        int | None,
        typer.Option(min=0, help="Write one process's shards only, 0 the first; then `ctl-merge finalize`."),
    ] = None,
    shard_world: Annotated[int | None, typer.Option(min=1, help="How many processes share the shards.")] = None,
    probe_too: ProbeFlag = False,
    trust_remote_code: RemoteCodeFlag = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Push the merge there: org/name. Rights are checked first.", metavar="REPOSITORY")
    ] = None,
    private: PrivateFlag = None,
    revision: RevisionOption = "main",
    create_pr: PullRequestFlag = False,
    commit_message: MessageOption = None,
    stream_upload: Annotated[
        bool,
        typer.Option("--stream-upload", help="Upload each shard once it is whole, and drop it here: little disk."),
    ] = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Merge what RECIPE describes into a folder that transformers loads."""
    mapped = one_device(device, device_map)
    if calibrate and not dry_run:
        raise typer.BadParameter("--calibrate goes with --dry-run")
    if not push_to_hub and (private is not None or revision != "main" or create_pr or commit_message or stream_upload):
        raise typer.BadParameter("--private, --revision, --create-pr and so on are of --push-to-hub: give that too")
    if push_to_hub and shard_rank is not None:
        raise typer.BadParameter("--push-to-hub needs the whole merge: finalize it, then `ctl-merge push`")
    require_recipe(recipe)
    stranger = check_launcher() if shard_world is None else None
    ranks = launched()
    configure(verbose, quiet or not ranks.first)
    warn([stranger] if stranger else [])
    world = _world(shard_rank, shard_world, ranks, dry_run, probe_too)
    from ctl_merge.merging import Merge

    opened = ranks.together(
        lambda: Merge(
            recipe, device_map=mapped, max_memory=max_memory, num_workers=num_workers or ranks.cores,
            max_shard_size=max_shard_size,
        )
    )  # fmt: skip
    target, told = output or Path(recipe.stem), meter(quiet or not ranks.first)
    if dry_run:
        if ranks.first:
            from ctl_merge.calibrate import predict

            time = {"time": predict(opened, target, not no_hash)} if calibrate else {}
            _show_plan({**opened.summary(world), **time}, as_json)
        return
    warn(opened.plan.warnings)
    said: list[str] = []
    attach = probing(opened, told, trust_remote_code, ranks, said) if probe_too else None
    upload = None
    if push_to_hub:
        from ctl_merge.publishing import Upload, destination

        upload = ranks.at_first(
            lambda: Upload(destination(push_to_hub, private, revision, create_pr, commit_message), stream_upload)
        )
    try:
        if shard_rank is not None:
            _write_part(opened, target, shard_rank, world, overwrite, told, as_json, quiet)
            return
        result = opened.write(
            target, overwrite=overwrite, resume=resume, hash_files=not no_hash, meter=told, attach=attach, ranks=ranks,
            stream=upload.stream if upload else None,
        )  # fmt: skip
    except KeyboardInterrupt:
        say("interrupted: what is written is kept, the same command with --resume goes on", error=True)
        raise typer.Exit(130) from None
    if ranks.first:
        show_result(result, as_json, quiet, said, upload.finish(result.folder) if upload else None)


def _world(rank: int | None, world: int | None, ranks: Ranks, dry_run: bool, probe_too: bool) -> int:
    """Among how many processes the shards are shared. Raises typer.BadParameter."""
    if rank is None and world is None:
        return ranks.count
    if ranks.count > 1:
        raise typer.BadParameter("--shard-rank and --shard-world are for processes without a launcher: leave them out")
    if world is None or (rank is None and not dry_run):
        raise typer.BadParameter("--shard-rank and --shard-world go together")
    if rank is not None and rank >= world:
        raise typer.BadParameter(f"--shard-rank is from 0 to {world - 1}, for a --shard-world of {world}")
    if probe_too:
        raise typer.BadParameter("--probe needs the whole merge: give it to `ctl-merge finalize`")
    return world


def _write_part(
    opened: Merge, target: Path, rank: int, world: int, overwrite: bool, told: Meter, as_json: bool, quiet: bool
) -> None:
    from ctl_merge.parts import write_part
    from ctl_merge.writer import owned

    resumed = write_part(opened, target, rank, world, overwrite=overwrite, meter=told)
    own = owned(opened.shards, rank, world)
    if as_json:
        print_json({"output": str(target), "shards": [shard.file for shard in own], "resumed_tensors": resumed})
    elif not quiet:
        again = f" ({resumed:,} tensors of them were there already)" if resumed else ""
        say(f"{len(own)} of {len(opened.shards)} shards are in {target}.partial{again}")
        say(f"When all {world} processes are done: ctl-merge finalize RECIPE -o {target}")


def probing(
    opened: Merge, told: Meter, trust_remote_code: bool, ranks: Ranks, said: list[str]
) -> Callable[[Path], str]:
    """Probes the merge and puts the report into the output's folder, the verdict into `said`.

    Checks now whether that can be done.
    """
    from ctl_merge.probing import api

    ranks.together(lambda: api.check_opened(opened, trust_remote_code))  # before hours of writing

    def attach(folder: Path) -> str:
        from ctl_merge.probing.section import markdown
        from ctl_merge.probing.verdict import verdict

        report = api.probe_opened(opened, told, trust_remote_code)
        if not ranks.first:
            return ""
        report.save(folder / "probe")
        said.extend(verdict(report.data))
        section = markdown(report.data, folder / "probe")
        more = "The whole report, with figures and statistics, is in the folder [probe](probe)."
        return f"\n## Probe: Cross-Task Linearity by block\n\n{section}\n{more}\n"

    return attach


def _show_plan(data: dict[str, Any], as_json: bool) -> None:
    from ctl_merge.summary import render

    if as_json:
        print_json(data)
    else:
        print_table(render(data))


def show_result(
    result: MergeResult, as_json: bool, quiet: bool, verdict: Sequence[str] = (), pushed: Pushed | None = None
) -> None:
    """Say what was written, what the probe found, and where it was pushed."""
    if as_json:
        pushed_too = {"pushed": pushed.data} if pushed else {}
        print_json({"output": str(result.folder), **pushed_too, **result.manifest})
        return
    if quiet:
        return
    from ctl_merge.number_policy import through_lines

    manifest = result.manifest
    tensors = manifest["tensors"]
    again = f" ({result.resumed_tensors:,} of them were there already)" if result.resumed_tensors else ""
    say(f"{manifest['method']}: {tensors['merged']:,} tensors merged, {tensors['copied']:,} copied{again}")
    for line in (*manifest["decisions"], *through_lines(manifest["numbers"])):
        say(f"· {line}")
    for line in verdict:
        print_text(f"· {line}")
    say(f"→ {result.folder}")
    if pushed:
        say(pushed)
