"""`ctl-merge methods`: what methods there are."""

from __future__ import annotations

from typing import Annotated

import typer

from ctl_merge.cli.arguments import JsonFlag
from ctl_merge.cli.terminal import print_json, print_table
from ctl_merge.problems import nearest


def methods(
    names: Annotated[
        list[str] | None, typer.Argument(help="Only these. Default: all methods.", metavar="METHOD")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the merge methods with their parameters, defaults and papers."""
    from ctl_merge.methods import registry
    from ctl_merge.methods.table import as_rows, render

    known = registry()
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"there is no method {name!r}{nearest(name, known)}", param_hint="METHOD")
    rows = as_rows(known[name] for name in dict.fromkeys(names or known))
    if as_json:
        print_json(rows)
    else:
        print_table(render(rows))
