"""A recipe as others may read it: without local paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from ctl_merge.errors import CheckpointError, DataError
from ctl_merge.local_paths import without_paths
from ctl_merge.probing.rows import DataSpec
from ctl_merge.recipe import Recipe
from ctl_merge.reference import ModelRef

_PLAIN = re.compile(r"\./[\w./+-]+")


@dataclass(frozen=True)
class PublicRecipe:
    """The recipe's text in which a local model or file is written `./NAME`, and the names of the folders.

    A name is the folder's own, as masks of random numbers depend on it; where two folders have the same, the others
    have a number before it, as in `2/NAME`. What is written without any path, and what lies on the Hub, stays.
    """

    text: str
    names: Mapping[Path, str]
    texts: Mapping[str, str]  # as the recipe writes a local model -> its name

    @classmethod
    def of(cls, recipe: Recipe | None, refs: Iterable[ModelRef]) -> PublicRecipe:
        """`refs`: every model in files that the recipe reads; without a recipe there are the names alone."""
        refs = list(refs)
        names: dict[Path, str] = {}
        for folder in dict.fromkeys(ref.folder for ref in refs if ref.folder is not None):
            count = sum(other.name == folder.name for other in names)
            names[folder] = f"{count + 1}/{folder.name}" if count else folder.name
        texts = {ref.text: names[ref.folder] for ref in refs if ref.folder is not None}
        return cls("".join(_pieces(recipe, names)) if recipe else "", names, texts)

    def name(self, ref: ModelRef) -> str:
        """What a source is called: its repository, or its folder's name."""
        return self.names[ref.folder] if ref.folder is not None else ref.short

    def line(self, text: str) -> str:
        """A sentence with folders by name alone: where they lie on this machine is nobody else's business."""
        for written in sorted(self.texts, key=len, reverse=True):
            if "/" in written:
                up = r"(?:\.\.(?:/\.\.)*)?" if written.startswith("/") else ""  # the same folder, seen from elsewhere
                text = self.texts[written].join(re.split(up + re.escape(written), text))
        return without_paths(text)


def _pieces(recipe: Recipe, names: Mapping[Path, str]) -> Iterator[str]:
    """The text, scalar by scalar: those that name a local model or file anew, and comments without paths."""
    text, at, data = recipe.text, 0, set(_data_files(recipe))
    for token in yaml.scan(text, yaml.SafeLoader):
        if isinstance(token, yaml.ScalarToken):
            begin, end = token.start_mark.index, token.end_mark.index
            yield without_paths(text[at:begin])
            named = _named(token.value, recipe.place, names, data)
            yield text[begin:end] if named is None else _scalar(named)
            at = end
    yield without_paths(text[at:])


def _named(value: str, place: Path | None, names: Mapping[Path, str], data: set[Path]) -> str | None:
    """What a scalar that names a local model or file by a path becomes; None for any other."""
    if os.sep not in value and value not in (".", "..", "~"):
        return None
    try:
        ref = ModelRef.parse(value, place)
    except CheckpointError:
        ref = None
    if ref is not None:
        parts = [part for part in (ref.bare, ref.adapter) if part]
        shown = [f"./{names[part.folder]}" if part.folder in names else part.text for part in parts]  # type: ignore[index]
        return "+".join(shown) if any(part.folder in names for part in parts) else None
    try:
        source = DataSpec.parse(value).source
    except DataError:
        return None
    found = [file for file in _places(source, place) if file in data]
    return value.replace(source, f"./{found[0].name}", 1) if found and os.sep in source else None


def _data_files(recipe: Recipe) -> Iterator[Path]:
    """The local files with text that the recipe and its steps name."""
    for step in recipe.steps.values():
        yield from _data_files(step)
    sources = [*recipe.models, *(source for part in recipe.slices for source in part.models)]
    specs = [*recipe.texts, *(spec for source in sources for spec in source.texts)]
    specs += [DataSpec.parse(text) for text in (recipe.probe.data if recipe.probe else [])]
    for spec in specs:
        yield from _places(spec.source, recipe.place)


def _places(source: str, place: Path | None) -> list[Path]:
    """The existing files that a source may stand for."""
    return [file.resolve() for file in (Path(source), (place or Path()) / source) if file.is_file()]


def _scalar(text: str) -> str:
    """The text as YAML, on one line."""
    if _PLAIN.fullmatch(text):
        return text
    return yaml.safe_dump([text], default_style='"', width=10**9, allow_unicode=True).strip().removeprefix("- ")
