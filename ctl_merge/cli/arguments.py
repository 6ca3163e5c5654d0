"""Options that verbs share, and checks of arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

VERBS = (
    "init",
    "check",
    "merge",
    "push",
    "verify",
    "reproduce",
    "probe",
    "compare",
    "extract-lora",
    "methods",
    "schema",
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def require_recipe(path: Path) -> None:
    """Refuse a RECIPE that is no file. Raises typer.BadParameter."""
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {str(path)!r}", param_hint="RECIPE")
