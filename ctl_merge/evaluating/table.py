"""An evaluation as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctl_merge.evaluating.evaluation import OVER, Evaluation
from ctl_merge.evaluating.metrics import kind_of
from ctl_merge.probing.record import printable
from ctl_merge.probing.svg import shorten
from ctl_merge.probing.wording import shown

_COLUMNS, _NAME, _ROOM = 5, 18, 12


def render(found: Evaluation) -> Any:
    """Something rich prints in at most 100 columns: for each metric the models side by side, then the differences."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    for metric in dict.fromkeys(row["metric"] for row in found.rows if row["metric"] != "perplexity"):
        sets = [d for d in dict.fromkeys(r["data"] for r in found.rows if r["metric"] == metric) if d not in OVER]
        models = [m for m in found.models if any(found.of(m, data, metric) for data in sets)]
        over = [name for name in OVER if found.of(models[0], name, metric)]
        for start in range(0, len(sets), _COLUMNS - len(over)):
            columns = [*sets[start : start + _COLUMNS - len(over)], *over]
            parts += [_table(found, metric, models, columns), Text()]
    parts += [Text(f"! {line}", "yellow") for line in found.warnings]
    return Group(*parts)


def _table(found: Evaluation, metric: str, models: Sequence[str], columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    name, _, other = metric.partition(":")
    kind = kind_of(metric)
    better = f"{'more' if kind.higher else 'less'} is better"
    title = f"{kind.title}{f', against {other}' if other else ''} ({better})"
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                  padding=(0, 1, 0, 0), caption_justify="left", pad_edge=False)  # fmt: skip
    for i, column in enumerate(("model", *columns)):
        text = Text(shorten(str(printable(column)), _NAME if i == 0 else _ROOM))
        table.add_column(text, justify="right" if i else "left", no_wrap=True)
    share = kind.higher
    for model in models:
        cells = [_cell(found.of(model, column, metric), share) for column in columns]
        table.add_row(Text(shorten(str(printable(model)), _NAME)), *map(Text, cells))
    against = [_cell_against(found.of(m, c, metric), share) for m in models[1:] for c in columns]
    if name not in ("agreement", "kl") and any(against):
        table.add_section()
        for i, model in enumerate(models[1:]):
            own = against[i * len(columns) : (i + 1) * len(columns)]
            label = f"{shorten(str(printable(model)), _NAME - 2)} −"
            table.add_row(Text(label), *map(Text, own))
        table.caption = Text(f"below: minus {models[0]}, paired; * its 95 % interval leaves out 0")
    return table


def _cell(row: dict[str, Any] | None, share: bool) -> str:
    if row is None:
        return "–"
    return f"{_number(row['value'], share)}\n{_ends(row['low'], row['high'], share)}"


def _cell_against(row: dict[str, Any] | None, share: bool) -> str:
    if row is None or row["difference"] is None:
        return ""
    low, high = row["difference_low"], row["difference_high"]
    sure = "*" if low > 0 or high < 0 else ""
    return f"{_number(row['difference'], share, signed=True)}{sure}\n{_ends(low, high, share)}"


def _number(value: float, share: bool, signed: bool = False) -> str:
    if value != value:
        return "–"
    return f"{shown(100 * value, signed, 1)} %" if share else shown(value, signed)


def _ends(low: float, high: float, share: bool) -> str:
    if low != low or high != high:
        return ""
    return f"[{', '.join(shown(100 * v if share else v, digits=1 if share else 3) for v in (low, high))}]"
