"""`ctl-merge probe`: linearity of a merge, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ctl_merge.cli.arguments import JsonFlag, check_folder, require_recipe
from ctl_merge.cli.running import (
    BatchOption,
    BlocksMapOption,
    ChatFlag,
    EndOption,
    JoinOption,
    LengthOption,
    ModelCodeFlag,
    WeightsMemoryOption,
    unescaped,
)
from ctl_merge.cli.terminal import configure, meter, print_document, print_table, say
from ctl_merge.processes import launched


class ManyModels(TyperCommand):
    """`--models A B C` is `--models A --models B --models C`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        many = False
        for arg in args:
            if arg.startswith("-"):
                many = arg == "--models"
                spread += [] if many else [arg]
            else:
                spread += ["--models", arg] if many else [arg]
        return super().parse_args(ctx, spread)


def probe(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(
            help="The merge to probe; it is not written. Several over the same models too.", metavar="RECIPE"
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text: FILE, FILE:column,column or org/dataset\\[/config]:column@split, named NAME=…; may be repeated."
        ),
    ] = None,
    models: Annotated[list[str] | None, typer.Option(help="Parents, without a recipe: two for a sweep over α.")] = None,
    base: Annotated[str | None, typer.Option(help="The model that --models come from.", metavar="MODEL")] = None,
    merged: Annotated[
        str | None, typer.Option(help="A merge that is there already, whatever made it.", metavar="FOLDER")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the report.", metavar="FOLDER")
    ] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="Windows of each data set. Default: 64.")] = None,
    length: LengthOption = None,
    batch: BatchOption = 8,
    join: JoinOption = "\\n",
    end: EndOption = "\\n\\n",
    chat: ChatFlag = False,
    patch: Annotated[
        bool, typer.Option("--patch", help="Also replace each block's features by the linear ones.")
    ] = False,
    null: Annotated[bool, typer.Option("--null", help="Also probe a random task vector of the same size.")] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Also scale the task vectors down, to see where linearity must hold.")
    ] = False,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Put each window between the tokenizer's special tokens.")
    ] = False,
    device_map: BlocksMapOption = None,
    max_memory: WeightsMemoryOption = None,
    trust_remote_code: ModelCodeFlag = False,
    blocks: Annotated[str | None, typer.Option(help="Path of the model's list of blocks, if not found.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Probe Cross-Task Linearity of a merge, block by block: what mixes linearly, what does not, and what it costs."""
    for recipe in recipes or []:
        require_recipe(recipe)
    from ctl_merge.probing import api

    ranks = launched()
    configure(quiet=not ranks.first)
    if output is not None:
        ranks.at_first(lambda: check_folder(output))
    told = meter(not ranks.first)
    options = api.Options(
        sequences=sequences or 64, length=length, batch=batch, device_map=device_map, max_memory=max_memory,
        blocks=blocks, chat=chat, patch=patch, null=null, scaling=scaling, special_tokens=special_tokens,
        trust_remote_code=trust_remote_code, join=unescaped(join), end=unescaped(end),
    )  # fmt: skip
    if recipes and not (models or merged):
        report = api.probe_recipes(recipes, data or [], options, sequences, length, base, meter=told)
    elif merged is not None and not recipes:
        report = api.probe_merged(merged, models or [], base, data or [], options=options, meter=told)
    elif models and base and not recipes:
        report = api.probe_pair(models, base, data or [], options=options, meter=told)
    else:
        raise typer.BadParameter("give a RECIPE, or --models A B --base C, or --merged FOLDER")
    if not ranks.first:
        return
    if output:
        report.save(output)
    if as_json:
        print_document(report.to_json())
    else:
        from ctl_merge.probing.raster import missing
        from ctl_merge.probing.terminal import render

        print_table(render(report.data))
        if output:
            say(f"→ {output / 'report.html'}")
            if reason := missing():
                say(f"· {reason}")
