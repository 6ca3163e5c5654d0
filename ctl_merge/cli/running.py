"""Options of the verbs that run models on text."""

from __future__ import annotations

from typing import Annotated

import typer

BaseOption = Annotated[str | None, typer.Option(help="The base, where a recipe names none.", metavar="MODEL")]
LengthOption = Annotated[
    int | None, typer.Option(min=2, help="Tokens of a window. Default: 256, or a shorter context.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Windows run at once.")]
RowsFlag = Annotated[bool, typer.Option("--rows", help="Each row is a sequence of its own.")]
MaskPromptFlag = Annotated[
    bool, typer.Option("--mask-prompt", help="Rows, of which the loss of the last column alone counts.")
]
JoinOption = Annotated[str, typer.Option(help="Between a row's columns, such as a prompt and its response.")]
EndOption = Annotated[str, typer.Option(help="After each row; it counts with the last column.")]
ChatFlag = Annotated[bool, typer.Option("--chat", help="Columns are user and assistant turns: use the chat template.")]
BlocksMapOption = Annotated[
    str | None,
    typer.Option(
        help='auto, cpu, cuda:N, disk (weights are read block by block), or JSON {"module": device}.', metavar="MAP"
    ),
]
WeightsMemoryOption = Annotated[
    str | None,
    typer.Option(help="Memory for weights, such as 0=20GiB,cpu=8GiB; the rest is read as needed.", metavar="LIMITS"),
]
ModelCodeFlag = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Read it before.")
]


def unescaped(text: str) -> str:
    r"""A line end that a shell left as `\n`."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
