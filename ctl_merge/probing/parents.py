"""What a merge in a folder was made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from ctl_merge.errors import CtlMergeError, ProbeError, RecipeError
from ctl_merge.front_matter import CARD, card_text, stated_bases
from ctl_merge.recipe import Recipe
from ctl_merge.recipe_file import load_recipe, parse_recipe
from ctl_merge.reference import ModelRef

Read = Callable[[Path], Recipe]

RECIPES = ("ctl_merge_recipe.yaml", "mergekit_config.yml")
_FENCED = re.compile(r"^(`{3,})ya?ml[ \t]*\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)


def parents_of(folder: Path, models: Sequence[str], base: str | None) -> tuple[list[str], str]:
    """Parents and base of the merge in `folder`; what is given stays as it is.

    They come from the recipe in the folder, from one in its model card (a fenced YAML block with `merge_method`), or
    from the `base_model` of the card's metadata, which lists the models but does not say which of them is the base of
    the others. Raises ProbeError where they cannot be known, with what was found.
    """
    seen: list[str] = []
    for name, recipe in recipes_in(folder, seen):
        chosen = base or (found_again(recipe.base) if recipe.base else None)
        own = _without(chosen, [found_again(source.ref) for source in recipe.models])
        if chosen and own:
            return list(models) or own, chosen
        seen.append(f"{name} names no base_model")
    listed = _listed(folder, seen)
    own = _without(base, listed)
    if base and own:
        return list(models) or own, base
    if listed:
        seen.append(f"{CARD} lists {', '.join(listed)}, without saying which one the others were trained from")
    what = "give --models A B …" if base else "give --models A B … and --base C"
    what = "give --base C, and --models A B … for others" if listed else what
    said = f"its {CARD} names no models" if (folder / CARD).is_file() else f"there is no recipe and no {CARD} in it"
    found = "; ".join(seen) or said
    raise ProbeError(f"{folder} does not say what it was merged from ({found}): {what}")


def recipes_in(folder: Path, seen: list[str]) -> list[tuple[str, Recipe]]:
    """The recipes that can be read; why the others cannot goes to `seen`."""
    found = []
    for name, read in _readers(folder):
        try:
            found.append((name, _beside(read, folder)))
        except RecipeError as error:
            seen.append(f"{name} cannot be read: {_first(error)}")
    return found


def _readers(folder: Path) -> Iterator[tuple[str, Read]]:
    """The recipes in files and in the card: functions of the folder where relative paths are looked for."""
    for name in RECIPES:
        if (folder / name).is_file():
            yield name, partial(load_recipe, folder / name)
    for _, block in _FENCED.findall(card_text(folder)):
        if re.search(r"^merge_method[ \t]*:", block, re.MULTILINE):
            yield f"the recipe in {CARD}", partial(parse_recipe, block, "recipe")


def _beside(read: Read, folder: Path) -> Recipe:
    """The recipe with local models in the merge's folder, else beside it."""
    try:
        return read(folder)
    except RecipeError:
        with suppress(RecipeError):
            return read(folder.absolute().parent)
        raise


def _listed(folder: Path, seen: list[str]) -> list[str]:
    """`base_model` of the card's metadata."""
    try:
        return stated_bases(folder)
    except RecipeError as error:
        seen.append(_first(error))
        return []


def _without(base: str | None, models: Sequence[str]) -> list[str]:
    return [model for model in dict.fromkeys(models) if base is None or not _same(model, base)]


def found_again(ref: ModelRef) -> str:
    """The model's name as it is found from the working directory: the folder's own, where it lies beside the merge."""
    return str(ref.folder) if ref.folder and not _same(ref.text, str(ref.folder)) else ref.text


def _same(one: str, other: str) -> bool:
    try:
        return one == other or ModelRef.parse(one) == ModelRef.parse(other)
    except CtlMergeError:
        return False


def _first(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:300]
