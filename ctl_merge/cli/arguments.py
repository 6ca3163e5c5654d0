"""Options that verbs share, and checks of arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctl_merge.problems import nearest

VERBS = ("init", "check", "merge", "push", "reproduce", "probe", "compare", "extract-lora", "methods", "schema")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def require_recipe(path: Path) -> None:
    """Refuse a RECIPE that is no file. Raises typer.BadParameter."""
    if not path.is_file():
        raise typer.BadParameter(_in_its_place(path), param_hint="RECIPE")


def _in_its_place(path: Path) -> str:
    """What there is instead of a file."""
    if not path.is_dir():
        beside = [p.name for p in path.parent.glob("*") if p.is_file()] if path.parent.is_dir() else []
        return f"there is no file {str(path)!r}{nearest(path.name, beside, str(path.parent))}"
    for name in ("ctl_merge_recipe.yaml", "mergekit_config.yml"):
        if (path / name).is_file():
            return f"{str(path)!r} is a folder: the recipe of the merge in it is {str(path / name)!r}"
    if (path / "config.json").is_file():
        return f"{str(path)!r} is a model, not a recipe: `ctl-merge init` writes a recipe for models"
    return f"{str(path)!r} is a folder: name a recipe, which is a YAML file"
