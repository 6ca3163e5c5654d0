"""Base and parents, as their merge sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.errors import RecipeError
from ctl_merge.findings import short_name
from ctl_merge.merged import MergedCheckpoint
from ctl_merge.merging import Merge
from ctl_merge.methods import registry
from ctl_merge.recipe import Recipe, Source
from ctl_merge.reference import ModelRef
from ctl_merge.settings import Setting


def roles(opened: Merge, base: ModelRef | None) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """The base and the parents by short names, all under the names and shapes of the output.

    `base`: the model that the parents come from, where the recipe does not name one. Raises RecipeError.
    """
    recipe = opened.recipe
    _check_aligned(recipe)
    if base is not None and recipe.base is not None and recipe.method.space == "task_vectors":
        raise RecipeError(f"--base: {recipe.method.name} has a base in the recipe already, {recipe.base}")
    chosen = base or recipe.base
    if chosen is None:
        raise RecipeError(
            f"{recipe.name}: {recipe.method.name} names no base model, and task vectors are differences from one. "
            "Give the model that all others were trained from: --base org/name or a folder, or `probe: {base: …}` "
            "in the recipe"
        )
    same = [ref for ref in recipe.refs if model_state(ref) == model_state(chosen)]
    chosen = same[0] if same else chosen
    merged = opened.merged if same and _goes_in(opened, chosen) else _with_model(opened, chosen)
    refs = [ref for ref in dict.fromkeys(source.ref for source in recipe.models) if ref != chosen]
    if not refs:
        raise RecipeError(f"{recipe.name}: there is no model besides the base {chosen}: no parents")
    return merged.parent(chosen), dict(zip(short_names(refs), map(merged.parent, refs), strict=True))


def _check_aligned(recipe: Recipe) -> None:
    """Refuse a merge whose blocks have no counterpart in its parents: a stack, parts of different models, experts."""
    if recipe.mixture is not None:
        raise RecipeError(
            f"{recipe.name}: a mixture of experts has no counterpart in its parents, tensor by tensor, to be compared "
            "or probed with"
        )
    place = 0
    for part in recipe.slices:
        sources = [*part.models, *([part.base] if part.base else [])]
        models = {source.ref for source in sources}
        moved = any(source.layers and source.layers[0] != place for source in sources)
        if moved or not set(recipe.refs) <= models | ({recipe.base} if recipe.base else set()):
            raise RecipeError(
                f"{recipe.name}: its slices move layers, or not every model goes into each: the blocks of the merge "
                "have no counterpart in its parents to be compared with. Look at what is stacked instead: a recipe "
                "for each merge that goes into it"
            )
        place += part.layers or 0


def _goes_in(opened: Merge, ref: ModelRef) -> bool:
    """Whether the model is among those of every merged tensor: a base that only gives the config is in none."""
    merged = (plan for plan in opened.plan.tensors.values() if plan.operation == "merge")
    return all(any(part.model == ref for part in plan.everyone) for plan in merged)


def _with_model(opened: Merge, ref: ModelRef) -> MergedCheckpoint:
    """The recipe's models and one more, matched with each other; what is done with them there does not matter."""
    equal = {"weight": Setting(((None, 1.0),))}
    refs = dict.fromkeys((*(source.ref for source in opened.recipe.models), ref))
    models = tuple(Source(each, equal) for each in refs)
    linear = {"method": registry()["linear"], "models": models, "settings": {}, "slices": (), "onlookers": (ref,)}
    everyone = Merge(replace(opened.recipe, **linear))  # type: ignore[arg-type]
    everyone.fetch()
    if {n: s.shape for n, s in everyone.merged.tensors.items()} != {
        n: s.shape for n, s in opened.merged.tensors.items()
    }:
        raise RecipeError(f"{opened.recipe.name}: the merge has not all tensors of {ref}: they cannot be compared")
    return everyone.merged


def shared_base(recipes: Sequence[Recipe], base: ModelRef | None) -> ModelRef | None:
    """The base of recipes over the same models, None where the first one names it. Raises RecipeError.

    `base`: the one that is given. A recipe that names none has that of the others.
    """
    named = [recipe.base if recipe.method.space == "task_vectors" else None for recipe in recipes]
    bases = {model_state(ref): ref for ref in (*named, base) if ref is not None}
    if len(bases) > 1:
        raise RecipeError(f"recipes that are probed together have one base, not {', '.join(map(str, bases.values()))}")
    first, *others = ({model_state(ref): ref for ref in recipe.refs} | bases for recipe in recipes)
    for recipe, models in zip(recipes[1:], others, strict=True):
        apart = [*(first[s] for s in first.keys() - models.keys()), *(models[s] for s in models.keys() - first.keys())]
        if apart:
            raise RecipeError(
                f"recipes that are probed together have the same models: {', '.join(sorted(map(str, apart)))} "
                f"{'is' if len(apart) == 1 else 'are'} not in both {recipes[0].name} and {recipe.name}"
            )
    return None if named[0] else next(iter(bases.values()), None)


def model_state(ref: ModelRef) -> tuple[Any, ...]:
    return ref.folder, ref.repo_id, ref.revision, ref.adapter


def short_names(refs: Sequence[ModelRef]) -> list[str]:
    """The last part of each name where that tells them apart, else whole names."""
    short = [short_name(ref.text) for ref in refs]
    if len(set(short)) == len(short):
        return short
    longer = ["/".join(ref.folder.parts[-2:]) if ref.folder and not ref.adapter else ref.text for ref in refs]
    return longer if len(set(longer)) == len(longer) else [ref.text for ref in refs]
