"""Options that verbs share, and checks of arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

VERBS = (
    "init", "check", "merge", "push", "reproduce", "probe", "evaluate", "tune", "compare", "extract-lora", "methods",
    "schema",
)  # fmt: skip

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def require_recipe(path: Path) -> None:
    """Refuse a RECIPE that is no file. Raises typer.BadParameter."""
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {str(path)!r}", param_hint="RECIPE")


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made, before an hour of work. Raises OutputError."""
    import os

    from ctl_merge.errors import OutputError

    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "may not be written to" if nearest.is_dir() else "is no folder"
        raise OutputError(f"{folder} cannot be written: {nearest} {reason}: choose another folder")
