"""A comparison in weight space, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ctl_merge.findings import SHOWN, percent, short_name, signed

TABLES = ("block", "kind", "tensor")
_WIDE = 3  # parents that have a column each
_NEGLIGIBLE = 0.0005  # rounding errors that are worth no column

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def render(data: Mapping[str, Any], by: Sequence[str] = ("block", "kind")) -> Any:
    """What `Comparison.data` says, sentences first, in at most 100 columns."""
    from rich.console import Group
    from rich.text import Text

    model = data["model"]
    head = Text(f"{data['method']} against its parents, from {short_name(data['base'])}: ", "bold")
    head.append(f"{model['tensors']:,} tensors, {model['parameters']:,} parameters", "not bold")
    flags = [_item("!", flag["message"], "yellow") for flag in data["flags"]]
    findings = [_item("·", finding) for finding in data["findings"]]
    parts: list[Any] = [head, *flags, *findings]
    if model["signs"]:
        parts += [Text(), _signs(data)]
    for kind in by:
        parts += [Text(), _table(data, kind)]
    return Group(*parts, Text(), Text(_legend(data), "dim"))


def _item(mark: str, text: str, style: str = "") -> Any:
    """A point of a list whose further lines are indented."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_row(Text(mark, style), Text(text, style))
    return grid


def _plain(title: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    return Table(title=Text(title, "bold"), title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)


def _signs(data: Mapping[str, Any]) -> Any:
    table = _plain("signs of the task vectors")
    table.add_column("among the largest entries of each", justify="left")
    for signs in data["model"]["signs"]:
        table.add_column("all" if signs["density"] == 1 else percent(signs["density"]), justify="right", min_width=6)
    labels = {"contested": "at least two take part", "conflict": "  of these, opposed", "chance": "  opposed by chance"}
    for key, label in labels.items():
        table.add_row(label, *(percent(signs[key]) for signs in data["model"]["signs"]))
    return table


def _table(data: Mapping[str, Any], kind: str) -> Any:
    """One line for each block, kind of module or tensor, the whole model last."""
    from rich.text import Text

    columns = list(_columns(data))
    table = _plain({"block": "by block", "kind": "by kind of module", "tensor": "by tensor"}[kind])
    table.add_column(kind if kind != "kind" else "module", overflow="fold")
    for header, _ in columns:
        table.add_column(Text(header), justify="right", no_wrap=True)
    for row in data[f"{kind}s"]:
        name = Text(row["name"])
        name.append(" !" if _has_own_flag(row, data["model"]) else "", "yellow")
        table.add_row(name, *(show(row) for _, show in columns))
    table.add_row(Text("the model", "bold"), *(Text(show(data["model"]), "bold") for _, show in columns))
    return table


def _columns(data: Mapping[str, Any]) -> Iterator[Column]:
    """A column for each parent where they are few, the range over parents where they are many."""
    parents = list(data["parents"])
    short = {parent: parent if len(parent) <= 7 else f"{parent[:6]}…" for parent in parents}
    if len(parents) < _WIDE:
        for parent in parents:
            yield f"‖τ‖\n{short[parent]}", partial(_of_parent, parent=parent, key="task_vector", show=percent)
    else:
        yield "‖τ‖\nparents", lambda row: _range(_of_parents(row, "task_vector"), percent)
    yield "‖τ‖\nmerged", lambda row: percent(row["merged"]["task_vector"])
    if len(parents) > 1:
        yield "cos\nτ, τ", lambda row: _range([pair["cosine"] for pair in row["pairs"]], signed)
        yield "signs\nopposed", lambda row: percent(_shown(row)["conflict"])
    if len(parents) <= _WIDE:
        for parent in parents:
            yield f"ĉ\n{short[parent]}", partial(_of_parent, parent=parent, key="coefficient", show=_number)
    else:
        yield "ĉ\nparents", lambda row: _range(_of_parents(row, "coefficient"), _number)
    yield "\nR²", lambda row: _number(row["merged"]["explained"])
    if _has_rounding(data):
        yield "round-\ning", lambda row: percent(row["merged"]["rounding_loss"])


def _of_parent(row: Row, parent: str, key: str, show: Callable[[float | None], str]) -> str:
    return show(row["parents"][parent][key])


def _of_parents(row: Row, key: str) -> list[float | None]:
    return [numbers[key] for numbers in row["parents"].values()]


def _range(values: list[float | None], show: Callable[[float], str]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "–"
    low, high = show(known[0]), show(known[-1])
    return low if low == high else f"{low.removesuffix(' %')}…{high}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _shown(row: Row) -> Row:
    return min(row["signs"], key=lambda signs: abs(signs["density"] - SHOWN))


def _legend(data: Mapping[str, Any]) -> str:
    told = ["‖τ‖: the norm of the task vector θ − θ₀ as a share of ‖θ₀‖."]
    if data["model"]["signs"]:
        density = percent(_shown(data["model"])["density"])
        told.append(f"signs opposed: of the entries among the {density} largest of at least two task vectors.")
    told.append("ĉ: the mix of the parents' task vectors that is nearest to the merged one; R²: the share it explains.")
    if _has_rounding(data):
        told.append("rounding: the error that the output's dtype adds, as a share of the merged ‖τ‖.")
    if any(_has_own_flag(row, data["model"]) for kind in TABLES for row in data[f"{kind}s"]):
        told.append("!: flagged, see above or `flags` in --json.")
    return " ".join(told)


def _has_own_flag(row: Row, model: Row) -> bool:
    """Whether it has a flag that the model as a whole does not have, or values that are not finite."""
    return "nonfinite" in row["flags"] or not set(row["flags"]) <= set(model["flags"])


def _has_rounding(data: Mapping[str, Any]) -> bool:
    return any((row["merged"]["rounding_loss"] or 0) > _NEGLIGIBLE for row in data["kinds"])
