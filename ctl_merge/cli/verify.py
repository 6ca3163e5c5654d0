"""`ctl-merge verify`: a finished merge, checked against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ctl_merge.cli.arguments import JsonFlag
from ctl_merge.cli.terminal import configure, meter, print_json, print_sections

NOT_WHOLE = 3  # exit code


def verify(
    folder: Annotated[Path, typer.Argument(help="A merge, of experts too, or an adapter.", metavar="FOLDER")],
    as_json: JsonFlag = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Check every file of a merge against its manifest: sizes, headers, index, sha256. Exits with 3 if it differs."""
    configure(quiet=quiet)
    from ctl_merge.finished import inspect

    found = inspect(folder, meter(quiet))
    if as_json:
        print_json(found.data)
    elif not quiet:
        _show(found)
    if found.findings:
        raise typer.Exit(NOT_WHOLE)


def _show(found: Any) -> None:
    why = "its sha256 is not known (--no-hash)" if found.listed else "there is no merge_manifest.json with its sha256"
    notes = [f"{name}: size and header only, {why}" for name in found.unhashed]
    notes += [f"{name} is not of the merge" for name in found.unlisted]
    if found.findings:
        print_sections([(f"not whole: {found.folder}", [*map(str, found.findings), *notes])])
        return
    told = f"{len(found.digests)} files have the sha256 of the manifest" if found.listed else "as far as a header tells"
    print_sections([(f"whole: {told}", notes)])
