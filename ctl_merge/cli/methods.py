"""`ctl-merge methods`: what methods there are."""

from __future__ import annotations

from ctl_merge.cli.arguments import JsonFlag
from ctl_merge.cli.terminal import print_json, print_table


def methods(as_json: JsonFlag = False) -> None:
    """List the merge methods with their parameters, defaults and papers."""
    from ctl_merge.methods import registry
    from ctl_merge.methods.table import as_rows, render

    rows = as_rows(registry().values())
    if as_json:
        print_json(rows)
    else:
        print_table(render(rows))
