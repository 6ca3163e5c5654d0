"""`ctl-merge reproduce`: a merge made again, and compared."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ctl_merge.cli.arguments import JsonFlag
from ctl_merge.cli.terminal import configure, meter, print_json, print_table, say

DIFFERENT = 3  # exit code
_SHOWN = 10  # tensors


def reproduce(
    merge: Annotated[str, typer.Argument(help="A folder, org/name or org/name@revision.", metavar="MERGE")],
    source: Annotated[
        list[str] | None,
        typer.Option(help="Where a local model (or text) of the recipe lies; may be repeated.", metavar="NAME=FOLDER"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the new merge there.", metavar="FOLDER")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge there.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep it in a temporary folder, and say where.")] = False,
    as_json: JsonFlag = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Make MERGE again from its recipe and manifest; say whether it is byte-identical. Exits with 3 if it differs."""
    configure(quiet=quiet)
    given = {}
    for text in source or []:
        name, _, path = text.partition("=")
        if not name or not path or not Path(path).exists():
            raise typer.BadParameter(f"{text!r}: write NAME=FOLDER with a folder that exists", param_hint="--source")
        given[name.removeprefix("./")] = Path(path)
    from ctl_merge.original import Original
    from ctl_merge.reproduce import reproduce

    original = Original.open(merge)
    with ExitStack() as held:
        if output is None:
            parent = tempfile.mkdtemp() if keep else held.enter_context(tempfile.TemporaryDirectory())
            output = Path(parent) / "merged"
        found = reproduce(original, output, given, overwrite=overwrite, meter=meter(quiet))
        if as_json:
            print_json({**found.data, "output": str(found.folder) if found.folder.exists() else None})
        elif not quiet:
            _show(found)
    if found.folder.exists() and not quiet and not as_json:
        say(f"→ {found.folder}")
    if not found.identical:
        raise typer.Exit(DIFFERENT)


def _show(found: Any) -> None:
    if found.identical:
        say(f"byte-identical: all {found.same} files but the card and the manifest, which are written anew")
    else:
        say(f"different: {len(found.files)} files, where {found.same} are byte-identical")
    for name, why in found.files.items():
        say(f"· {name} {why}")
    if found.tensors:
        print_table(_table(found.tensors))
    for name, (then, now) in found.versions.items():
        say(f"· {name}: {then} then, {now} now")


def _table(tensors: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{len(tensors):,} tensors differ", title_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("largest difference", justify="right")
    table.add_column("entries", justify="right")
    farthest = sorted(tensors, key=lambda t: -t.get("largest_difference", float("inf")))
    for t in farthest[:_SHOWN]:
        far = f"{t['largest_difference']:.3g}" if "entries" in t else t["why"]
        table.add_row(Text(t["tensor"]), far, f"{t['entries']:,} of {t['of']:,}" if "entries" in t else "")
    if len(tensors) > _SHOWN:
        table.add_row(f"and {len(tensors) - _SHOWN:,} more", "", "")
    return table
