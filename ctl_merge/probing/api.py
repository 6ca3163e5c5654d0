"""Probing a recipe, pairs over α, or somebody else's merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.errors import DataError, ProbeError
from ctl_merge.merging import Merge
from ctl_merge.model import load_weights, open_model, return_freed_memory
from ctl_merge.probing import ranks
from ctl_merge.probing.data import DataSpec, TokenSet, cut, load_tokens
from ctl_merge.probing.null import Combination, SignFlipped
from ctl_merge.probing.placement import Options, memory, place, placed
from ctl_merge.probing.report import ProbeReport, build_report
from ctl_merge.probing.run import Rider, Subject, observe
from ctl_merge.probing.texts import default_texts
from ctl_merge.recipe import ProbeSchema, Recipe, load_recipe, parse_recipe
from ctl_merge.reference import ModelRef
from ctl_merge.roles import roles
from ctl_merge.stacks import find_blocks, text_sites
from ctl_merge.stored import open_checkpoint
from ctl_merge.weights import task_grams
from ctl_merge.writer import pool

ALPHAS = (0.1, 0.25, 0.5, 0.75, 0.9)
MERGED = "merged"


def probe(
    recipe: Recipe | str | Path | Merge | Sequence[str | Path], data: str | Sequence[str] = (), *,
    base: str | None = None, options: Options | None = None, **how: Any,
) -> ProbeReport:  # fmt: skip
    """Probe the merge that a recipe describes, or several recipes over the same models, without writing them.

    `data`: specs such as `math=test.jsonl:question,answer` or `wiki=corpus.txt`; the shipped tasks if there is none.
    `base`: the model that the others come from, where the recipe names none. `how`: fields of Options.

    >>> import ctl_merge
    >>> report = ctl_merge.probe("recipes/quickstart/ties.yaml", sequences=2, length=16)
    >>> [row["block"] for row in report.rows if row["part"] == "block"][:2]
    ['model.layers.0', 'model.layers.1']
    """
    several: Sequence[Any] = recipe if isinstance(recipe, list | tuple) else [recipe]
    opened = [r if isinstance(r, Merge) else Merge(r) for r in several]
    names = [MERGED] if len(opened) == 1 else [Path(merge.recipe.name).stem for merge in opened]
    merges = dict(zip(names, opened, strict=True))
    if len({frozenset(merge.recipe.refs) for merge in opened}) > 1 or len(merges) < len(opened):
        raise ProbeError("recipes that are probed together have the same models, and names of their own")
    return _run(merges, names[0], data, options or Options(**how), base)


def probe_pair(
    models: Sequence[str], base: str, data: str | Sequence[str] = (), *, alphas: Sequence[float] = ALPHAS,
    options: Options | None = None, **how: Any,
) -> ProbeReport:  # fmt: skip
    """The paper's sweep: α θ_i + (1 - α) θ_j for two finetunes of a base, all α in one run."""
    if len(models) != 2:
        raise ProbeError(f"a sweep over α takes two models, not {len(models)}: write a recipe for more")
    merges = {f"α = {a:g}": Merge(_pair_recipe(models, base, a)) for a in alphas}
    middle = min(alphas, key=lambda a: abs(a - 0.5))
    report = _run(merges, f"α = {middle:g}", data, options or Options(**how))
    for entry, alpha in zip(report.data["merges"], alphas, strict=True):
        entry["alpha"] = alpha
    return report


def probe_recipes(
    paths: Sequence[Path], data: Sequence[str], options: Options, sequences: int | None, length: int | None,
    base: str | None = None,
) -> ProbeReport:  # fmt: skip
    """Probe recipe files; what is not given here comes from the first one's `probe:` section."""
    section = load_recipe(paths[0]).probe
    if section:
        options = replace(options, sequences=sequences or section.sequences, length=length or section.length)
    return probe(list(paths), data or (section.data if section else []), base=base, options=options)


def probe_opened(opened: Merge) -> ProbeReport:
    """Probe a merge as its recipe's `probe:` section says."""
    section = opened.recipe.probe or ProbeSchema()
    return probe(opened, section.data, sequences=section.sequences, length=section.length)


def probe_merged(
    merged: str, models: Sequence[str] = (), base: str | None = None, data: str | Sequence[str] = (), *,
    options: Options | None = None, **how: Any,
) -> ProbeReport:  # fmt: skip
    """A merge that lies in a folder or on the Hub, whatever made it, against its parents and their base.

    Parents and base come from the recipe in the merge's folder where they are not given.
    """
    if not models or base is None:
        models, base = _parents_of(merged, models, base)
    everyone = [*models, merged]
    opened = Merge(parse_recipe(_recipe_text("task_arithmetic", everyone, [1.0] * len(everyone), base)))
    opened.fetch()
    views = {ref.text: opened.merged.parent(ref) for ref in opened.recipe.refs}
    options = options or Options(**how)
    placed(options, views[base])
    parents = {_short(model): views[model] for model in models}
    subject = _subject(views[base], parents, {MERGED: views[merged]}, opened.workers)
    return _probe(subject, [Rider(MERGED, views[merged])], MERGED, opened, data, options)


def _parents_of(merged: str, models: Sequence[str], base: str | None) -> tuple[list[str], str]:
    """Parents and base as the recipe that lies in a merge's folder names them."""
    folder = open_checkpoint(ModelRef.parse(merged)).folder
    for name in ("ctl_merge_recipe.yaml", "mergekit_config.yml"):
        if (folder / name).is_file():
            recipe = load_recipe(folder / name)
            if recipe.base is not None:
                own = [ref.text for ref in recipe.refs if ref != recipe.base]
                return list(models) or own, base or recipe.base.text
    raise ProbeError(f"{merged} does not say what it was merged from: give --models A B … and --base C")


