"""The generated parts of README.md: `python tests/readme.py` writes them anew, tests/test_readme.py checks them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from ctl_merge.methods import registry
from ctl_merge.methods.table import as_rows, markdown

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def tree() -> str:
    """Every module with the first line of its docstring, in the order in which they build on each other."""
    from test_layers import ROW as order

    package = ROOT / "ctl_merge"
    lines = {}
    for path in package.glob("*.py"):
        lines[order.get(path.stem, 99), path.stem] = [f"    {path.name:<20}{_first_line(path)}"]
    for folder in (path.parent for path in package.glob("*/__init__.py")):
        inside = sorted(folder.glob("[!_]*.py"), key=lambda p: order[f"{folder.name}.{p.stem}"])
        lines[order[f"{folder.name}.__init__"], folder.name] = [
            f"    {folder.name + '/':<20}{_first_line(folder / '__init__.py')}",
            *(f"      {path.name:<18} {_first_line(path)}" for path in inside),
        ]
    del lines[order["__main__"], "__main__"]
    return "```\nctl_merge/\n" + "\n".join(line for key in sorted(lines) for line in lines[key]) + "\n```"


def recipes() -> str:
    """The recipes that ship, each with the first line of its comment."""
    found = sorted((ROOT / "recipes").glob("**/*.yaml"))
    return "\n".join(f"- [{p.relative_to(ROOT)}]({p.relative_to(ROOT)}): {_comment(p)}" for p in found)


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.partition("\n")[0]


def _comment(path: Path) -> str:
    return path.read_text("utf-8").partition("\n")[0].lstrip("# ").rstrip()


def generated() -> str:
    """README.md as it should be."""
    text = README.read_text("utf-8")
    for name, content in (
        ("methods", markdown(as_rows(registry().values()))),
        ("tree", tree()),
        ("recipes", recipes()),
    ):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)  # noqa: B023
    return text


if __name__ == "__main__":
    README.write_text(generated(), "utf-8")
