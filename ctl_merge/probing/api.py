"""Probing a recipe, pairs over α, or somebody else's merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.deferred import torch
from ctl_merge.errors import CheckpointError, HubError, ProbeError, RecipeError
from ctl_merge.local_paths import without_paths
from ctl_merge.merging import Merge, Meter, no_meter
from ctl_merge.model import load_weights, open_model, return_freed_memory
from ctl_merge.probing import ranks
from ctl_merge.probing.data import TokenSet
from ctl_merge.probing.null import Combination, SignFlipped
from ctl_merge.probing.observer import Observations, Rider, Subject
from ctl_merge.probing.parents import parents_of
from ctl_merge.probing.placement import Options, memory, place, placed
from ctl_merge.probing.report import ProbeReport, rebuild
from ctl_merge.probing.rows import END, JOIN
from ctl_merge.probing.scaling import SCALES, scaled
from ctl_merge.probing.statistics import Statistics
from ctl_merge.probing.windows import token_sets
from ctl_merge.processes import launched
from ctl_merge.recipe import Recipe
from ctl_merge.recipe_file import load_recipe, parse_recipe
from ctl_merge.recipe_schema import ProbeSchema
from ctl_merge.reference import ModelRef
from ctl_merge.roles import roles, shared_base, short_names
from ctl_merge.stacks import find_blocks, text_sites
from ctl_merge.stored import open_checkpoint
from ctl_merge.weights import task_grams
from ctl_merge.workers import pool

ALPHAS = (0.1, 0.25, 0.5, 0.75, 0.9)
MERGED = "merged"
_DEFAULTS = ProbeSchema.model_validate({})
# Options by their names in a recipe's `probe:`, where `null` would be no text in YAML.
_FLAGS = {flag: flag for flag in ("chat", "special_tokens", "patch", "scaling")} | {"null": "null_vector"}


def probe(
    recipe: Recipe | str | Path | Merge | Sequence[str | Path], data: str | Sequence[str] = (), *,
    base: str | None = None, options: Options | None = None, meter: Meter = no_meter, **how: Any,
) -> ProbeReport:  # fmt: skip
    """Probe the merge that a recipe describes, or several recipes over the same models, without writing them.

    `data`: specs such as `math=test.jsonl:question,answer` or `wiki=corpus.txt`; the shipped tasks if there is none.
    `base`: the model that the others come from, where the recipe names none. `how`: fields of Options.
    `meter(what, total)` gives a context in which progress is told: tensors of `weights`, then sequences of `probing`.

    >>> import ctl_merge
    >>> report = ctl_merge.probe("recipes/quickstart/ties.yaml", sequences=2, length=16)
    >>> [row["block"] for row in report.rows if row["part"] == "block"][:2]
    ['model.layers.0', 'model.layers.1']
    """
    several: Sequence[Any] = recipe if isinstance(recipe, list | tuple) else [recipe]
    opened = launched().together(lambda: [r if isinstance(r, Merge) else Merge(r) for r in several])
    names = [MERGED] if len(opened) == 1 else [Path(merge.recipe.name).stem for merge in opened]
    merges = dict(zip(names, opened, strict=True))
    if len(merges) < len(opened):
        raise ProbeError(f"recipes that are probed together have names of their own, not {', '.join(names)}")
    chosen = _parsed(base)
    if len(opened) > 1:
        chosen = shared_base([merge.recipe for merge in opened], chosen)
    notes = {name: _notes(merge) for name, merge in merges.items()}
    return _run(merges, notes, names[0], data, options or Options(**how), meter, chosen)


def probe_pair(
    models: Sequence[str], base: str, data: str | Sequence[str] = (), *, alphas: Sequence[float] = ALPHAS,
    options: Options | None = None, meter: Meter = no_meter, **how: Any,
) -> ProbeReport:  # fmt: skip
    """The paper's sweep: α θ_i + (1 - α) θ_j for two finetunes of a base, all α in one run."""
    if len(models) != 2:
        raise ProbeError(f"a sweep over α takes two models, not {len(models)}: write a recipe for more")
    merges = launched().together(lambda: {f"α = {a:g}": Merge(_pair_recipe(models, base, a)) for a in alphas})
    notes = {f"α = {a:g}": {"method": "task_arithmetic", "alpha": float(a)} for a in alphas}
    middle = min(alphas, key=lambda a: abs(a - 0.5))
    return _run(merges, notes, f"α = {middle:g}", data, options or Options(**how), meter)


