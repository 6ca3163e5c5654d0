"""What a recipe file will do, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctl_merge.chat_template import TEMPLATES
from ctl_merge.compatibility import MERGEKIT, Row, differences
from ctl_merge.document import Document
from ctl_merge.errors import RecipeError
from ctl_merge.mixture import Expert, Mixture
from ctl_merge.moe_words import gates
from ctl_merge.recipe import Recipe, Slice, Source
from ctl_merge.recipe_file import load_recipe
from ctl_merge.recipe_tokenizer import TokenSetting
from ctl_merge.reference import ModelRef
from ctl_merge.settings import Setting

Section = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Checked:
    """`sections`: (title, lines). `problem`: why the file is no recipe, None where it is one."""

    sections: tuple[Section, ...]
    problem: str | None


def check(path: str | Path) -> Checked:
    """Explain a recipe file without looking at its models. Raises RecipeError where it is no YAML at all."""
    documents = [document for document in Document.load(Path(path)) if isinstance(document.data, Mapping)]
    apart = [_difference(row) for document in documents for row in differences(document.data)]
    against = ((f"against mergekit {MERGEKIT}", tuple(dict.fromkeys(apart))),) if apart else ()
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        return Checked(against, str(error))
    steps = [section for name, step in _ordered(recipe) for section in _sections(step, f"step {name}: ")]
    return Checked((*steps, *_sections(recipe, ""), *against), None)


def _difference(row: Row) -> str:
    return f"{row.subject}{'' if row.verdict == 'ours' else f', {row.verdict}'}: {row.note}"


def _ordered(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The steps of a recipe, those that others need first, each once."""
    found: dict[str, Recipe] = {}
    for name, step in recipe.steps.items():
        found.update(_ordered(step))
        found[name] = step
    yield from found.items()


def _sections(recipe: Recipe, before: str) -> Iterator[Section]:
    yield f"{before}{recipe.method.name}", (recipe.method.summary, *_method(recipe))
    for title, lines in _inputs(recipe):
        yield f"{before}{title}", tuple(lines)
    yield f"{before}what comes out", tuple(_outcome(recipe))
    if recipe.warnings:
        yield f"{before}mind", recipe.warnings


def _inputs(recipe: Recipe) -> Iterator[tuple[str, Iterator[str]]]:
    if recipe.mixture:
        yield "experts", (_expert(number, expert) for number, expert in enumerate(recipe.mixture.experts))
        if recipe.mixture.shared:
            yield "used for every token", (_expert(None, expert) for expert in recipe.mixture.shared)
        return
    if not recipe.slices:
        yield "what goes in", _models(recipe.models, recipe)
    for name, parts in _by_module(recipe.slices).items():
        of = f" of {name}" if name else ""
        if all(part.layers and len(part.models) == 1 and not part.base for part in parts):
            yield f"layers{of}", _stacked(parts, recipe)
            continue
        begin = 0
        for part in parts:
            end = begin + (part.layers or 0)
            title = f"layer{_s(begin, end)} {_span(begin, end)}{of}" if part.layers else f"module {name}"
            yield title, (line for lines in (_base_of(part), _models(part.models, recipe, part)) for line in lines)
            begin = end


def _by_module(slices: tuple[Slice, ...]) -> dict[str | None, list[Slice]]:
    names = dict.fromkeys(part.module for part in slices)
    return {name: [part for part in slices if part.module == name] for name in names}


def _stacked(parts: list[Slice], recipe: Recipe) -> Iterator[str]:
    """Slices of one model each, a line for each."""
    begin = 0
    for part in parts:
        end = begin + (part.layers or 0)
        yield f"{_span(begin, end)}: {next(_models(part.models, recipe, part))}"
        begin = end


def _expert(number: int | None, expert: Expert) -> str:
    prompts = ", ".join(
        f"{len(texts)} {what} prompt{'s' if len(texts) > 1 else ''}"
        for texts, what in ((expert.positive, "positive"), (expert.negative, "negative"))
        if texts
    )
    told = [prompts] if prompts else []
    if expert.noise_scale:
        told.append(f"noise of standard deviation {expert.noise_scale:g}")
    if expert.residual_scale != 1.0:
        told.append(f"output times {expert.residual_scale:g}")
    name = f"{_name(expert.ref)}{': ' if told else ''}{', '.join(told)}"
    return name if number is None else f"{number}: {name}"


def _method(recipe: Recipe) -> Iterator[str]:
    if recipe.base and recipe.method.space == "task_vectors" and not recipe.slices:
        yield f"task vectors are differences from {_name(recipe.base)}"
    shared = {name: s for name, s in recipe.settings.items() if not recipe.method.parameters[name].per_model}
    if shared:
        yield ", ".join(f"{name} {_said(setting)}" for name, setting in shared.items())
    left = {n: p.default for n, p in recipe.method.parameters.items() if not p.required and not _set(recipe, n)}
    if left:
        yield "left at their defaults: " + ", ".join(f"{name} {_plain(value)}" for name, value in left.items())
    if recipe.data:
        whose = {"expert": "its own model's", "base": "the base's", "merged": "the merge's"}[recipe.data.inputs]
        yield f"measured on {recipe.data.sequences} windows of {recipe.data.length} tokens of each text"
        if recipe.method.statistic == "gram":
            yield f"what a layer reads is {whose} activations"


