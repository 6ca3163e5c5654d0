"""What to merge and how, proposed from what models are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ctl_merge.correspondence import few
from ctl_merge.errors import MismatchError, RecipeError
from ctl_merge.family import Member
from ctl_merge.findings import FAR, UNRELATED, percent
from ctl_merge.header import MERGEABLE, dtype_name
from ctl_merge.kinship import Kinship
from ctl_merge.layers import depths
from ctl_merge.methods import Method, registry
from ctl_merge.model_config import vocab_size
from ctl_merge.pedigree import Common
from ctl_merge.problems import nearest
from ctl_merge.tokenizer import compare

# How sure the base is, in words.
CERTAINTY = {
    "given": "given with --base",
    "stated": "stated by every model that comes from it",
    "stated by some": "likely: stated by some of the models, not contradicted by the others",
    "by weights": "likely: by the weights, as nothing states it",
    "unknown": "not known",
}
# What a task vector is thinned to where a method thins it; the rest of the parameters keep their defaults.
_DENSITIES = {"breadcrumbs": 0.9, "breadcrumbs_ties": 0.9}
_DENSITY = 0.5
_HALFWAY = 0.5


@dataclass(frozen=True)
class Proposal:
    """A recipe to begin with. `own`: parameters of each model; `shared`: of all. `left_out`: models and why.

    `doubts`: what is not certain. `facts`: what was found and is certain. `text`: the recipe as YAML with comments.
    `decisions`: those of its plan. `nbytes`: what is to be downloaded for it.
    """

    method: Method
    common: Common
    base: Member | None
    models: tuple[Member, ...]
    left_out: tuple[tuple[Member, str], ...]
    facts: tuple[str, ...]
    doubts: tuple[str, ...]
    own: Mapping[str, Any]
    shared: Mapping[str, Any]
    dtype: str | None
    tokenizer_source: str | None = None
    missing: Literal["error", "base"] = "error"
    text: str = ""
    decisions: tuple[str, ...] = field(default=(), repr=False)
    nbytes: int = 0

    @property
    def first(self) -> Member:
        """The model that gives config and tokenizer."""
        return self.base or self.models[0]

    def data(self) -> dict[str, Any]:
        """The proposal as plain data."""
        used = {"tokenizer_source": self.tokenizer_source, "missing": self.missing, "dtype": self.dtype}
        return {
            "method": self.method.name,
            "base": {
                "name": self.base.name if self.base else None, "model": self.base.written if self.base else None,
                "confidence": self.common.confidence, "certainty": CERTAINTY[self.common.confidence],
                "reasons": list(self.common.reasons),
            },
            "models": [{"name": member.name, "model": member.written} for member in self.models],
            "left_out": [{"name": member.name, "reason": reason} for member, reason in self.left_out],
            "parameters": {"own": dict(self.own), "shared": dict(self.shared)},
            "settings": used, "found": list(self.facts), "doubts": list(self.doubts),
            "decisions": list(self.decisions), "download_bytes": self.nbytes, "recipe": self.text,
        }  # fmt: skip


def propose(
    members: Sequence[Member], base: Member | None, common: Common, kinship: Kinship | None = None,
    method: str | None = None, notes: Sequence[str] = (),
) -> Proposal:  # fmt: skip
    """Decide base, models, method and parameters. `kinship`: of the base, if there is one, and then the other members.

    Raises MismatchError where fewer models are left than can be merged, RecipeError where the method does not fit.
    """
    experts = [member for member in members if base is None or member.key != base.key]
    reference = base or _most_like(experts)
    odd = {member.key: reason for member in experts if (reason := _objection(reference, member))}
    if base is not None and experts and len(odd) == len(experts):
        raise MismatchError(f"none of the models fits the base {base.name}: " + "; ".join(odd.values()))
    kept = tuple(member for member in experts if member.key not in odd)
    if len(kept) < (1 if base else 2):
        what = "; ".join(odd.values()) or f"{members[0].name} is the only one, and its base is not known: give --base"
        raise MismatchError(f"there are no two models to merge: {what}")
    chosen = _method(method, base)
    first, merged = _placed(chosen, base, kept)
    _check_number(chosen, first, merged)
    proposal = Proposal(
        method=chosen, common=common, base=first, models=merged,
        left_out=tuple((member, odd[member.key]) for member in experts if member.key in odd),
        facts=(), doubts=(*common.doubts, *notes), own={}, shared={}, dtype=None,
    )  # fmt: skip
    facts, doubts = _weighed(kinship, base, [*([base] if base else []), *experts], kept)
    own, shared = _parameters(chosen, len(merged), base is not None)
    return replace(
        proposal, own=own, shared=shared, dtype=_dtype(proposal), tokenizer_source=_vocabularies(proposal),
        facts=(_likeness(proposal), *facts), doubts=(*proposal.doubts, *doubts),
    )  # fmt: skip


# ---- what fits together


def _most_like(members: Sequence[Member]) -> Member:
    """The model that fits most of the others, the first of those."""
    return max(members, key=lambda one: sum(_objection(one, other) is None for other in members))


def _objection(first: Member, other: Member) -> str | None:
    """Why two models cannot be merged, as far as headers and configs tell; vocabularies may differ."""
    for member in (other, first):
        if member.config.get("quantization_config"):
            return f"{member.name} is quantised (its config.json says so): name the unquantised model"
        low = next((n for n, s in member.tensors.items() if s.dtype[0] == "F" and s.dtype not in MERGEABLE), None)
        if low:
            return f"{member.name} is quantised ({low} is {member.tensors[low].dtype}): name the unquantised model"
    kinds = first.config.get("model_type"), other.config.get("model_type")
    if kinds[0] != kinds[1]:
        return f"{other.name} is of another architecture: {kinds[1]!r}, {first.name} is {kinds[0]!r}"
    deep = [sorted(depths(member.config)) for member in (other, first)]
    if all(deep) and deep[0] != deep[1]:
        numbers = [" and ".join(map(str, numbers)) for numbers in deep]
        return f"{other.name} is of another depth than {first.name}: {numbers[0]} layers and {numbers[1]}"
    differing = [name for name in first.tensors if _shapes_differ(first, other, name)]
    if differing:
        name = differing[0]
        shapes = [list(member.tensors[name].shape) for member in (other, first)]
        many = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        return f"{other.name} has other shapes than {first.name}: {name}{many}, {shapes[0]} and {shapes[1]}"
    return None


def _shapes_differ(first: Member, other: Member, name: str) -> bool:
    """Whether a tensor has shapes that more or fewer tokens do not explain."""
    if name not in other.tensors:
        return False
    one, two = first.tensors[name].shape, other.tensors[name].shape
    return one != two and not (_is_table(first, name) and _is_table(other, name) and one[1:] == two[1:])


def _is_table(member: Member, name: str) -> bool:
    """Whether a tensor has a row for each token."""
    shape, tokens = member.tensors[name].shape, vocab_size(member.config)
    return bool(shape) and len(shape) <= 2 and tokens is not None and shape[0] >= tokens


def _vocabularies(proposal: Proposal) -> str | None:
    """The setting that differing vocabularies need: the union, which loses no token of any model."""
    first = proposal.first
    for member in proposal.models:
        rows = any(
            member.tensors[n].shape != spec.shape for n, spec in first.tensors.items() if n in member.tensors
        )  # fmt: skip
        if rows or compare(first.vocabulary, member.vocabulary).conflicting:
            return "union"
    return None


def _likeness(proposal: Proposal) -> str:
    """What the models have in common, in words."""
    first = proposal.first
    others = [member for member in proposal.models if member != first]
    compared = [compare(first.vocabulary, member.vocabulary) for member in others]
    tokens = "vocabularies differ" if _vocabularies(proposal) else "the same vocabulary"
    if not all(difference.compared for difference in compared):
        tokens = "tokenizers that cannot be compared"
    return f"one architecture ({first.config.get('model_type')}), the same shapes, {tokens}"


def missing_tensors(proposal: Proposal) -> list[str]:
    """Which tensors not all models have, in words."""
    first, said = proposal.first, []
    for member in (m for m in proposal.models if m != first):
        lacking, extra = first.tensors.keys() - member.tensors.keys(), member.tensors.keys() - first.tensors.keys()
        said += [f"{member.name} lacks {len(lacking)}: {few(lacking, 3)}"] if lacking else []
        said += [f"{first.name} lacks {len(extra)} of {member.name}: {few(extra, 3)}"] if extra else []
    return said


def _dtype(proposal: Proposal) -> str | None:
    """The first model's dtype where another one has a different one, so that the recipe says what comes out."""
    own = _dtypes(proposal.first)
    if len(own) != 1 or all(_dtypes(member) == own for member in proposal.models):
        return None
    return dtype_name(next(iter(own)))


