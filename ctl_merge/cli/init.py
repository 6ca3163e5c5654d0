"""`ctl-merge init MODEL …`: a recipe to begin with."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctl_merge.cli.arguments import JsonFlag
from ctl_merge.cli.terminal import configure, print_json, print_sections

if TYPE_CHECKING:
    from ctl_merge.proposal import Proposal


def init(
    models: Annotated[
        list[str], typer.Argument(help="Folders, org/name, org/name@revision, model+adapter.", metavar="MODEL")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.", metavar="FILE")] = Path(
        "recipe.yaml"
    ),
    base: Annotated[
        str | None,
        typer.Option(help="The model that the others were trained from. Default: what they state.", metavar="MODEL"),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="See `ctl-merge methods`. Default: task_arithmetic; linear without a base.", metavar="NAME"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a commented recipe for MODELs: base, method, settings, from their headers, configs and cards."""
    configure()
    from ctl_merge.starting import propose_recipe, require_free, write_recipe

    require_free(output, overwrite)
    proposal = propose_recipe(models, base, method=method, path=output)
    write_recipe(proposal, output, overwrite)
    if as_json:
        print_json({"output": str(output), **proposal.data(), "next": _commands(output)})
    else:
        print_sections(_sections(proposal, output))


def _commands(output: Path) -> list[str]:
    file = shlex.quote(os.fspath(output))
    return [f"ctl-merge {file} --dry-run", f"ctl-merge {file} -o merged"]


def _sections(proposal: Proposal, output: Path) -> Iterator[tuple[str, list[str]]]:
    from ctl_merge.sizes import format_size

    data: dict[str, Any] = proposal.data()
    names = [model["name"] for model in data["models"]]
    download = f", {format_size(proposal.nbytes)} to download" if proposal.nbytes else ""
    yield f"wrote {output}", [f"{data['method']} of {', '.join(names)}", f"planned from headers alone{download}"]
    yield f"base: {data['base']['name'] or 'none'}", [data["base"]["certainty"], *data["base"]["reasons"]]
    if proposal.facts:
        yield "found", list(proposal.facts)
    if data["left_out"]:
        yield "left out", [model["reason"] for model in data["left_out"]]
    if data["doubts"]:
        yield "not certain", data["doubts"]
    yield "next", _commands(output)
