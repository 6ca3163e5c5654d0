"""The probe's section of a model card."""

from __future__ import annotations

from ctl_merge.probing.record import Data, costs_of, main_merge, number, prepared, rows
from ctl_merge.probing.verdict import verdict
from ctl_merge.probing.wording import escaped, interval, share, shown


def markdown(data: Data) -> str:
    """The verdict as a list and one table row for each data set, for a model card."""
    head = ["data", "R first → last block", "explained", "merged", "best parent", "dilution", "non-linearity"]
    lines = [f"- {escaped(line)}" for line in verdict(data)]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    data = prepared(data)
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
    return "\n".join(lines) + "\n"
