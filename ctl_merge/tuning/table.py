"""What tuning found as tables for the terminal."""

from __future__ import annotations

from typing import Any

from ctl_merge.evaluating.table import render as render_evaluation
from ctl_merge.tuning.tuned import Tuned


def render(found: Tuned) -> Any:
    """Something rich prints in at most 100 columns: what was tried, the comparison on held-out data, the verdict."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    tried = Table(title=Text("what was tried"), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                  padding=(0, 1, 0, 0), pad_edge=False)  # fmt: skip
    for i, column in enumerate(("coefficients by", "number", "validation loss", "steps")):
        tried.add_column(column, justify="left" if i == 0 else "right")
    for each in found.candidates:
        label = each["how"] if each["how"] != "descent" else f"descent, {each['level']}"
        steps = str(len(each["path"]) - 1) if each["path"] else ""
        tried.add_row(Text(label), str(each["coefficients"]), f"{each['validation']:.4f}", steps)
    chosen = [Text(f"· {name}: {what}") for name, what in found.chosen.items() if what]
    return Group(
        tried, Text(), render_evaluation(found.evaluation), *chosen, Text(f"· {found.splits}"),
        Text.assemble("· ", (found.verdict, "bold")),
    )  # fmt: skip
