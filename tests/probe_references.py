"""The probe's numbers by the paper's formulas, with every feature map of every model held in memory.

Nothing here streams, steps or accumulates: whole transformers models run one after the other, hooks keep what blocks
put out, in float64, and each number is its definition. `run_probe` runs the product on the same models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import recipe_text
from tiny_architectures import VOCABULARY, auto_class, build, finetune
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import ctl_merge
from ctl_merge.dispatch import Placement
from ctl_merge.merging import Merge
from ctl_merge.probing.data import STRATA, TokenSet
from ctl_merge.probing.report import build_report
from ctl_merge.probing.run import Observations, Rider, Running, Subject, observe
from ctl_merge.weights import task_grams

Coefficients = Sequence[float]
Parts = Mapping[str, str | Sequence[str]]  # a part's name -> its path below a block, or the paths that it may have
MASSIVE = 8


@pytest.fixture(autouse=True, scope="module")
def one_thread_a_model() -> Iterator[None]:
    """Models run beside each other: with more threads than cores, tiny ones wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- models


@dataclass(frozen=True)
class Family:
    """A saved base, and finetunes of it by name."""

    name: str
    base: Path
    parents: Mapping[str, Path]

    def models(self) -> list[nn.Module]:
        """Base and parents, as users load them."""
        return [load(self.name, path) for path in (self.base, *self.parents.values())]


def load(name: str, folder: Path) -> nn.Module:
    return auto_class(name).from_pretrained(folder, dtype=torch.float32).eval()


def write_family(
    folder: Path, name: str = "llama", *, scale: float = 0.02, parents: int = 2,
    change: Callable[[nn.Module, int], object] | None = None, prepare: Callable[[nn.Module], object] | None = None,
    **config: Any,
) -> Family:  # fmt: skip
    """Save a random model and finetunes of it.

    `change(model, seed)` makes a copy of the base a parent (a shift of every weight by default); `prepare` alters the
    base before that.
    """
    alter = change or (lambda model, seed: finetune(model, seed, scale))
    models = []
    for seed in range(parents + 1):
        model = build(name, **config)
        if prepare is not None:
            with torch.no_grad():
                prepare(model)
        if seed:
            with torch.no_grad():
                alter(model, seed)
        model.save_pretrained(folder / f"{seed}")
        models.append(folder / f"{seed}")
    return Family(name, models[0], {f"{i}": path for i, path in enumerate(models) if i})


def open_merge(family: Family, weights: Coefficients, method: str = "task_arithmetic", **keys: Any) -> Merge:
    """The merge of a family's parents, not written."""
    models = [(path, {"weight": w}) for path, w in zip(family.parents.values(), weights, strict=True)]
    return Merge(ctl_merge.parse_recipe(recipe_text(method, models, family.base, **keys)))


def combine(name: str, folder: Path, models: Sequence[nn.Module], coefficients: Coefficients) -> nn.Module:
    """θ_0 + Σ c_i (θ_i - θ_0) in float64, as a model of its own; the first of the models is the base."""
    states = [model.state_dict() for model in models]
    merged = load(name, folder)
    mixed = {}
    for key, own in states[0].items():
        moved = sum(c * (s[key].double() - own.double()) for c, s in zip(coefficients, states[1:], strict=True))
        mixed[key] = (own.double() + moved).to(own.dtype) if own.is_floating_point() else own
    merged.load_state_dict(mixed)
    return merged


def random_tokens(sequences: int = 4, length: int = 20, seed: int = 0, name: str = "random") -> TokenSet:
    """Windows of random ids; every seventh id counts as a delimiter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 30, (sequences, length), generator=generator)
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[:, 0] = True
    delimiter = (ids % 7 == 0) & ~first
    empty = torch.zeros_like(first)
    return TokenSet(name, ids, torch.stack([first, delimiter, empty, empty, ~first & ~delimiter], dim=1))


# ---- features


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Outermost lists of nothing but transformer layers, by path."""
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and all(isinstance(m, GradientCheckpointingLayer) for m in module)
    }
    return {path: module for path, module in found.items() if not any(path.startswith(f"{p}.") for p in found)}