def load_model(
    recipe: Recipe | str | Path, device_map: str | None = None, *, max_memory: str | None = None,
    trust_remote_code: bool = False,
) -> Any:  # fmt: skip
    """The merge as a transformers model in eval mode, float32, without writing it.

    `device_map`: cpu (default), cuda:N, auto, JSON {"module": device}, or disk: weights are merged block by block
    whenever they are used. `max_memory`, such as `0=20GiB,cpu=8GiB`: what weights may take there; the rest is on disk.
    `trust_remote_code`: whether code that the model brings along may be run.
    """
    opened = Merge(recipe)
    opened.fetch()
    placement = place(opened.merged, device_map or "cpu", max_memory, trust_remote_code=trust_remote_code)
    return load_weights(opened.merged, placement, trust_remote_code=trust_remote_code)


def _pair_recipe(models: Sequence[str], base: str, alpha: float) -> Recipe:
    return parse_recipe(_recipe_text("task_arithmetic", models, [alpha, 1 - alpha], base))


def _recipe_text(method: str, models: Sequence[str], weights: Sequence[float], base: str) -> str:
    import json  # YAML is a superset of JSON, which quotes whatever a name holds

    listed = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]
    return json.dumps({"merge_method": method, "base_model": base, "models": listed}, ensure_ascii=False)


def _run(
    merges: Mapping[str, Merge], main: str, data: str | Sequence[str], options: Options, base: str | None = None
) -> ProbeReport:
    for merge in merges.values():
        merge.fetch()
    opened = merges[main]
    own, parents = roles(opened, ModelRef.parse(base) if base else None)
    placed(options, own)
    lazy: dict[str, Checkpoint] = {name: merge.merged for name, merge in merges.items()}
    subject = _subject(own, parents, lazy, opened.workers)
    riders = [Rider(name, checkpoint, ghost=name == main) for name, checkpoint in lazy.items()]
    if any(spec.dtype in ("BF16", "F16") for spec in opened.merged.tensors.values()):
        place = list(lazy).index(main)
        riders.append(Rider(f"{main}/written", opened.merged, ghost=False, as_written=True, weights_of=place))
    return _probe(subject, riders, main, opened, data, options)


def _subject(
    base: Checkpoint, parents: Mapping[str, Checkpoint], merges: Mapping[str, Checkpoint], workers: int
) -> Subject:
    with pool(workers) as mapped:
        weights = task_grams(base, list(parents.values()), list(merges.values()), mapped)
    return_freed_memory()
    return Subject(base, parents, merges, weights)


def _probe(
    subject: Subject, riders: list[Rider], main: str, opened: Merge, data: str | Sequence[str], options: Options
) -> ProbeReport:
    sets = _token_sets(opened, data, options)
    place = list(subject.merges).index(main)
    if options.null and subject.parents:
        riders += _null_riders(subject, main, place)
    if options.patch:
        empty, _ = open_model(subject.base, trust_remote_code=options.trust_remote_code)
        sites = text_sites(empty, find_blocks(empty, options.blocks))
        merged = subject.merges[main]
        riders += [Rider(f"{main}/patch@{s}", merged, ghost=False, patch=s, weights_of=place) for s in sites]
    running = placed(options, subject.base, len(subject.parents), riders)
    several = ranks.state()
    observed = observe(subject, riders, ranks.share(sets, several) if several else sets, running)
    if several:
        observed = ranks.gather(observed, several)
    settings = {
        "sequences": options.sequences, "length": options.length, "compute": "float32", "statistics": "float64",
        "torch": torch.__version__, **memory(running, subject, riders, observed),
    }  # fmt: skip
    report = build_report(subject, riders, observed, settings)
    report.data["merges"][place]["main"] = True
    report.data["warnings"] = list(opened.plan.warnings)
    return report


def _null_riders(subject: Subject, main: str, place: int) -> list[Rider]:
    """The last parent with random signs, and the merge that it would have gone into."""
    *others, last = subject.parents.values()
    flipped = SignFlipped(subject.base, last)
    coefficients = subject.coefficients(place)[0]
    merged = Combination(subject.base, [*others, flipped], coefficients.tolist())
    return [
        Rider(f"{main}/null", merged, ghost=False, weights_of=place),
        Rider(f"{main}/null-parent", flipped, ghost=False, weights_of=place),
    ]


def _token_sets(opened: Merge, data: str | Sequence[str], options: Options) -> list[TokenSet]:
    import transformers

    folder = opened.checkpoints[opened.recipe.refs[0]].folder
    failures = (Exception,) if options.trust_remote_code else (OSError, ValueError, ImportError, KeyError)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except failures as error:
        reason = str(error).partition("\n")[0]
        if "trust_remote_code" in str(error) and not options.trust_remote_code:
            reason = "it is code that comes with the model: if you trust it let it run, with --trust-remote-code"
        raise DataError(f"the tokenizer of {opened.recipe.refs[0]} cannot be loaded ({reason})") from None
    tokenizer.model_max_length = 1 << 30  # windows are cut by hand
    specs = [data] if isinstance(data, str) else list(data)
    if not specs:
        ids = {name: tokenizer(t, add_special_tokens=False)["input_ids"] for name, t in default_texts().items()}
        return [cut(name, found, tokenizer, options.sequences, options.length) for name, found in ids.items()]
    return [load_tokens(DataSpec.parse(s), tokenizer, options.sequences, options.length, options.chat) for s in specs]


def _short(text: str) -> str:
    return text.rstrip("/").rpartition("/")[2]
