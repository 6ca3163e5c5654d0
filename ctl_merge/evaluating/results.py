"""Results in the card of a model's folder."""

from __future__ import annotations

from pathlib import Path

from ctl_merge.card import with_results
from ctl_merge.errors import OutputError
from ctl_merge.evaluating.evaluation import Evaluation
from ctl_merge.output import disk_errors


def check_card(folder: Path) -> None:
    """Refuse a folder without a card. Raises OutputError."""
    if not (folder / "README.md").is_file():
        raise OutputError(f"{folder} has no card (README.md) into which results could be written")


def write_results(found: Evaluation, model: str, folder: Path) -> Path:
    """Enter what was measured of a model as `model-index` into its card; what was there of other data stays.

    Raises OutputError where the card's metadata cannot be read, or the card not be written.
    """
    path = folder / "README.md"
    check_card(folder)
    try:
        card = with_results(path.read_text("utf-8-sig"), folder.resolve().name, found.results(model))
    except (OSError, ValueError) as error:
        raise OutputError(f"the metadata of {path} cannot be read ({str(error).partition(chr(10))[0]})") from None
    partial = path.with_suffix(".md.partial")
    with disk_errors(folder):
        partial.write_text(card, "utf-8")
        partial.replace(path)
    return path