def _dtypes(member: Member) -> set[str]:
    return {spec.dtype for spec in member.tensors.values() if spec.dtype in MERGEABLE}


def dtypes_said(members: Iterable[Member]) -> str:
    """The dtypes of models, in words."""
    said = {member.name: " and ".join(sorted(map(dtype_name, _dtypes(member)))) for member in members}
    kinds = list(dict.fromkeys(said.values()))
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{name} {kind}" for name, kind in said.items())


# ---- what the weights say


def _weighed(
    kinship: Kinship | None, base: Member | None, order: Sequence[Member], kept: Sequence[Member]
) -> tuple[list[str], list[str]]:
    """Facts and doubts from the sampled weights of `order`."""
    if kinship is None:
        return [], []
    facts, doubts = [], []
    places = {member.key: place for place, member in enumerate(order)}
    sizes = {m.name: kinship.distance(places[m.key], 0) for m in kept} if base else {}
    if sizes:
        listed = ", ".join(f"{name} {percent(size)}" for name, size in sizes.items())
        facts.append(f"distance from {order[0].name} in a sample of the weights, of its norm: {listed}")
        doubts += [f"{name} equals the base {order[0].name}" for name, size in sizes.items() if size == 0]
        far = [name for name, size in sizes.items() if size > FAR]
        if far and all(kinship.cosine(places[m.key], 0) >= UNRELATED for m in kept):
            doubts.append(f"{', '.join(far)}: further from the base than ordinary finetunes; try a smaller lambda")
    for at, one in enumerate(kept):
        others = [base] if base else kept[at + 1 :]
        for other in others:
            cosine = kinship.cosine(places[one.key], places[other.key])
            if cosine < UNRELATED:
                doubts.append(
                    f"{one.name} and {other.name} hardly have one origin: the cosine of their weights is {cosine:.2f}, "
                    "and merges of strangers rarely work"
                )
        twins = [o.name for o in kept[at + 1 :] if kinship.distance(places[one.key], places[o.key]) == 0]
        doubts += [f"{one.name} and {twin} have the same weights" for twin in twins]
    return facts, doubts


