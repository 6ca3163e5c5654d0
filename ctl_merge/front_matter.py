"""A model card's metadata: the YAML before its text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctl_merge.document import Document
from ctl_merge.errors import RecipeError

CARD = "README.md"
_MOST_BYTES = 1_000_000


def card_text(folder: Path | None) -> str:
    """The card in a model's folder; nothing where there is none."""
    if folder is None:
        return ""
    try:
        with (folder / CARD).open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return ""


def front_matter(folder: Path | None) -> Mapping[str, Any]:
    """The metadata of a model's own card, empty where it has none. Raises RecipeError where that is no YAML."""
    before, _, rest = card_text(folder).removeprefix("\ufeff").partition("---")
    front, end, _ = rest.partition("\n---")
    if before.strip() or not end or not front.strip():
        return {}
    try:
        data = Document.parse(front)[0].data
    except RecipeError as error:
        reason = str(error).rpartition("not a YAML recipe: ")[2]
        raise RecipeError(f"the metadata of {CARD} is not YAML: {reason}") from None
    return data if isinstance(data, Mapping) else {}


def stated_licence(folder: Path | None) -> str | None:
    """The licence in the metadata of a model's own card, if it is there."""
    try:
        licence = front_matter(folder).get("license")
    except RecipeError:
        return None
    return licence if isinstance(licence, str) else None


def stated_bases(folder: Path | None) -> list[str]:
    """`base_model` of the card's metadata, a name or a list of names. Raises RecipeError where that is no YAML."""
    models = front_matter(folder).get("base_model")
    models = [models] if isinstance(models, str) else models
    return [m.strip() for m in models if isinstance(m, str) and m.strip()] if isinstance(models, list) else []
