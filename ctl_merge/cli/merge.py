"""`ctl-merge merge RECIPE`: a recipe becomes a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ctl_merge.cli.arguments import JsonFlag, require_recipe
from ctl_merge.cli.push import MessageOption, PrivateFlag, PullRequestFlag, RevisionOption
from ctl_merge.cli.terminal import Meter, configure, meter, print_json, print_table, print_text, warn


def merge(
    recipe: Annotated[Path, typer.Argument(help="YAML file: see the README, or `ctl-merge schema`.", metavar="RECIPE")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write. Default: the recipe's name.", metavar="FOLDER"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, from headers alone, and stop.")] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="Do all arithmetic there: cpu, cuda, cuda:1.", metavar="DEVICE")
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help='auto, cpu, cuda:N, or JSON {"prefix": device} as in transformers.', metavar="MAP"),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Memory that may be used, such as 0=20GiB,cpu=8GiB.", metavar="LIMITS")
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads that read, merge and write. Default: the CPU cores.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest output file.", metavar="SIZE")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier merge, once the new one is whole.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted merge.")] = False,
    no_hash: Annotated[
        bool, typer.Option("--no-hash", help="Do not hash local sources and output for the manifest.")
    ] = False,
    probe_too: Annotated[
        bool,
        typer.Option("--probe", help="Probe the merge too, as the recipe's `probe:` says; the card tells the result."),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="With --probe: run code that comes with the model. Read it before."),
    ] = False,
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
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Merge what RECIPE describes into a folder that transformers loads."""
    configure(verbose, quiet)
    if device and device_map:
        raise typer.BadParameter("--device and --device-map say the same: give one of them")
    if not push_to_hub and (private is not None or revision != "main" or create_pr or commit_message or stream_upload):
        raise typer.BadParameter("--private, --revision, --create-pr and so on are of --push-to-hub: give that too")
    require_recipe(recipe)
    from ctl_merge.merging import Merge

    opened = Merge(
        recipe, device_map=device or device_map, max_memory=max_memory, num_workers=num_workers,
        max_shard_size=max_shard_size,
    )  # fmt: skip
    if dry_run:
        _show_plan(opened.summary(), as_json)
        return
    warn(opened.plan.warnings)
    if probe_too:
        from ctl_merge.probing.api import check_opened

        check_opened(opened, trust_remote_code)  # before hours of writing
    upload = None
    if push_to_hub:
        from ctl_merge.publishing import Upload, destination

        upload = Upload(destination(push_to_hub, private, revision, create_pr, commit_message), stream_upload)
    said: list[str] = []
    try:
        result = opened.write(
            output or Path(recipe.stem), overwrite=overwrite, resume=resume, hash_files=not no_hash,
            meter=meter(quiet), stream=upload.stream if upload else None,
            attach=_probe_attached(opened, meter(quiet), trust_remote_code, said) if probe_too else None,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted: what is written is kept, the same command with --resume goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    pushed = upload.finish(result.folder) if upload else None
    if as_json:
        pushed_too = {"pushed": pushed.data} if pushed else {}
        print_json({"output": str(result.folder), **pushed_too, **result.manifest})
    elif not quiet:
        _show_result(result, said)
        if pushed:
            print(pushed)


def _probe_attached(opened: Any, told: Meter, trust_remote_code: bool, said: list[str]) -> Callable[[Path], str]:
    """Probes the merge and puts the report into the output's folder, the verdict into `said`."""

    def attach(folder: Path) -> str:
        from ctl_merge.probing import api
        from ctl_merge.probing.section import markdown
        from ctl_merge.probing.verdict import verdict

        report = api.probe_opened(opened, told, trust_remote_code)
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


def _show_result(result: Any, verdict: list[str]) -> None:
    manifest = result.manifest
    tensors = manifest["tensors"]
    again = f" ({result.resumed_tensors:,} of them were there already)" if result.resumed_tensors else ""
    print(f"{manifest['method']}: {tensors['merged']:,} tensors merged, {tensors['copied']:,} copied{again}")
    for line in manifest["decisions"]:
        print(f"· {line}")
    for line in verdict:
        print_text(f"· {line}")
    print(f"→ {result.folder}")
