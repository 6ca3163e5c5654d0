"""`ctl-merge tune RECIPE`: coefficients found on data, proven on other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctl_merge.cli.arguments import JsonFlag, check_folder, require_recipe
from ctl_merge.cli.running import (
    BaseOption,
    BatchOption,
    ChatFlag,
    EndOption,
    JoinOption,
    LengthOption,
    MaskPromptFlag,
    ModelCodeFlag,
    RowsFlag,
    unescaped,
)
from ctl_merge.cli.terminal import configure, meter, print_document, print_table, say
from ctl_merge.processes import launched

if TYPE_CHECKING:
    from ctl_merge.tuning.tuned import Tuned


def tune(
    recipe: Annotated[Path, typer.Argument(help="The recipe whose models are to be merged better.", metavar="RECIPE")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="A text for each task: TASK=FILE:column,column or TASK=org/dataset:column@split."),
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Texts of the same names to compare on. Default: half of each.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the recipe that did best.", metavar="FILE")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page: what was lost, where, and what came back.", metavar="FOLDER")
    ] = None,
    base: BaseOption = None,
    sequences: Annotated[int, typer.Option(min=16, help="Windows of each text, in all.")] = 96,
    length: LengthOption = None,
    batch: BatchOption = 8,
    level: Annotated[
        str, typer.Option(help="What has a coefficient of its own: model, block, part or tensor.")
    ] = "tensor",
    steps: Annotated[int, typer.Option(min=0, help="Of descent on the loss; 0: least squares only.")] = 10,
    least: Annotated[float, typer.Option(help="No coefficient is below this.")] = 0.0,
    most: Annotated[float, typer.Option(help="Nor above this.")] = 2.0,
    trials: Annotated[
        int,
        typer.Option(
            min=0, help="Of a search over method, λ and density, with Optuna; torchrun's processes share them."
        ),
    ] = 0,
    study: Annotated[
        Path | None, typer.Option(help="File that keeps the trials: the same command goes on.", metavar="FILE")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which windows are held out.")] = 0,
    rows: RowsFlag = False,
    mask_prompt: MaskPromptFlag = False,
    join: JoinOption = "\\n",
    end: EndOption = "\\n\\n",
    chat: ChatFlag = False,
    device_map: Annotated[str | None, typer.Option(help="cpu (default) or cuda:N.", metavar="MAP")] = None,
    trust_remote_code: ModelCodeFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Find coefficients for RECIPE's models on data, and compare the merge with others on data never seen."""
    require_recipe(recipe)
    from ctl_merge.tuning import api
    from ctl_merge.tuning.options import TuneOptions

    ranks = launched()
    configure(quiet=not ranks.first)
    ranks.at_first(lambda: _check_folders(output, report))
    options = TuneOptions(
        sequences=sequences, length=length, batch=batch, device_map=device_map, chat=chat, level=level, steps=steps,
        least=least, most=most, rows=rows, mask_prompt=mask_prompt, join=unescaped(join), end=unescaped(end),
        trials=trials, study=study, seed=seed, trust_remote_code=trust_remote_code, probe=report is not None,
    )  # fmt: skip
    folder = output.absolute().parent if output else Path()
    found = api.tune(
        recipe, data or [], held_out=held_out or [], base=base, folder=folder, options=options,
        meter=meter(not ranks.first),
    )  # fmt: skip
    ranks.at_first(lambda: _tell(found, output, report, as_json))


def _check_folders(output: Path | None, report: Path | None) -> None:
    for folder in filter(None, (output and output.absolute().parent, report)):
        check_folder(folder)


def _tell(found: Tuned, output: Path | None, report: Path | None, as_json: bool) -> None:
    """Write and print what was found."""
    if output:
        found.save(output)
    if report:
        found.save_report(report)
    if as_json:
        print_document(found.to_json())
        return
    from ctl_merge.tuning.table import render

    print_table(render(found))
    if output:
        say(f"→ {output}: {found.recommended}")
    if report:
        say(f"→ {report / 'report.html'}")
