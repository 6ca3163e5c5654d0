"""The command line: arguments in, exit code out."""

from __future__ import annotations

import atexit
import difflib
import gc
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import ctl_merge
from ctl_merge.cli import (
    check,
    compare,
    evaluate,
    extract_lora,
    finalize,
    init,
    merge,
    methods,
    probe,
    push,
    reproduce,
    schema,
    tune,
    verify,
)
from ctl_merge.cli.arguments import VERBS
from ctl_merge.errors import CtlMergeError
from ctl_merge.processes import launched, leave, report

# Verbs that share their work among the processes of a launcher, and those that do none.
_FOR_MANY = ("merge", "probe", "evaluate", "tune", "methods", "schema")


class RecipeFirst(TyperGroup):
    """`ctl-merge RECIPE …` is `ctl-merge merge RECIPE …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version", *self.commands}
        if args and args[0] not in own and not args[0].startswith(("--install-", "--show-")):
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            if near and not os.path.exists(args[0]):
                raise typer.BadParameter(f"there is no file {args[0]!r} (did you mean the command `{near[0]}`?)")
            args = ["merge", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RecipeFirst, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge Hugging Face checkpoints that share a base model.\n\n`ctl-merge RECIPE` is `ctl-merge merge RECIPE`.",
)  # fmt: skip
app.command()(init.init)
app.command()(merge.merge)
app.command()(finalize.finalize)
app.command(cls=probe.ManyModels)(probe.probe)
app.command()(evaluate.evaluate)
app.command()(tune.tune)
app.command()(compare.compare)
app.command()(check.check)
app.command()(extract_lora.extract_lora)
app.command()(push.push)
app.command()(reproduce.reproduce)
app.command()(verify.verify)
app.command()(methods.methods)
app.command()(schema.schema)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ctl-merge {ctl_merge.__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand not in _FOR_MANY:
        launched().require_alone(f"`ctl-merge {ctx.invoked_subcommand}`")


def main() -> None:
    """Run the command line: exits 0 when done, 2 for what the user can fix, 1 (and a traceback) for a bug."""
    # What is imported stays: looking through it for garbage took half a second.
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)  # nor is it looked through at the exit, for as long again
    try:
        app()
    except CtlMergeError as error:
        report(error)
        sys.exit(2)
    finally:
        leave()