def inputs_of(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What the model is called with: an encoder-decoder reads the first half of a window and predicts the second."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    half = ids.shape[1] // 2
    return {"input_ids": ids[:, :half], "decoder_input_ids": ids[:, half:]}


def hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keeping(model: nn.Module, site: str, parts: Parts, kept: dict[str, Tensor]) -> list[Any]:
    """Hooks that keep the outputs of a block and of its parts."""

    def keep(where: str) -> Callable[..., None]:
        return lambda module, args, output: kept.__setitem__(where, hidden(output).double())

    block = model.get_submodule(site)
    inside, handles = dict(block.named_modules()), [block.register_forward_hook(keep(site))]
    for part, paths in parts.items():
        below = next((p for p in ([paths] if isinstance(paths, str) else paths) if p in inside), None)
        if below is not None:
            handles.append(inside[below].register_forward_hook(keep(f"{site}.{part}")))
    return handles


@torch.no_grad()
def features(model: nn.Module, ids: Tensor, parts: Parts) -> tuple[dict[str, Tensor], Tensor]:
    """The output of every block, of its parts and what goes into a stack: (N, T, H) by site, and the logits."""
    kept: dict[str, Tensor] = {}
    handles = []
    for path, blocks in stacks(model).items():
        first_input = lambda module, args, kwargs, site=f"{path}.input": kept.__setitem__(  # noqa: E731
            site, (args[0] if args else kwargs["hidden_states"]).double()
        )
        handles.append(blocks[0].register_forward_pre_hook(first_input, with_kwargs=True))
        for i in range(len(blocks)):
            handles += keeping(model, f"{path}.{i}", parts, kept)
    with hooked(handles):
        output = model(**inputs_of(model, ids), use_cache=False)
    return kept, output.logits.double()


@torch.no_grad()
def on_other_inputs(model: nn.Module, ids: Tensor, site: str, replacement: Tensor, parts: Parts) -> dict[str, Tensor]:
    """B_m(I): what the block at `site` and its parts put out, in the model's own forward, if given `replacement`."""
    kept: dict[str, Tensor] = {}

    def replace(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        new = replacement.float()
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    replacing = model.get_submodule(site).register_forward_pre_hook(replace, with_kwargs=True)
    with hooked([replacing, *keeping(model, site, parts, kept)]):
        model(**inputs_of(model, ids), use_cache=False)
    return kept


@torch.no_grad()
def patched_logits(model: nn.Module, ids: Tensor, site: str, replacement: Tensor) -> Tensor:
    """The logits of a model whose features after the block at `site` are replaced."""

    def replace(module: nn.Module, args: tuple, output: Any) -> Any:
        new = replacement.float()
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with hooked([model.get_submodule(site).register_forward_hook(replace)]):
        return model(**inputs_of(model, ids), use_cache=False).logits.double()


# ---- numbers


def affine(coefficients: Coefficients, sources: Sequence[Tensor]) -> Tensor:
    """I = F_0 + Σ c_i (F_i - F_0); the first source is the base's."""
    base, *others = sources
    return base + sum(c * (other - base) for c, other in zip(coefficients, others, strict=True))


def nonlinearity(merged: Tensor, sources: Sequence[Tensor], coefficients: Coefficients) -> float:
    """R = sqrt(E‖F_m - I‖² / Σ α_i E‖F_i - I‖²), over base and parents; |α_i| where a coefficient extrapolates."""
    centre = affine(coefficients, sources)
    shares = [1 - sum(coefficients), *coefficients]
    apart = sum(abs(a) * float((f - centre).square().sum()) for a, f in zip(shares, sources, strict=True))
    return math.sqrt(float((merged - centre).square().sum()) / apart)


def cosine(a: Tensor, b: Tensor) -> float:
    """E cos over sequences, each flattened over its tokens."""
    return float(torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=0).mean())


def coef(merged: Tensor, centre: Tensor) -> float:
    return float(((merged * centre).sum((1, 2)) / centre.square().sum((1, 2))).mean())


def effective(merged: Tensor, sources: Sequence[Tensor]) -> tuple[list[float], float]:
    """ĉ = argmin ‖F_m - F_0 - Σ c_i (F_i - F_0)‖², and its R²."""
    base, *others = (f.flatten().numpy() for f in sources)
    matrix, target = np.stack([f - base for f in others], axis=1), merged.flatten().numpy() - base
    found = np.linalg.lstsq(matrix, target, rcond=None)[0]
    return found.tolist(), 1 - float(((target - matrix @ found) ** 2).sum() / (target**2).sum())


def massive_dimensions(base: Tensor) -> list[int]:
    """Those in which the base's features are largest, in the first sequence."""
    return sorted(base[0].square().mean(0).topk(min(MASSIVE, base.shape[2])).indices.tolist())


def definition(
    merged: Tensor, ghost: Tensor | None, sources: Sequence[Tensor], coefficients: Coefficients
) -> dict[str, Any]:
    """All numbers of one site, under the report's names. Features (N, T, H), the base's first."""
    centre, parents = affine(coefficients, sources), sources[1:]
    keep = [d for d in range(merged.shape[2]) if d not in massive_dimensions(sources[0])]
    found, explained = effective(merged, sources)
    size = float((merged - centre).norm()) / nonlinearity(merged, sources, coefficients)  # sqrt of the disagreement
    return {
        "nonlinearity": nonlinearity(merged, sources, coefficients),
        "nonlinearity_robust": nonlinearity(merged[..., keep], [f[..., keep] for f in sources], coefficients),
        "cos": cosine(merged, centre),
        "cos_token": float(torch.cosine_similarity(merged, centre, dim=2, eps=0).mean()),
        "coef": coef(merged, centre),
        "cos_parents": float(np.mean([cosine(a, b) for a, b in combinations(parents, 2)])),
        "cos_to_parents": [cosine(merged, parent) for parent in parents],
        "effective_feature": found,
        "explained_feature": explained,
        "relative_deviation": float((merged - centre).norm() / centre.norm()),
        "local": float((ghost - centre).norm()) / size if ghost is not None else None,
        "propagated": float((merged - ghost).norm()) / size if ghost is not None else None,
    }


@dataclass
class Plain:
    """Everything of a family and one merge on one set of windows: features (N, T, H) by site, base first."""

    coefficients: Coefficients
    sources: dict[str, list[Tensor]] = field(default_factory=dict)
    merged: dict[str, Tensor] = field(default_factory=dict)
    ghosts: dict[str, Tensor] = field(default_factory=dict)
    logits: list[Tensor] = field(default_factory=list)  # of base, parents, merge

    def numbers(self, site: str) -> dict[str, Any]:
        return definition(self.merged[site], self.ghosts.get(site), self.sources[site], self.coefficients)

    def strata(self, site: str, masks: Tensor) -> dict[str, float | None]:
        """R over the tokens of each stratum, None where there are none; masks (N, S, T)."""
        return {
            name: nonlinearity(self.merged[site][mask], [f[mask] for f in self.sources[site]], self.coefficients)
            if mask.any() else None
            for name, mask in zip(STRATA, masks.unbind(1), strict=True)
        }  # fmt: skip


def run_plain(
    family: Family, coefficients: Coefficients, ids: Tensor, parts: Parts | None = None,
    merged: nn.Module | None = None,
) -> Plain:  # fmt: skip
    """The definition: whole models, one after the other. `merged` is the weights' own affine combination by default."""
    models = family.models()
    merged = merged or combine(family.name, family.base, models, coefficients)
    kept = [features(model, ids, parts or {}) for model in (*models, merged)]
    found = Plain(coefficients, logits=[logits for _, logits in kept])
    for site, own in kept[-1][0].items():
        found.sources[site], found.merged[site] = [f[site] for f, _ in kept[:-1]], own
    for path, blocks in stacks(merged).items():
        for i in range(len(blocks)):
            before = f"{path}.{i - 1}" if i else f"{path}.input"
            if before in found.sources:
                mixed = affine(coefficients, found.sources[before])
                found.ghosts |= on_other_inputs(merged, ids, f"{path}.{i}", mixed, parts or {})
    return found


# ---- losses


def nll(logits: Tensor, labels: Tensor) -> float:
    """Nats per predicted token: logits (N, T, V) in front of labels (N, T)."""
    logp = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None])
    return -float(logp.mean())


