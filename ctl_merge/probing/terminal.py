"""The probe's result as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctl_merge.probing.record import Data, below_floor, best_parent, bounded, costs_of, number, place, prepared, rows
from ctl_merge.probing.svg import shorten
from ctl_merge.probing.verdict import verdict
from ctl_merge.probing.wording import interval, shown

PARENTS = 3  # columns of coefficients that fit; probe.json has them all
_NAME = 18
_WIDTH = 100


def render(data: Data) -> Any:
    """Something rich prints in at most 100 columns: the verdict, and for each data set its blocks and losses."""
    from rich.console import Group
    from rich.text import Text

    data = prepared(data)
    parts: list[Any] = []
    for name in data["sets"]:
        parts += [_blocks(data, name), Text()]
        if costs_of(data, name):
            parts += [_losses(data, name), Text()]
    parts += [Text(f"! {line}", "yellow") for line in data.get("warnings") or ()]
    for line in verdict(data):
        head, colon, rest = line.partition(": ")
        parts.append(Text.assemble("· ", (head + colon, "bold"), rest))
    return Group(*parts)


def _blocks(data: Data, name: str) -> Any:
    from rich.text import Text

    blocks, parents = rows(data, name), data["parents"][:PARENTS]
    rounded = any(number(row, "floor") is not None for row in blocks)
    null = any(number(row, "nonlinearity_null") is not None for row in blocks)
    found = data["sets"][name]
    best = best_parent(data, name) if len(data["parents"]) > 1 else None
    belongs = f", best parent {shorten(best['parent'], _NAME)}" if best else ""
    table = _table(f"{name}: {found['sequences']:,} sequences, {found['tokens']:,} tokens{belongs}")
    for column in ("block", "R [95 %]", "cos", "coef", "local", "prop."):
        table.add_column(column, justify="left" if column == "block" else "right", no_wrap=True)
    first = len(table.columns)
    for _ in parents:
        table.add_column(justify="right", no_wrap=True)
    for column in ["null"] * null + ["written", "floor"] * rounded:
        table.add_column(column, justify="right", no_wrap=True)
    for row in blocks:
        cells = [shorten(place(row), 10), interval(bounded(row, "nonlinearity")), shown(number(row, "cos"), digits=4)]
        cells += [shown(number(row, key), digits=2) for key in ("coef", "local", "propagated")]
        cells += [shown(number(row, "effective_feature", parent), digits=2) for parent in parents]
        cells += [shown(number(row, "nonlinearity_null"), digits=2)] * null
        if rounded:
            floor = shown(number(row, "floor"))
            cells += [shown(number(row, "nonlinearity_written")), f"{floor}*" if below_floor(row) else floor]
        table.add_row(*map(Text, cells), style="dim" if below_floor(row) else None)
    table.padding = (0, 1, 0, 0) if len(table.columns) <= 10 else 0
    _name_parents(table, table.columns[first : first + len(parents)], parents)
    notes = ["* below floor: R is under 3 times what rounding alone gives"] if any(map(below_floor, blocks)) else []
    if len(data["parents"]) > PARENTS:
        notes.append(f"ĉ of {len(data['parents']) - PARENTS} more parents: see probe.json")
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def _name_parents(table: Any, columns: Sequence[Any], parents: Sequence[str]) -> None:
    """Head the parents' columns with as much of their names as fits."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=2 * _WIDTH)
    for room in range(14, 3, -1):
        for column, parent in zip(columns, parents, strict=True):
            column.header = Text(f"ĉ {shorten(parent, room)}")
        if console.measure(table).maximum <= _WIDTH:
            return


def _losses(data: Data, name: str) -> Any:
    from rich.text import Text

    costs = costs_of(data, name) or {}
    table = _table(f"{name}: loss, nats per token")
    several = len(data["merges"]) > 1
    for column in ("model", "loss [95 %]", "ensemble", "non-linearity cost", *["R at the end"] * several):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    losses = data["sets"][name]["losses"]
    for model, found in losses["nll"].items():
        merge = losses.get("merges", {}).get(model, {})
        ensemble = shown(number(merge.get("ensemble"), "value")) if merge else ""
        cost = interval(merge.get("nonlinearity_cost"), signed=True) if merge else ""
        label = f"{shorten(model, _NAME)}{' (best)' if model == costs['parent'] else ''}"
        end = [shown(number((rows(data, name, model) or [{}])[-1], "nonlinearity")) if merge else ""] * several
        table.add_row(*map(Text, (label, interval(found), ensemble, cost, *end)))
    dilution = interval(costs["dilution"], signed=True)
    table.caption = Text(f"dilution cost against {shorten(costs['parent'], _NAME)}: {dilution}")
    return table


def _table(title: str) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Text, no markup: names may have brackets in them
    return Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
                 caption_justify="left", pad_edge=False)  # fmt: skip
