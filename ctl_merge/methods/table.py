"""The registry as a table for terminal, README, programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ctl_merge.methods.parameters import Parameter
from ctl_merge.methods.registry import Method


def as_rows(methods: Iterable[Method]) -> list[dict[str, Any]]:
    """One plain row a method, by name."""
    return [
        {
            "name": method.name,
            "summary": method.summary,
            "models": _models(method),
            "parameters": [_parameter(parameter) for parameter in method.parameters.values()],
            "paper": method.paper,
        }
        for method in sorted(methods, key=lambda method: method.name)
    ]


def _models(method: Method) -> str:
    least, most = method.models
    count = str(least) if least == most else f"≥ {least}"
    if method.space == "task_vectors":
        return f"base + {count}" if method.base == "required" else f"{count}, base optional"
    return f"{count}, base included" if method.base != "none" else count


def _parameter(parameter: Parameter) -> dict[str, Any]:
    found = {"name": parameter.name, "per_model": parameter.per_model, "description": parameter.description}
    return found if parameter.required else {**found, "default": parameter.default}


def signature(row: dict[str, Any]) -> str:
    """`weight*, density* (1.0), normalize (true)`: a star marks per-model parameters, brackets the default."""
    return ", ".join(
        f"{p['name']}{'*' if p['per_model'] else ''}" + (f" ({_yaml(p['default'])})" if "default" in p else "")
        for p in row["parameters"]
    )


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def render(rows: list[dict[str, Any]]) -> Any:
    """For the terminal: a method's name beside what it does, how many models it takes, and its parameters."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        paper = f", arXiv {row['paper']}" if row["paper"] else ""
        table.add_row(Text(row["name"], "bold"), Text(row["summary"]))
        table.add_row("", Text(f"models: {row['models']}{paper}", "dim"))
        table.add_row("", Text(f"{signature(row) or 'no parameters'}\n"))
    return Group(table, Text(f"{len(rows)} method{'s' * (len(rows) != 1)}. * one value per model; (default)"))


def markdown(rows: list[dict[str, Any]]) -> str:
    """For the README."""
    lines = ["| method | what it does | models | parameters: * per model, (default) | paper |", "|---|---|---|---|---|"]
    for row in rows:
        paper = f"[{row['paper']}](https://arxiv.org/abs/{row['paper']})" if row["paper"] else ""
        lines.append(f"| `{row['name']}` | {row['summary']} | {row['models']} | {signature(row)} | {paper} |")
    return "\n".join(lines)