def probe_recipes(
    paths: Sequence[Path], data: Sequence[str], options: Options, sequences: int | None, length: int | None,
    base: str | None = None, meter: Meter = no_meter,
) -> ProbeReport:  # fmt: skip
    """Probe recipe files; what is not given here comes from the first one's `probe:` section."""
    recipe = launched().together(lambda: load_recipe(paths[0]))
    section = recipe.probe or _DEFAULTS
    how = replace(
        _with_flags(options, section), sequences=sequences or section.sequences, length=length or section.length
    )
    return probe(list(paths), data or section.data, base=base or _section_base(recipe), options=how, meter=meter)


def probe_opened(opened: Merge, meter: Meter = no_meter, trust_remote_code: bool = False) -> ProbeReport:
    """Probe a merge as its recipe's `probe:` section says."""
    section, options = _section_of(opened, trust_remote_code)
    return probe(opened, section.data, base=_section_base(opened.recipe), options=options, meter=meter)


def check_opened(opened: Merge, trust_remote_code: bool = False) -> None:
    """Raise what `probe_opened` would refuse before it runs a model; no weight is read."""
    section, options = _section_of(opened, trust_remote_code)
    own, _ = roles(opened, _parsed(_section_base(opened.recipe)))
    placed(options, own)
    token_sets(opened, own, section.data, options)


def _section_of(opened: Merge, trust_remote_code: bool) -> tuple[ProbeSchema, Options]:
    section = opened.recipe.probe or _DEFAULTS
    return section, replace(
        _with_flags(Options(), section),
        sequences=section.sequences,
        length=section.length,
        trust_remote_code=trust_remote_code,
    )


def _with_flags(options: Options, section: ProbeSchema) -> Options:
    """The options, and what the recipe's `probe:` section asks for besides."""
    flags: dict[str, Any] = {flag: getattr(options, flag) or getattr(section, key) for flag, key in _FLAGS.items()}
    given = {"join": options.join != JOIN, "end": options.end != END}
    return replace(options, **flags, **{key: getattr(options if own else section, key) for key, own in given.items()})


def _section_base(recipe: Recipe) -> str | None:
    """The base that the recipe's `probe:` section names, as it is found from the working directory."""
    named = recipe.probe.base if recipe.probe else None
    if named is None:
        return None
    ref = ModelRef.parse(named, Path(recipe.name).parent)
    return str(ref.folder) if ref.folder else named


def _parsed(base: str | None) -> ModelRef | None:
    return ModelRef.parse(base) if base else None


def probe_merged(
    merged: str, models: Sequence[str] = (), base: str | None = None, data: str | Sequence[str] = (), *,
    options: Options | None = None, meter: Meter = no_meter, **how: Any,
) -> ProbeReport:  # fmt: skip
    """A merge that lies in a folder or on the Hub, whatever made it, against its parents and their base.

    Parents and base come from the recipe or the model card in the merge's folder where they are not given.
    """
    given = bool(models) and base is not None
    if not models or base is None:
        models, base = parents_of(open_checkpoint(ModelRef.parse(merged)).folder, models, base)
    everyone = [*models, merged]
    try:
        opened = Merge(parse_recipe(_recipe_text("task_arithmetic", everyone, [1.0] * len(everyone), base)))
    except (RecipeError, CheckpointError, HubError) as error:
        if given:
            raise
        said = f"{merged} says that it was merged from {', '.join(models)} on {base}"
        raise ProbeError(f"{error}\n{said}: give --models A B … and --base C where they are now") from None
    opened.fetch()
    views = {ref: opened.merged.parent(ref) for ref in opened.recipe.refs}
    *refs, own, root = (ModelRef.parse(text) for text in (*models, merged, base))
    refs = [ref for ref in dict.fromkeys(refs) if ref not in (own, root)]
    if own == root or not refs:
        raise ProbeError(f"{merged} has no parents besides itself and its base: give --models A B … and --base C")
    parents = dict(zip(short_names(refs), (views[ref] for ref in refs), strict=True))
    options = options or Options(**how)
    placed(options, views[root])
    sets = token_sets(opened, views[root], data, options)
    subject = _subject(views[root], parents, {MERGED: views[own]}, opened.workers, meter)
    riders = [Rider(MERGED, views[own])]
    return _probe(subject, riders, {MERGED: {}}, opened, sets, options, meter)


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


def _notes(merge: Merge) -> dict[str, Any]:
    """What the report says of a merge: its method and, where it is a file, its recipe."""
    file = Path(merge.recipe.name)
    return {"method": merge.plan.method.name, **({"recipe": file.name} if file.suffix else {})}


