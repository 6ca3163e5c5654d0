"""`ctl-merge extract-lora MODEL`: a model's difference as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ctl_merge.cli.arguments import JsonFlag
from ctl_merge.cli.running import LengthOption
from ctl_merge.cli.terminal import configure, meter, print_json, say, warn


def extract_lora(
    model: Annotated[
        str, typer.Argument(help="A folder, org/name, model+adapter, or a recipe: its merge is not written.")
    ],
    base: Annotated[str, typer.Option(help="The model that it was trained from.", metavar="MODEL")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", metavar="FOLDER")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of each matrix at most. Default: 32, or any with --energy.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of each matrix's squared change that is enough, such as 0.95.", min=0, max=1),
    ] = None,
    save_modules: Annotated[
        str,
        typer.Option(help="What to store whole: embeddings, head, norms, biases (comma-separated), or all.",
                     metavar="KINDS"),
    ] = "",
    dtype: Annotated[
        str | None, typer.Option(help="Of the adapter: float32, bfloat16, float16. Default: the model's.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text on which to tell the losses: FILE, FILE:column; may be repeated."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Windows of each text.")] = 64,
    length: LengthOption = None,
    device: Annotated[str, typer.Option(help="Do the arithmetic there: cpu, cuda, cuda:1.", metavar="DEVICE")] = "cpu",
    num_workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Matrices that are worked on at once. Default: the CPU cores.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output, once the new one is whole.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    no_hash: Annotated[
        bool, typer.Option("--no-hash", help="Do not hash local sources and output for the manifest.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:  # fmt: skip
    """Write what MODEL adds to its base as a LoRA adapter that PEFT loads."""
    configure(quiet=quiet)
    from ctl_merge.extraction import extract_lora

    result = extract_lora(
        model, base, output, rank=rank, energy=energy or None, save=[k for k in save_modules.split(",") if k],
        dtype=dtype, data=data or [], sequences=sequences, length=length, device=device, num_workers=num_workers,
        overwrite=overwrite, resume=resume, hash_files=not no_hash, meter=meter(quiet),
    )  # fmt: skip
    warn(result.manifest["warnings"])
    if as_json:
        print_json({"output": str(result.folder), **result.manifest})
    elif not quiet:
        _show(result)


def _show(result: Any) -> None:
    from ctl_merge.adapter_card import said

    adapter = result.manifest["adapter"]
    for line in said(adapter):
        say(f"· {line}")
    for text, losses in (adapter["losses"] or {}).items():
        say(f"· loss on {text}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    say(f"→ {result.folder}")
