"""YAML to recipes: one document, or steps of one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctl_merge.document import Document
from ctl_merge.errors import RecipeError
from ctl_merge.recipe import Recipe
from ctl_merge.recipe_check import RecipeChecker, is_step


def load_recipe(path: str | Path, relative_to: Path | None = None) -> Recipe:
    """Read and check a recipe file; relative folders are looked for in the working directory, then in `relative_to`,
    which is the file's own folder if it is None. Raises RecipeError with every problem and its line.
    """
    path = Path(path)
    return _last(Document.load(path), relative_to or path.parent)


def parse_recipe(text: str, name: str = "recipe", relative_to: Path | None = None) -> Recipe:
    """Check a recipe given as text; relative folders are looked for in the working directory, then `relative_to`."""
    return _last(Document.parse(text, name), relative_to)


def _last(documents: Sequence[Document], folder: Path | None) -> Recipe:
    """The recipe that the others of a file are steps of: each may name the named ones before or after it as models."""
    names = [d.data.get("name") if isinstance(d.data, dict) else None for d in documents]
    if len(documents) == 1:
        return RecipeChecker(documents[0], folder).recipe()
    file = documents[0].name
    twice = next((name for name in names if name is not None and names.count(name) > 1), None)
    if twice is not None or names.count(None) > 1:
        what = f"two merges are called {twice!r}" if twice is not None else "more than one merge has no `name`"
        raise RecipeError(f"{file}: {what}: of several documents each has a name, except the last merge")
    return _Steps(dict(zip(names, documents, strict=True)), folder).last()


class _Steps:
    """The merges of a file of several documents, each checked after those that it names as models."""

    def __init__(self, documents: Mapping[str | None, Document], folder: Path | None) -> None:
        self.documents, self.folder = documents, folder
        self.done: dict[str | None, Recipe] = {}
        self.open: list[str | None] = []

    def last(self) -> Recipe:
        """The unnamed merge; else the one that no other uses."""
        for name in self.documents:
            self._check(name)
        if None in self.documents:
            return self.done[None]
        used = {step for recipe in self.done.values() for step in recipe.steps}
        ends = [name for name in self.documents if name not in used]
        if len(ends) > 1:
            file = self.documents[ends[0]].name
            listed = ", ".join(map(repr, ends))
            raise RecipeError(
                f"{file}: no merge uses {listed}, so that it is open which is the result: leave out its name"
            )
        return self.done[ends[0]]

    def _check(self, name: str | None) -> None:
        if name in self.done:
            return
        document = self.documents[name]
        if name in self.open:
            raise RecipeError(f"{document.name}: the merge {name!r} needs itself: {' -> '.join(map(str, self.open))}")
        self.open.append(name)
        used = [other for other in self.documents if other is not None and _mentions(document.data, other)]
        for other in used:
            self._check(other)
        steps = {other: self.done[other] for other in used if other is not None}
        self.done[name] = RecipeChecker(document, self.folder, steps).recipe()
        self.open.pop()


def _mentions(data: Any, name: str) -> bool:
    """Whether a document names a step as a model."""
    if isinstance(data, dict):
        keys = ("model", "base_model", "path", "source_model")
        return any(
            (key in keys and is_step(value, name)) or (key != "name" and _mentions(value, name))
            for key, value in data.items()
        )
    return isinstance(data, list) and any(_mentions(item, name) for item in data)
