"""What to merge and how, proposed from what models are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ctl_merge.errors import MismatchError, RecipeError
from ctl_merge.family import Member
from ctl_merge.findings import FAR, UNRELATED, percent
from ctl_merge.fitting import dtype_to_keep, likeness, most_like, objection, vocabularies_differ
from ctl_merge.kinship import Kinship
from ctl_merge.methods import Method, registry
from ctl_merge.pedigree import Common
from ctl_merge.problems import nearest

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

    @property
    def others(self) -> tuple[Member, ...]:
        """The models besides the first."""
        return tuple(member for member in self.models if member is not self.first)

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
    """Decide base, models, method and parameters. `kinship`: of those that fit together, as far as weights are here.

    Raises MismatchError where fewer models are left than can be merged, RecipeError where the method does not fit.
    """
    experts = [member for member in members if base is None or member.key != base.key]
    reference = base or most_like(experts)
    odd = {member.key: reason for member in experts if (reason := objection(reference, member))}
    if base is not None and experts and len(odd) == len(experts):
        raise MismatchError(f"none of the models fits the base {base.name}: " + "; ".join(dict.fromkeys(odd.values())))
    kept = tuple(member for member in experts if member.key not in odd)
    if len(kept) < (1 if base else 2):
        alone = f"{members[0].name} is the only one, and its base is not known: give --base"
        reasons = list(dict.fromkeys(odd.values())) or [alone, *notes]
        raise MismatchError(f"there are no two models to merge: {'; '.join(reasons)}")
    chosen = _method(method, base)
    first, merged = _placed(chosen, base, kept)
    _check_number(chosen, first, merged)
    proposal = Proposal(
        method=chosen, common=common, base=first, models=merged,
        left_out=tuple((member, odd[member.key]) for member in experts if member.key in odd),
        facts=(), doubts=(*common.doubts, *notes), own={}, shared={}, dtype=None,
    )  # fmt: skip
    facts, doubts = _weighed(kinship, base, kept)
    own, shared = _parameters(chosen, len(merged), base is not None)
    return replace(
        proposal, own=own, shared=shared, dtype=dtype_to_keep(proposal.first, proposal.others),
        tokenizer_source="union" if vocabularies_differ(proposal.first, proposal.others) else None,  # loses no token
        facts=(likeness(proposal.first, proposal.others), *facts), doubts=(*proposal.doubts, *doubts),
    )  # fmt: skip


# ---- what the weights say


def _weighed(kinship: Kinship | None, base: Member | None, kept: Sequence[Member]) -> tuple[list[str], list[str]]:
    """Facts and doubts from the sampled weights."""
    if kinship is None:
        return [], []
    facts, doubts = [], []
    place = kinship.keys.index
    if base is not None:
        sizes = {member.name: kinship.distance(place(member.key), place(base.key)) for member in kept}
        listed = ", ".join(f"{name} {percent(size)}" for name, size in sizes.items())
        facts.append(f"distance from {base.name} in a sample of the weights, of its norm: {listed}")
        doubts += [f"{name} equals the base {base.name} in this sample" for name, size in sizes.items() if size == 0]
        far = [name for name, size in sizes.items() if size > FAR]
        if far and all(kinship.cosine(place(member.key), place(base.key)) >= UNRELATED for member in kept):
            doubts.append(f"{', '.join(far)}: further from the base than ordinary finetunes; try a smaller lambda")
    for at, one in enumerate(kept):
        for other in [base] if base else kept[at + 1 :]:
            cosine = kinship.cosine(place(one.key), place(other.key))
            if cosine < UNRELATED:
                doubts.append(
                    f"{one.name} and {other.name} hardly have one origin: the cosine of their weights is {cosine:.2f}, "
                    "and merges of strangers rarely work"
                )
        twins = [o.name for o in kept[at + 1 :] if kinship.distance(place(one.key), place(o.key)) == 0]
        doubts += [f"{one.name} and {twin} have the same weights in a sample" for twin in twins]
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
