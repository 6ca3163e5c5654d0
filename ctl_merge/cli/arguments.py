"""Options that verbs share, and checks of arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctl_merge.problems import nearest

VERBS = (
    "init", "check", "merge", "finalize", "push", "verify", "reproduce", "probe", "evaluate", "tune", "compare",
    "extract-lora", "methods", "schema",
)  # fmt: skip

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


RecipeArgument = Annotated[
    Path, typer.Argument(help="YAML file: see the README, or `ctl-merge schema`.", metavar="RECIPE")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder to write. Default: the recipe's name.", metavar="FOLDER"),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Do all arithmetic there: cpu, cuda, cuda:1.", metavar="DEVICE")
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(help='auto, cpu, cuda:N, or JSON {"prefix": device} as in transformers.', metavar="MAP"),
]
MaxMemoryOption = Annotated[
    str | None, typer.Option(help="Memory that may be used, such as 0=20GiB,cpu=8GiB.", metavar="LIMITS")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, max=256, help="Threads that read, merge and write. Default: the CPU cores.")
]
ShardSizeOption = Annotated[str, typer.Option(help="Largest output file.", metavar="SIZE")]
OverwriteFlag = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier merge, once the new one is whole.")
]
NoHashFlag = Annotated[bool, typer.Option("--no-hash", help="Do not hash local sources and output for the manifest.")]
ProbeFlag = Annotated[
    bool,
    typer.Option("--probe", help="Probe the merge too, as the recipe's `probe:` says; the card tells the result."),
]
RemoteCodeFlag = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="With --probe: run code that comes with the model. Read it before."),
]
VerboseFlag = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]


def one_device(device: str | None, device_map: str | None) -> str | None:
    """The device map that two options ask for. Raises typer.BadParameter where both do."""
    if device and device_map:
        raise typer.BadParameter("--device and --device-map say the same: give one of them")
    return device or device_map


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


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made, before an hour of work. Raises OutputError."""
    import os

    from ctl_merge.errors import OutputError

    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        reason = "may not be written to" if place.is_dir() else "is no folder"
        raise OutputError(f"{folder} cannot be written: {place} {reason}: choose another folder")
