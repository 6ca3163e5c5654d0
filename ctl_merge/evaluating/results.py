"""Results in the card of a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    check_card(folder)
    try:
        card: Any = ModelCard(path.read_text("utf-8"), ignore_metadata_errors=False)
    except (OSError, ValueError) as error:
        raise OutputError(f"the metadata of {path} cannot be read ({str(error).partition(chr(10))[0]})") from None
    new = found.results(model)
    own = {(result.dataset_name, result.metric_type) for result in new}
    kept = [r for r in card.data.eval_results or [] if (r.dataset_name, r.metric_type) not in own]
    card.data.eval_results = [*kept, *new]
    card.data.model_name = card.data.get("model_name") or folder.resolve().name
    partial = path.with_suffix(".md.partial")
    with disk_errors(folder):
        partial.write_text(str(card), "utf-8")
        partial.replace(path)
    return path