def kl(one: Tensor, other: Tensor) -> float:
    """KL(one ‖ other) per predicted token."""
    p, q = one[:, :-1].log_softmax(-1), other[:, :-1].log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# ---- the product


def subject_of(merges: Mapping[str, Merge], family: Family) -> Subject:
    """Merges of a family as the product sees them."""
    for merge in merges.values():
        merge.fetch()
    opened = next(iter(merges.values()))
    base, *others = (opened.merged.parent(ref) for ref in opened.recipe.refs)
    lazy = {name: merge.merged for name, merge in merges.items()}
    parents = dict(zip(family.parents, others, strict=True))
    return Subject(base, parents, lazy, task_grams(base, others, list(lazy.values())))


def run_probe(
    family: Family, merge: Merge | Coefficients, tokens: TokenSet, *, streamed: bool = False, batch: int = 4,
    riders: Sequence[Rider] = (), blocks: str | None = None,
) -> Probed:  # fmt: skip
    """Probe a merge of the family (task arithmetic of those coefficients by default)."""
    opened = merge if isinstance(merge, Merge) else open_merge(family, merge)
    subject = subject_of({"merged": opened}, family)
    everyone = [Rider("merged", opened.merged), *riders]
    placement = Placement("cpu", {"": "disk" if streamed else "cpu"})
    observed = observe(subject, everyone, [tokens], Running(placement, batch, blocks))
    data = json.loads(build_report(subject, everyone, observed, {}).to_json())
    return Probed(subject, observed[tokens.name], data["sets"][tokens.name], data)


@dataclass(frozen=True)
class Probed:
    """What the product found on one set of windows."""

    subject: Subject
    observed: Observations
    found: Mapping[str, Any]
    data: Mapping[str, Any]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The report's rows by site, per-parent numbers as lists."""
        return {
            row["block"]: {k: [*v.values()] if k in _PER_PARENT else v for k, v in row.items()}
            for row in self.found["blocks"]
        }

    def blocks(self) -> dict[str, dict[str, Any]]:
        """The rows of whole blocks."""
        return {site: row for site, row in self.rows.items() if row["part"] == "block"}

    @property
    def losses(self) -> Mapping[str, Any]:
        return self.found["losses"]


_PER_PARENT = ("cos_to_parents", "effective_feature", "effective_weight")
assert STRATA == ("first", "delimiter", "prompt", "response", "other")