def _set(recipe: Recipe, name: str) -> bool:
    parts = recipe.slices or (Slice(recipe.models, None, recipe.settings),)
    return any(name in settings for part in parts for settings in (part.settings, *(s.settings for s in part.models)))


def _base_of(part: Slice) -> Iterator[str]:
    if part.base:
        yield f"task vectors are differences from {_source(part.base)}"


def _models(sources: tuple[Source, ...], recipe: Recipe, part: Slice | None = None) -> Iterator[str]:
    own = [name for name, parameter in recipe.method.parameters.items() if parameter.per_model]
    inner = part.settings if part else {}
    shared = {name: s for name, s in inner.items() if name not in own and s != recipe.settings.get(name)}
    given = recipe.data.texts if recipe.data else []
    common = [given] if isinstance(given, str) else given
    for source in sources:
        settings = {**(inner or recipe.settings), **source.settings}
        told = [f"{name} {_said(settings[name])}" for name in own if name in settings]
        texts = [f"{spec.source}:{','.join(spec.columns)}" for spec in source.texts] or common
        told += [f"measured on {', '.join(texts)}"] if recipe.data and texts else []
        is_base = recipe.method.space == "weights" and recipe.method.base == "required" and source.ref == recipe.base
        yield f"{_source(source)}{', the base' if is_base else ''}{': ' if told else ''}{', '.join(told)}"
    if shared:
        yield ", ".join(f"{name} {_said(setting)}" for name, setting in shared.items())


def _source(source: Source) -> str:
    ref = source.ref
    name = _name(ref) if ref.adapter is None else f"{_name(ref.bare)} with the adapter {ref.adapter}"
    return name if source.layers is None else f"{name}, layer{_s(*source.layers)} {_span(*source.layers)}"


def _name(ref: ModelRef) -> str:
    return f"step {ref}" if ref.step else str(ref)


def _s(begin: int, end: int) -> str:
    return "s" if end - begin > 1 else ""


def _span(begin: int, end: int) -> str:
    return f"{begin} to {end - 1}" if end - begin > 1 else str(begin)


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
    if value is None:
        return "by itself"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _outcome(recipe: Recipe) -> Iterator[str]:
    first = _name(recipe.refs[0])
    if recipe.lora:
        rank = f"rank at most {recipe.lora.rank}" if recipe.lora.rank else "the rank that the merge has"
        enough = f", or that {recipe.lora.energy:g} of ‖change‖² takes" if recipe.lora.energy else ""
        yield f"one LoRA adapter: {rank}{enough}"
        yield f"dtype: {recipe.dtype or 'the widest of the adapters'}; arithmetic is float64, rounded once"
        return
    yield f"dtype: {recipe.dtype or f'each tensor as {first} has it'}; arithmetic is float64, rounded once"
    if recipe.mixture:
        yield from _mixture(recipe.mixture, first, recipe.refs[0])
    else:
        yield f"config of {first}"
        yield from _vocabulary(recipe, first)
    total = sum(part.layers or 0 for part in recipe.slices if part.module in (None, recipe.slices[0].module))
    if total:
        yield f"{total} layers"
    if recipe.missing != "error":
        whose = {"base": f"are {first}'s", "skip": "are left out"}[recipe.missing]
        yield f"tensors that a model lacks {whose}"
    if recipe.method.random or (recipe.mixture and _draws(recipe.mixture)):
        yield f"random numbers by seed {recipe.seed}, model, tensor and entry: the same in every run"


def _mixture(mixture: Mixture, first: str, base: ModelRef) -> Iterator[str]:
    family = mixture.architecture or "the first architecture that fits"
    yield f"{family}: {len(mixture.experts)} experts, {mixture.experts_per_token} for each token"
    yield f"gates: {gates(mixture, base)}"
    yield f"attention, norms, embeddings, head, tokenizer and chat template: {first}'s"


def _draws(mixture: Mixture) -> bool:
    return not mixture.from_prompts or any(expert.noise_scale for expert in mixture.everyone)


def _vocabulary(recipe: Recipe, first: str) -> Iterator[str]:
    setting = recipe.tokenizer
    source = setting.source
    if source is None:
        yield f"tokenizer: {first}'s; an error where vocabularies differ"
    elif source == "union":
        yield f"tokenizer: {first}'s, with the tokens that only others have"
    else:
        owner = first if isinstance(source, str) else _name(source)
        yield f"tokenizer: {owner}'s; rows of tokens that only others have are left out"
    for token, own in setting.tokens.items():
        yield f"row of {token!r}: {_row(own)}{', in every model' if own.force else ', in models that lack it'}"
    if setting.pad_to_multiple_of:
        yield f"rows of the embedding: the tokens, rounded up to a multiple of {setting.pad_to_multiple_of}"
    template = setting.chat_template
    if template:
        known = next((name for name, text in TEMPLATES.items() if text == template), "the recipe's own")
        yield f"chat template: {'what most models have' if template == 'auto' else known}"


def _row(own: TokenSetting) -> str:
    if own.default:
        return "as for any other token"
    token = "" if own.token is None else f" of {own.token!r}" if isinstance(own.token, str) else f" {own.token}"
    return "zeros" if own.zero else f"row{token} of {own.model}"
