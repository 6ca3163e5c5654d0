"""Rows of merge_speed.py as tables and as a figure.

    python benchmarks/speed_report.py

writes the table of README.md and the figure beside it anew, from results/merge_speed.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ctl_merge.probing.svg import COLOURS, LEFT, RIGHT, Canvas, Panel

Row = Mapping[str, Any]
_PARAMETERS = {"20M": 2.2e7, "125M": 1.31e8, "350M": 3.2e8, "1.1B": 1.1e9, "3B": 2.95e9}
_TOOLS = ("floor", "ctl-merge", "mergekit", "by hand")
_LINES = (  # tool, case, what the legend calls it
    ("floor", "linear", "floor"),
    ("ctl-merge", "linear", "ctl-merge, linear"), ("ctl-merge", "ties", "ctl-merge, ties"),
    ("mergekit", "linear", "mergekit, linear"), ("mergekit", "ties", "mergekit, ties"),
)  # fmt: skip


HERE = Path(__file__).parent
RESULTS = HERE / "results" / "merge_speed.json"
FIGURE = RESULTS.with_suffix(".svg")
README = HERE / "README.md"


def key(row: Row) -> tuple[Any, ...]:
    return row["size"], row["case"], row["tool"], row["cold"]


def add(file: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows of the file with these, which replace their like, in order."""
    kept = json.loads(file.read_text()) if file.exists() else []
    found = sorted({key(row): row for row in [*kept, *rows]}.values(), key=_place)
    file.write_text(json.dumps(found, indent=0) + "\n")
    return found


def _place(row: Row) -> tuple[Any, ...]:
    """Start-up, then the merges by name; the floor, then the tools."""
    return _PARAMETERS[row["size"]], row["case"] != "start-up", row["case"], row["cold"], _TOOLS.index(row["tool"])


def show(rows: Sequence[Row]) -> None:
    """A table with, for each case, every tool's ratio to the floor and to this tool."""
    table = Table(title="medians; s, MB (anonymous, resident), GB read and written")
    for column in ("size", "case", "tool", "wall", "cpu", "anon", "rss", "read", "written", "× floor", "× ours"):
        table.add_column(column, justify="left" if column in ("size", "case", "tool") else "right")
    found, before = {key(row): row for row in rows}, None
    for row in rows:
        if before not in (None, (row["size"], row["case"], row["cold"])):
            table.add_section()
        before = row["size"], row["case"], row["cold"]
        named = row["case"] + (" cold" if row["cold"] else "")
        table.add_row(
            row["size"], named, row["tool"], f"{row['wall']:.2f}", f"{row['cpu']:.2f}",
            f"{row['anonymous'] / 1e6:.0f}", f"{row['resident'] / 1e6:.0f}",
            f"{row['read'] / 1e9:.2f}", f"{row['written'] / 1e9:.2f}",
            _after_start(row, found), _ratio(row, found.get((row["size"], row["case"], "ctl-merge", row["cold"]))),
        )  # fmt: skip
    Console(width=100).print(table)


def _after_start(row: Row, found: Mapping[tuple[Any, ...], Row]) -> str:
    """Wall time without start-up over the floor."""
    floor = found.get((row["size"], row["case"], "floor", row["cold"]))
    start = found.get((row["size"], "start-up", row["tool"], False))
    if floor is None or row["tool"] == "floor":
        return ""
    return f"{(row['wall'] - (start['wall'] if start else 0)) / floor['wall']:.1f}"


def _ratio(row: Row, ours: Row | None) -> str:
    return "" if ours is None or row["tool"] in ("floor", "ctl-merge") else f"{row['wall'] / ours['wall']:.1f}"


def figure(rows: Sequence[Row]) -> str:
    """Wall time and anonymous memory against the number of parameters: an SVG of its own, light and dark."""
    canvas = Canvas()
    for title, unit, name, scale in (
        ("Wall time of a merge, base + 3, two cores", "s", "wall", 1.0),
        ("Peak anonymous memory", "MB", "anonymous", 1e6),
    ):
        numbered = list(enumerate(_LINES))
        lines = [(i, tip, _points(rows, tool, case, name, scale)) for i, (tool, case, tip) in numbered]
        lines = [line for line in lines if line[2] and (name == "wall" or line[1] != "floor")]
        values = [value for _, _, points in lines for _, value in points]
        ends = 10.0 ** _down(min(values)), 10.0 ** (_down(max(values)) + 1)
        panel = Panel(canvas, *ends, log=True, title=title, unit=unit)
        for i, tip, points in lines:
            panel.line([(_x(size), value) for size, value in points], stroke=f"s{i}")
            for size, value in points:
                canvas.mark(_x(size), panel.y(value), i, f"{tip}, {size}: {value:.3g} {unit}")
        for size in sorted({s for _, _, points in lines for s, _ in points}, key=_PARAMETERS.get):
            canvas.text(_x(size), canvas.height + 10, size, text_anchor="middle", fill="soft")
        canvas.height += 16
    canvas.legend([(tip, series) for series, (_, _, tip) in enumerate(_LINES)])
    drawn = canvas.svg("Time and memory of merges against the size of the models")
    light, dark = (";".join(f"--{n}:{pair[i]}" for n, pair in COLOURS.items()) for i in (0, 1))
    style = f"<style>svg{{{light};background:var(--paper)}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return drawn.replace(">", f">{style}", 1) + "\n"


def _points(rows: Sequence[Row], tool: str, case: str, name: str, scale: float) -> list[tuple[str, float]]:
    own = [row for row in rows if (row["tool"], row["case"], row["cold"]) == (tool, case, False)]
    return sorted(((row["size"], row[name] / scale) for row in own), key=lambda point: _PARAMETERS[point[0]])


def _x(size: str) -> float:
    from math import log

    least, most = log(1e8), log(4e9)
    return LEFT + (RIGHT - LEFT) * (log(_PARAMETERS[size]) - least) / (most - least)


def _down(value: float) -> int:
    from math import floor, log10

    return floor(log10(value))


def markdown(rows: Sequence[Row]) -> str:
    """The table of README.md."""
    found = {key(row): row for row in rows}
    lines = [
        "| size | merge | tool | wall s | CPU s | anonymous MB | GB read | wall after start-up / floor | wall / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        named = row["case"] + (", cold" if row["cold"] else "")
        ours = found.get((row["size"], row["case"], "ctl-merge", row["cold"]))
        lines.append(
            f"| {row['size']} | {named} | {row['tool']} | {row['wall']:.1f} | {row['cpu']:.1f} | "
            f"{row['anonymous'] / 1e6:.0f} | {row['read'] / 1e9:.1f} | "
            f"{_after_start(row, found)} | {_ratio(row, ours)} |"
        )
    return "\n".join(lines)


def generated() -> str:
    """README.md as it should be."""
    rows, text = json.loads(RESULTS.read_text()), README.read_text("utf-8")
    head, begin, rest = text.partition("<!-- merge_speed -->\n")
    return f"{head}{begin}{markdown(rows)}\n<!-- /merge_speed -->{rest.partition('<!-- /merge_speed -->')[2]}"


if __name__ == "__main__":
    README.write_text(generated(), "utf-8")
    FIGURE.write_text(figure(json.loads(RESULTS.read_text())), "utf-8")
