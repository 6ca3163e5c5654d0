"""Options that verbs share, and checks of arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

VERBS = ("merge", "probe", "compare", "check", "methods", "schema")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def require_recipe(path: Path) -> None:
    """Refuse a RECIPE that is no file, which may be a misspelt verb. Raises typer.BadParameter."""
    import difflib

    if not path.is_file():
        near = difflib.get_close_matches(str(path), VERBS, n=1)
        hint = f" (did you mean the command `{near[0]}`?)" if near else ""
        raise typer.BadParameter(f"there is no file {str(path)!r}{hint}", param_hint="RECIPE")
