"""What a recipe file will do, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctl_merge.compatibility import MERGEKIT, differences
from ctl_merge.document import Document
from ctl_merge.errors import RecipeError
from ctl_merge.recipe import Recipe, Slice, Source
from ctl_merge.recipe_file import load_recipe
from ctl_merge.settings import Setting


@dataclass(frozen=True)
class Checked:
    """`sections`: (title, lines). `problem`: why the file is no recipe, None where it is one."""

    sections: tuple[tuple[str, tuple[str, ...]], ...]
    problem: str | None


def check(path: str | Path) -> Checked:
    """Explain a recipe file without looking at its models. Raises RecipeError where it is no YAML at all."""
    documents = [document for document in Document.load(Path(path)) if isinstance(document.data, Mapping)]
    apart = [f"{row.subject}: {row.note}" for d in documents for row in differences(d.data)]
    against = ((f"against mergekit {MERGEKIT}", tuple(dict.fromkeys(apart))),) if apart else ()
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        return Checked(against, str(error))
    steps = [section for name, step in _ordered(recipe) for section in _sections(step, f"step {name}: ")]
    return Checked((*steps, *_sections(recipe, ""), *against), None)


def _ordered(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The steps of a recipe, those that others need first, each once."""
    found: dict[str, Recipe] = {}
    for name, step in recipe.steps.items():
        found.update(_ordered(step))
        found[name] = step
    yield from found.items()


def _sections(recipe: Recipe, before: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    method = recipe.method
    yield f"{before}{method.name}", (method.summary, *_base(recipe))
    if not recipe.slices:
        yield f"{before}what goes in", tuple(_models(recipe.models, recipe))
    for number, part in enumerate(recipe.slices, 1):
        what = f"slice {number}" if part.layers else "module"
        name = f" of {part.module}" if part.module and part.layers else f" {part.module}" if part.module else ""
        yield f"{before}{what}{name}", (*_base_of(part), *_models(part.models, recipe, part.settings))
    yield f"{before}what comes out", tuple(_outcome(recipe))
    if recipe.warnings:
        yield f"{before}mind", recipe.warnings


def _base(recipe: Recipe) -> Iterator[str]:
    if recipe.base and recipe.method.space == "task_vectors":
        yield f"task vectors are differences from {recipe.base}"
    shared = {name: s for name, s in recipe.settings.items() if not recipe.method.parameters[name].per_model}
    if shared:
        yield ", ".join(f"{name} {_said(setting)}" for name, setting in shared.items())
    left = {n: p.default for n, p in recipe.method.parameters.items() if not p.required and not _set(recipe, n)}
    if left:
        yield "left at their defaults: " + ", ".join(f"{name} {_plain(value)}" for name, value in left.items())


def _set(recipe: Recipe, name: str) -> bool:
    parts = recipe.slices or (Slice(recipe.models, None, recipe.settings),)
    return any(name in settings for part in parts for settings in (part.settings, *(s.settings for s in part.models)))


def _tokenizer(recipe: Recipe) -> str:
    source, first = recipe.tokenizer.source, recipe.refs[0]
    if source is None:
        return f"{first}'s; an error where vocabularies differ"
    if source == "union":
        return f"{first}'s, with the tokens that only others have"
    owner = first if source == "base" else source
    return f"{owner}'s; rows of tokens that only others have are left out"


def _base_of(part: Slice) -> Iterator[str]:
    if part.base:
        yield f"task vectors are differences from {_source(part.base)}"


def _models(sources: tuple[Source, ...], recipe: Recipe, outer: Mapping[str, Setting] | None = None) -> Iterator[str]:
    own = [name for name, parameter in recipe.method.parameters.items() if parameter.per_model]
    for source in sources:
        settings = {**(outer or recipe.settings), **source.settings}
        told = ", ".join(f"{name} {_said(settings[name])}" for name in own if name in settings)
        yield f"{_source(source)}{': ' if told else ''}{told}"


def _source(source: Source) -> str:
    if source.layers is None:
        return str(source.ref)
    first, end = source.layers
    return f"{source.ref}, layers {first} to {end - 1}" if end - first > 1 else f"{source.ref}, layer {first}"


def _said(setting: Setting) -> str:
    """A setting in words: `0.5`, `0 to 1 over the layers`, `0.3 in mlp, else 0.5`."""
    told: list[str] = []
    for filter_, value in setting.choices:
        text = f"{' → '.join(map(_plain, value))} over the layers" if isinstance(value, tuple) else _plain(value)
        told.append(f"{text} in *{filter_}*" if filter_ else f"else {text}" if told else text)
        if filter_ is None:
            break
    return ", ".join(told)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _outcome(recipe: Recipe) -> Iterator[str]:
    first = recipe.refs[0]
    kept = f"each tensor's own in {first}" if recipe.dtype is None else recipe.dtype
    yield f"dtype: {kept}; arithmetic is float64, rounded once"
    yield f"config of {first}"
    yield f"tokenizer: {_tokenizer(recipe)}"
    total = sum(part.layers or 0 for part in recipe.slices if part.module in (None, recipe.slices[0].module))
    if total:
        yield f"{total} layers"
    if recipe.missing != "error":
        yield {"base": f"tensors that a model lacks are {first}'s", "skip": "tensors that a model lacks are left out"}[
            recipe.missing
        ]
    if recipe.method.random:
        yield f"random numbers by seed {recipe.seed}, model, tensor and entry: the same in every run"
