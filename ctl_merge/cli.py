"""The command line: arguments in, exit code out."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import ctl_merge
from ctl_merge.errors import CtlMergeError


class RecipeFirst(TyperGroup):
    """`ctl-merge RECIPE …` is `ctl-merge merge RECIPE …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version", *self.commands}
        if args and args[0] not in own and not args[0].startswith(("--install-", "--show-")):
            args = ["merge", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RecipeFirst, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge Hugging Face checkpoints that share a base model.\n\n`ctl-merge RECIPE` is `ctl-merge merge RECIPE`.",
)  # fmt: skip

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ctl-merge {ctl_merge.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("merge")
def merge_command(
    recipe: Annotated[Path, typer.Argument(help="YAML file: see the README, or `ctl-merge schema`.", metavar="RECIPE")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write. Default: the recipe's name.", metavar="FOLDER"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, from headers alone, and stop.")] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="Do all arithmetic there: cpu, cuda, cuda:1.", metavar="DEVICE")
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help='auto, cpu, cuda:N, or JSON {"prefix": device} as in transformers.', metavar="MAP"),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Memory that may be used, such as 0=20GiB,cpu=8GiB.", metavar="LIMITS")
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads that read, merge and write. Default: the CPU cores.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest output file.", metavar="SIZE")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier merge, once the new one is whole.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted merge.")] = False,
    no_hash: Annotated[
        bool, typer.Option("--no-hash", help="Do not hash local sources and output for the manifest.")
    ] = False,
    probe_too: Annotated[
        bool,
        typer.Option("--probe", help="Probe the merge too, as the recipe's `probe:` says; the card tells the result."),
    ] = False,
    as_json: JsonFlag = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Merge what RECIPE describes into a folder that transformers loads."""
    _configure_logging(verbose, quiet)
    if quiet or not sys.stderr.isatty():
        _silence_hub()
    if device and device_map:
        raise typer.BadParameter("--device and --device-map say the same: give one of them")
    if not recipe.is_file():
        raise typer.BadParameter(_no_recipe(recipe), param_hint="RECIPE")
    from ctl_merge.merging import Merge

    opened = Merge(
        recipe, device_map=device or device_map, max_memory=max_memory, num_workers=num_workers,
        max_shard_size=max_shard_size,
    )  # fmt: skip
    if dry_run:
        _show_plan(opened.summary(), as_json)
        return
    for warning in opened.plan.warnings:
        logging.getLogger("ctl_merge").warning(warning)
    try:
        result = opened.write(
            output or Path(recipe.stem), overwrite=overwrite, resume=resume, hash_files=not no_hash,
            meter=_no_bar if quiet or not sys.stderr.isatty() else _progress_bar,
            attach=_probe_attached(opened) if probe_too else None,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted: what is written is kept, the same command with --resume goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({"output": str(result.folder), **result.manifest}, indent=2, ensure_ascii=False))
    elif not quiet:
        _show_result(result)


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


@app.command(cls=ManyModels)
def probe(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(
            help="The merge to probe; it is not written. Several over the same models too.", metavar="RECIPE"
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text: FILE, FILE:column,column or org/dataset:column@split, named NAME=…; may be repeated."),
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
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a window. Default: 256.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows run at once.")] = 8,
    chat: Annotated[
        bool, typer.Option("--chat", help="Columns are user and assistant turns: use the template.")
    ] = False,
    patch: Annotated[
        bool, typer.Option("--patch", help="Also replace each block's features by the linear ones.")
    ] = False,
    null: Annotated[bool, typer.Option("--null", help="Also probe a random task vector of the same size.")] = False,
    device_map: Annotated[
        str | None,
        typer.Option(
            help='auto, cpu, cuda:N, disk (weights are read block by block), or JSON {"module": device}.', metavar="MAP"
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory for weights, such as 0=20GiB,cpu=8GiB; the rest is read as needed.", metavar="LIMITS"
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Read it before.")
    ] = False,
    blocks: Annotated[str | None, typer.Option(help="Path of the model's list of blocks, if not found.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Probe Cross-Task Linearity of a merge, block by block: what mixes linearly, what does not, and what it costs."""
    _configure_logging(verbose=False, quiet=False)
    if not sys.stderr.isatty():
        _silence_hub()
    for recipe in recipes or []:
        if not recipe.is_file():
            raise typer.BadParameter(_no_recipe(recipe), param_hint="RECIPE")
    from ctl_merge.probing import api

    options = api.Options(
        sequences=sequences or 64, length=length or 256, batch=batch, device_map=device_map, max_memory=max_memory,
        blocks=blocks, chat=chat, patch=patch, null=null, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if recipes and not (models or merged):
        report = api.probe_recipes(recipes, data or [], options, sequences, length, base)
    elif merged is not None and not recipes:
        report = api.probe_merged(merged, models or [], base, data or [], options=options)
    elif models and base and not recipes:
        report = api.probe_pair(models, base, data or [], options=options)
    else:
        raise typer.BadParameter("give a RECIPE, or --models A B --base C, or --merged FOLDER")
    if output:
        report.save(output)
    if as_json:
        print(report.to_json(), end="")
    else:
        _show_probe(report, output)


class By(Enum):
    """Of what a comparison shows one line each."""

    block = "block"
    kind = "kind"
    tensor = "tensor"


@app.command()
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
    _configure_logging(verbose=False, quiet=False)
    if not sys.stderr.isatty():
        _silence_hub()
    if not recipe.is_file():
        raise typer.BadParameter(_no_recipe(recipe), param_hint="RECIPE")
    from ctl_merge.compare import compare
    from ctl_merge.compare_table import render
    from ctl_merge.merging import Merge
    from ctl_merge.reference import ModelRef
    from ctl_merge.writer import pool

    opened = Merge(recipe, num_workers=num_workers)
    for warning in opened.plan.warnings:
        logging.getLogger("ctl_merge").warning(warning)
    meter = _progress_bar if sys.stderr.isatty() else _no_bar
    with pool(opened.workers) as mapped, meter("comparing", len(opened.plan.tensors)) as told:
        found = compare(opened, mapped, base=ModelRef.parse(base, recipe.parent) if base else None, told=told)
    if as_json:
        print(json.dumps(found.data, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(render(found.data, (by.value,) if by else ("block", "kind")), at_most=100)


@app.command()
def methods(as_json: JsonFlag = False) -> None:
    """List the merge methods with their parameters, defaults and papers."""
    from ctl_merge.methods import registry
    from ctl_merge.methods.table import as_rows, render

    rows = as_rows(registry().values())
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _print(render(rows))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    from ctl_merge.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def main() -> None:
    """Run the command line: exits 0 when done, 2 for what the user can fix, 1 (and a traceback) for a bug."""
    try:
        app()
    except CtlMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _no_recipe(path: Path) -> str:
    import difflib

    near = difflib.get_close_matches(str(path), ["merge", "probe", "compare", "methods", "schema"], n=1)
    hint = f" (did you mean the command `{near[0]}`?)" if near else ""
    return f"there is no file {str(path)!r}{hint}"


def _configure_logging(verbose: bool, quiet: bool) -> None:
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    others = logging.StreamHandler()
    others.setLevel(logging.ERROR)  # a library's loggers may let more through than the root's own level
    logging.basicConfig(handlers=[others], level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    logger = logging.getLogger("ctl_merge")
    logger.setLevel(level)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if verbose else "%(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False


def _silence_hub() -> None:
    """No bars and warnings of huggingface_hub's own, without importing it if nothing else does."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_VERBOSITY"] = "error"
    if loaded := sys.modules.get("huggingface_hub.utils"):
        loaded.disable_progress_bars()


def _probe_attached(opened: Any) -> Callable[[Path], str]:
    """Probes the merge and puts the report into the output's folder."""

    def attach(folder: Path) -> str:
        from ctl_merge.probing import api
        from ctl_merge.probing.verdict import markdown

        report = api.probe_opened(opened)
        report.save(folder / "probe")
        more = "The whole report, with figures and statistics, is in the folder [probe](probe)."
        return f"\n## Probe: Cross-Task Linearity by block\n\n{markdown(report.data)}\n{more}\n"

    return attach


def _show_probe(report: Any, output: Path | None) -> None:
    from ctl_merge.probing.terminal import render

    _print(render(report.data))
    if output:
        print(f"→ {output / 'report.html'}")


def _no_bar(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    from ctl_merge.merging import no_meter

    return no_meter(what, total)


@contextmanager
def _progress_bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    scaled = what == "merging"
    unit = "B" if scaled else "tensor"
    with tqdm(total=total, desc=what, unit=unit, unit_scale=scaled, dynamic_ncols=True, file=sys.stderr) as bar:
        yield bar.update


def _print(what: Any, at_most: int = 1000) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    console.width = min(console.width, at_most)
    console.print(what)


def _show_plan(data: dict[str, Any], as_json: bool) -> None:
    from ctl_merge.summary import render

    if as_json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        _print(render(data), at_most=100)


def _show_result(result: Any) -> None:
    manifest = result.manifest
    tensors = manifest["tensors"]
    again = f" ({result.resumed_tensors:,} of them were there already)" if result.resumed_tensors else ""
    print(f"{manifest['method']}: {tensors['merged']:,} tensors merged, {tensors['copied']:,} copied{again}")
    for line in manifest["decisions"]:
        print(f"· {line}")
    print(f"→ {result.folder}")
