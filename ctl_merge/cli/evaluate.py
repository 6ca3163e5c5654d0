"""`ctl-merge evaluate MODEL|RECIPE …`: losses, answers, programs on data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctl_merge.cli.arguments import JsonFlag
from ctl_merge.cli.running import (
    BaseOption,
    BlocksMapOption,
    ChatFlag,
    EndOption,
    JoinOption,
    LengthOption,
    MaskPromptFlag,
    ModelCodeFlag,
    RowsFlag,
    WeightsMemoryOption,
    unescaped,
)
from ctl_merge.cli.terminal import configure, meter, print_document, print_table, say

if TYPE_CHECKING:
    from ctl_merge.evaluating.evaluation import Evaluation

_SPEC = "NAME=FILE:column,column or org/dataset:column@split; may be repeated."


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders, names on the Hub, or recipes, whose merge is not written.", metavar="MODEL|RECIPE"
        ),
    ],
    data: Annotated[list[str] | None, typer.Option(help=f"Text whose loss is taken: {_SPEC}")] = None,
    match: Annotated[
        list[str] | None, typer.Option(help="Rows whose last column is the answer to be generated.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="Rows that end with a list of choices and the right one.")
    ] = None,
    code: Annotated[
        list[str] | None,
        typer.Option(help="Problems: columns prompt,test,entry_point (HumanEval) or text,test_list (MBPP)."),
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead, by commas.", metavar="TASKS")
    ] = None,
    harness_path: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own for it.", metavar="FOLDER")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Windows, or rows, of each text.")] = 64,
    length: LengthOption = None,
    items: Annotated[int, typer.Option(min=1, help="Rows of each set of answers, choices, problems, tasks.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Sequences run at once.")] = 8,
    rows: RowsFlag = False,
    mask_prompt: MaskPromptFlag = False,
    chat: ChatFlag = False,
    parents: Annotated[
        bool, typer.Option("--parents", help="Each recipe's base and parents too, and how far the merge agrees.")
    ] = False,
    base: BaseOption = None,
    calibration: Annotated[bool, typer.Option("--calibration", help="Calibration error of the next token.")] = False,
    join: JoinOption = "\\n",
    end: EndOption = "\\n\\n",
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer. Default: a blank line.")] = None,
    extract: Annotated[
        str | None, typer.Option(help="Regular expression: its last match is compared, such as '#### (.*)'.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer or a program.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Programs for each problem; one is greedy.")] = 1,
    k: Annotated[list[int] | None, typer.Option("--k", min=1, help="Of pass@k; may be repeated. Default: 1.")] = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="At which several samples are drawn.")] = 0.8,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run programs that a model wrote, under limits.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for each program.")] = 5.0,
    device_map: BlocksMapOption = None,
    max_memory: WeightsMemoryOption = None,
    trust_remote_code: ModelCodeFlag = False,
    card: Annotated[
        bool, typer.Option("--card", help="Enter the results into the card of each model that is a folder.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for results and answers, as JSON.", metavar="FILE")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure models and merges side by side: loss, exact match, choices, programs; with 95 % intervals."""
    configure()
    from ctl_merge.evaluating import api
    from ctl_merge.evaluating.options import EvaluationOptions
    from ctl_merge.processes import launched

    ranks = launched()
    ranks.together(lambda: _check_cards(models if card else []))
    options = EvaluationOptions(
        sequences=sequences, length=length, batch=batch, device_map=device_map, max_memory=max_memory, chat=chat,
        trust_remote_code=trust_remote_code, rows=rows, mask_prompt=mask_prompt, parents=parents,
        calibration=calibration, items=items, join=unescaped(join), end=unescaped(end),
        stop=tuple(map(unescaped, stop or ())), extract=extract, max_new_tokens=max_new_tokens, samples=samples,
        k=tuple(k or (1,)), temperature=temperature, allow_code_execution=allow_code_execution, timeout=timeout,
    )  # fmt: skip
    if harness is not None:
        from ctl_merge.evaluating.harness import run_harness

        ranks.require_alone("an evaluation by --harness")
        if data or match or choice or code:
            raise typer.BadParameter("--harness has data of its own: leave --data, --match, --choice and --code out")
        tasks = [task.strip() for task in harness.split(",") if task.strip()]
        found = run_harness(models, tasks, options, folder=harness_path, limit=items)
    else:
        found = api.evaluate(
            models, data or [], match=match or [], choice=choice or [], code=code or [], base=base, options=options,
            meter=meter(),
        )  # fmt: skip
    if ranks.first:
        _tell(found, output, as_json, card)


def _tell(found: Evaluation, output: Path | None, as_json: bool, card: bool) -> None:
    """Write and print what was measured."""
    from ctl_merge.evaluating.results import write_results
    from ctl_merge.evaluating.table import render

    if output:
        found.save(output)
    if as_json:
        print_document(found.to_json())
    else:
        print_table(render(found))
    for name, folder in found.folders.items() if card else ():
        path = write_results(found, name, folder)
        if not as_json:
            say(f"→ {path}")


def _check_cards(models: list[str]) -> None:
    from ctl_merge.evaluating.results import check_card

    for folder in filter(None, map(_folder, models)):
        check_card(folder)


def _folder(text: str) -> Path | None:
    path = Path(text).expanduser()
    return path if path.is_dir() else None
