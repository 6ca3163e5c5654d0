"""Which models fit together, by headers, configs and tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ctl_merge.correspondence import few
from ctl_merge.family import Member
from ctl_merge.header import MERGEABLE, dtype_name
from ctl_merge.layers import depths
from ctl_merge.model_config import vocab_size
from ctl_merge.tokenizer import compare


def most_like(members: Sequence[Member]) -> Member:
    """The model that fits most of the others, the first of those."""
    return max(members, key=lambda one: sum(objection(one, other) is None for other in members))


def objection(first: Member, other: Member) -> str | None:
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


def vocabularies_differ(first: Member, others: Iterable[Member]) -> bool:
    """Whether the recipe has to say whose tokens there are: other numbers of rows, or other tokens."""
    return any(
        compare(first.vocabulary, other.vocabulary).conflicting
        or any(other.tensors[n].shape != spec.shape for n, spec in first.tensors.items() if n in other.tensors)
        for other in others
    )


def likeness(first: Member, others: Sequence[Member]) -> str:
    """What the models have in common, in words."""
    tokens = "vocabularies differ" if vocabularies_differ(first, others) else "the same vocabulary"
    if not all(compare(first.vocabulary, other.vocabulary).compared for other in others):
        tokens = "tokenizers that cannot be compared"
    return f"one architecture ({first.config.get('model_type')}), the same shapes, {tokens}"


def missing_tensors(first: Member, others: Iterable[Member]) -> list[str]:
    """Which tensors not all models have, in words."""
    said = []
    for other in others:
        lacking, extra = first.tensors.keys() - other.tensors.keys(), other.tensors.keys() - first.tensors.keys()
        said += [f"{other.name} lacks {len(lacking)}: {few(lacking, 3)}"] if lacking else []
        said += [f"{first.name} lacks {len(extra)} of {other.name}: {few(extra, 3)}"] if extra else []
    return said


def dtype_to_keep(first: Member, others: Iterable[Member]) -> str | None:
    """The first model's dtype where another one has a different one, so that the recipe says what comes out."""
    own = _dtypes(first)
    if len(own) != 1 or all(_dtypes(other) == own for other in others):
        return None
    return dtype_name(next(iter(own)))


def _dtypes(member: Member) -> set[str]:
    return {spec.dtype for spec in member.tensors.values() if spec.dtype in MERGEABLE}


def dtypes_said(members: Iterable[Member]) -> str:
    """The dtypes of models, in words."""
    said = {member.name: " and ".join(sorted(map(dtype_name, _dtypes(member)))) for member in members}
    kinds = list(dict.fromkeys(said.values()))
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{name} {kind}" for name, kind in said.items())
