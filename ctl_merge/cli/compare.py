"""`ctl-merge compare RECIPE`: a merge beside its parents."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ctl_merge.cli.arguments import JsonFlag, require_recipe
from ctl_merge.cli.terminal import configure, meter, print_json, print_table, warn


class By(Enum):
    """Of what a comparison shows one line each."""

    block = "block"
    kind = "kind"
    tensor = "tensor"


def compare(
    recipe: Annotated[Path, typer.Argument(help="The merge to compare; it is not written.", metavar="RECIPE")],
    base: Annotated[
        str | None,
        typer.Option(help="Where task vectors begin, for a recipe without base_model.", metavar="MODEL"),
    ] = None,
    by: Annotated[By | None, typer.Option(help="One table only. Default: by block and by kind.")] = None,
    num_workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads that read and compare. Default: the CPU cores.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare a merge with its parents in weight space: sizes, angles, signs, what it is made of. No data needed."""
    configure()
    require_recipe(recipe)
    from ctl_merge.compare import compare
    from ctl_merge.compare_table import render
    from ctl_merge.merging import Merge
    from ctl_merge.reference import ModelRef
    from ctl_merge.workers import pool

    opened = Merge(recipe, num_workers=num_workers)
    warn(opened.plan.warnings)
    with pool(opened.workers) as mapped, meter()("comparing", len(opened.plan.tensors)) as told:
        found = compare(opened, mapped, base=ModelRef.parse(base, recipe.parent) if base else None, told=told)
    if as_json:
        print_json(found.data)
    else:
        print_table(render(found.data, (by.value,) if by else ("block", "kind")))