def _pair_recipe(models: Sequence[str], base: str, alpha: float) -> Recipe:
    return parse_recipe(_recipe_text("task_arithmetic", models, [alpha, 1 - alpha], base))


def _recipe_text(method: str, models: Sequence[str], weights: Sequence[float], base: str) -> str:
    import json  # YAML is a superset of JSON, which quotes whatever a name holds

    listed = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]
    return json.dumps({"merge_method": method, "base_model": base, "models": listed}, ensure_ascii=False)


def _run(
    merges: Mapping[str, Merge], notes: Mapping[str, dict[str, Any]], main: str, data: str | Sequence[str],
    options: Options, meter: Meter, base: ModelRef | None = None,
) -> ProbeReport:  # fmt: skip
    for merge in merges.values():
        merge.fetch()
    opened = merges[main]
    own, parents = roles(opened, base)
    placed(options, own)
    sets = token_sets(opened, own, data, options)
    for name, merge in merges.items():
        if merge.merged.tensors.keys() != opened.merged.tensors.keys():
            raise ProbeError(f"{name} and {main} do not write the same tensors: probe them one by one")
    lazy: dict[str, Checkpoint] = {name: merge.merged for name, merge in merges.items()}
    subject = _subject(own, parents, lazy, opened.workers, meter)
    riders = [Rider(name, checkpoint, ghost=name == main) for name, checkpoint in lazy.items()]
    if any(spec.dtype in ("BF16", "F16") for spec in opened.merged.tensors.values()):
        place = list(lazy).index(main)
        riders.append(Rider(f"{main}/written", opened.merged, ghost=False, as_written=True, weights_of=place))
    return _probe(subject, riders, {**notes, main: {**notes[main], "main": True}}, opened, sets, options, meter)


def _subject(
    base: Checkpoint, parents: Mapping[str, Checkpoint], merges: Mapping[str, Checkpoint], workers: int, meter: Meter
) -> Subject:
    with pool(workers) as mapped, meter("weights", len(base.tensors)) as told:

        def telling(function: Callable[[str], Any], names: Iterable[str]) -> Iterator[Any]:
            for result in mapped(function, names):
                told(1)
                yield result

        weights = task_grams(base, list(parents.values()), list(merges.values()), telling)
    return_freed_memory()
    return Subject(base, parents, merges, weights)


def _probe(
    subject: Subject, riders: list[Rider], notes: dict[str, dict[str, Any]], opened: Merge, sets: Sequence[TokenSet],
    options: Options, meter: Meter,
) -> ProbeReport:  # fmt: skip
    main = next((name for name, own in notes.items() if own.get("main")), next(iter(notes)))
    place = list(subject.merges).index(main)
    if options.null and subject.parents:
        riders += _null_riders(subject, main, place)
    if options.patch:
        empty, _ = open_model(subject.base, trust_remote_code=options.trust_remote_code)
        sites = text_sites(empty, find_blocks(empty, options.blocks))
        merged = subject.merges[main]
        riders += [Rider(f"{main}/patch@{s}", merged, ghost=False, patch=s, weights_of=place) for s in sites]
    running = placed(options, subject.base, len(subject.parents), riders)
    together = launched()
    scales = SCALES if options.scaling else ()
    with meter("probing", (1 + len(scales)) * sum(len(tokens.ids) for tokens in sets)) as told:
        observed = ranks.observed(subject, riders, sets, running, told, together)
        nearer: dict[float, Mapping[str, Observations]] = {}
        for scale in scales:
            family = scaled(subject, main, scale)
            own = [Rider(main, family.merges[main], ghost=False)]
            nearer[scale] = ranks.observed(family, own, sets, running, told, together)
    settings = {
        "sequences": options.sequences, "length": sets[0].ids.shape[1], "special_tokens": options.special_tokens,
        "chat": options.chat, **_joining(options), "compute": "float32", "statistics": "float64",
        "torch": torch.__version__, **memory(running, subject, riders, observed),
    }  # fmt: skip
    more = {"scaled": nearer, "settings": settings, "warnings": [without_paths(line) for line in opened.plan.warnings]}
    return rebuild(Statistics.of(subject, riders, observed, notes, **more))


def _joining(options: Options) -> dict[str, str]:
    """How columns are joined, where that is not as usual."""
    return {key: repr(own) for key, own, usual in (("join", options.join, JOIN), ("end", options.end, END))
            if own != usual}  # fmt: skip


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
