"""The probe's section of a model card."""

from __future__ import annotations

from pathlib import Path

from ctl_merge.markdown import escaped
from ctl_merge.probing.figures import figures
from ctl_merge.probing.record import Data, costs_of, main_merge, number, prepared, rows
from ctl_merge.probing.verdict import verdict
from ctl_merge.probing.wording import interval, share, shown

_EMBEDDED = ("nonlinearity", "coefficients", "losses")


def markdown(data: Data, folder: Path | None = None) -> str:
    """The verdict as a list, one table row for each data set, and pictures.

    `folder`: that of the report, beside the card, with the figures in it; without it there are no pictures.
    """
    parts = (line.partition(": ") for line in verdict(data))
    said = [f"- **{escaped(head)}{colon.strip()}** {escaped(rest)}" for head, colon, rest in parts]
    lines = [*said, "", *_table(prepared(data))]
    return "\n".join([*lines, *(_pictures(data, folder) if folder else [])]) + "\n"


def _table(data: Data) -> list[str]:
    head = ["data", "R first → last block", "explained", "merged", "best parent", "dilution", "non-linearity"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, found in data["sets"].items():
        blocks, costs = rows(data, name), costs_of(data, name)
        cells = [name, "–", "–", "–", "–", "–", "–"]
        if blocks:
            first, last = number(blocks[0], "nonlinearity"), number(blocks[-1], "nonlinearity")
            cells[1:3] = [f"{shown(first)} → {shown(last)}", share(last)]
        if costs:
            cells[3] = shown(number(found["losses"]["nll"].get(main_merge(data)["name"]), "value"))
            cells[4] = f"{shown(costs['loss'])} ({costs['parent']})"
            cells[5:] = [interval(costs["dilution"], signed=True), interval(costs["nonlinearity"], signed=True)]
        lines.append(f"| {' | '.join(map(escaped, cells))} |")
    return lines


def _pictures(data: Data, folder: Path) -> list[str]:
    """Images by paths relative to the card, PNG where there is one, each with its caption."""
    lines = []
    for figure in figures(data):
        found = [path for kind in ("png", "svg") if (path := folder / "figures" / f"{figure.name}.{kind}").is_file()]
        if figure.name in _EMBEDDED and found:
            address = found[0].relative_to(folder.parent).as_posix()
            title, caption = escaped(figure.title), escaped(figure.caption)
            lines += ["", f"![{title}]({address})", "", f"*{title}.* {caption}"]
    return lines