# ---- method and parameters


def _method(name: str | None, base: Member | None) -> Method:
    methods = registry()
    if name is None:
        return methods["task_arithmetic" if base else "linear"]
    if name not in methods:
        hint = nearest(name, methods)
        raise RecipeError(f"--method: there is no merge method {name!r}{hint}: see `ctl-merge methods`")
    found = methods[name]
    if found.statistic:
        raise RecipeError(
            f"--method: {name} measures each model on its own text, which only you can name: write the recipe with "
            "another method, then change `merge_method` and add `data` (see the README)"
        )
    if found.base == "required" and found.space == "task_vectors" and base is None:
        raise RecipeError(f"--method: {name} needs the base of the models, which is not known: give --base")
    return found


def _placed(
    method: Method, base: Member | None, experts: tuple[Member, ...]
) -> tuple[Member | None, tuple[Member, ...]]:
    """The recipe's base_model, and its models."""
    if method.space == "weights" and method.base == "required":  # one end of an arc, no origin
        return (base, experts) if base and len(experts) == 1 else (experts[0], experts[1:])
    return (None if method.space == "weights" else base), experts  # to an average, a base is one more model


def _check_number(method: Method, base: Member | None, models: Sequence[Member]) -> None:
    """Refuse a method that takes more models, or fewer. Raises RecipeError."""
    least, most = method.models
    number = len(models) + (method.space == "weights" and base is not None)
    if number < least or (most is not None and number > most):
        wanted = f"{least}" if least == most else f"at least {least}"
        beside = "" if method.space == "weights" else " besides the base"
        raise RecipeError(f"--method: {method.name} merges {wanted} model{'s' * (wanted != '1')}{beside}, not {number}")


def scale(number: int) -> float:
    """λ for a sum of task vectors: 1/√n leaves the sum of n that are equally long and orthogonal as long as one."""
    return _HALFWAY if number == 1 else round(1 / math.sqrt(number), 1)


def _parameters(method: Method, number: int, has_base: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of the parameters that are worth seeing: each model's, and shared ones. Raises RecipeError."""
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        if name == "weight":
            own[name] = 1.0
        elif name == "density":
            own[name] = _DENSITIES.get(method.name, _DENSITY)
        elif name == "lambda":
            summed = "normalize" in method.parameters and method.parameters["normalize"].default is False
            shared[name] = scale(number) if summed else parameter.default
        elif name == "t" and method.space == "weights":  # of an arc, no step
            shared[name] = _HALFWAY
        elif parameter.required:
            raise RecipeError(
                f"--method: {method.name} needs `{name}`, for which there is no sane value to begin with: write the "
                "recipe with another method, then change it"
            )
    return own, shared
