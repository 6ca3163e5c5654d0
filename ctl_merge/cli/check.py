"""`ctl-merge check RECIPE`: what it will do, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctl_merge.cli.arguments import JsonFlag, require_recipe
from ctl_merge.cli.terminal import configure, print_json, print_sections, say


def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or any mergekit config.", metavar="RECIPE")],
    as_json: JsonFlag = False,
) -> None:
    """Say what RECIPE will do, and what mergekit would do differently. No model is looked at."""
    configure()
    require_recipe(recipe)
    from ctl_merge.check import check

    found = check(recipe)
    if as_json:
        print_json(
            {"problem": found.problem, "sections": [{"title": t, "lines": lines} for t, lines in found.sections]}
        )
    else:
        print_sections(found.sections)
        if found.problem:
            say(f"error: {found.problem}", error=True)
    if found.problem:
        raise typer.Exit(2)
