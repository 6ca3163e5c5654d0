"""A proposed recipe as YAML, with its reasons as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

import ctl_merge
from ctl_merge.family import Member
from ctl_merge.fitting import dtypes_said, missing_tensors
from ctl_merge.proposal import CERTAINTY, Proposal
from ctl_merge.recipe_schema import RecipeSchema

_WIDTH = 100

_WHY = {
    "task_arithmetic": "base + lambda × the sum of the task vectors (model - base). With one tuned lambda it is what "
    "other methods have to beat on language models.",
    "linear": "The weighted average. Without a base there are no task vectors; with one, task_arithmetic is the better "
    "start. For two models, slerp is the other usual choice.",
}
_MEANING = {
    "weight": "how much of each model goes in",
    "density": "the share of each task vector that is kept",
    "lambda": "the scale of the sum of task vectors: the one parameter worth tuning, on held-out text (try 0.3 to 1.0)",
    "t": "0 is base_model, 1 the other",
}


def render(proposal: Proposal, file: str) -> str:
    """The recipe; `file` is what its first lines call it."""
    what = f"{proposal.method.name} of {_number(proposal.models)}"
    lines = [
        f"# {what}, proposed by ctl-merge {ctl_merge.__version__}.",
        "#",
        f"#   ctl-merge {file} --dry-run     the plan and its cost, from headers alone",
        f"#   ctl-merge {file} -o merged     the merge",
        "#",
        *_origin(proposal),
        *_listed("Not certain:", proposal.doubts),
        "",
        *_comment(_WHY.get(proposal.method.name, proposal.method.summary)),
        f"merge_method: {proposal.method.name}",
        *_model("base_model: ", proposal.base, proposal),
        "models:",
        *(line for member in proposal.models for line in _source(member, proposal)),
        *(line for member, why in proposal.left_out for line in _left_out(member, why)),
        *_shared(proposal.shared),
        *_settings(proposal),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _number(models: tuple[Member, ...]) -> str:
    return f"{len(models)} model{'s' if len(models) > 1 else ''}"


def _origin(proposal: Proposal) -> list[str]:
    common, base = proposal.common, proposal.base
    title = "Base: " + CERTAINTY[common.confidence]
    if base is None and common.base is not None:
        title += f"; {proposal.method.name} does not use it"
    return [*_listed(title, common.reasons), *_listed("Found:", proposal.facts)]


def _listed(title: str, lines: tuple[str, ...]) -> list[str]:
    if not lines and title.endswith(":"):
        return []
    return [*_comment(title), *(line for text in lines for line in _comment(text, "#   ", "  "))]


def _source(member: Member, proposal: Proposal) -> Iterator[str]:
    yield from _model("  - model: ", member, proposal)
    if proposal.own:
        yield f"    parameters: {_flow(proposal.own)}"


def _model(key: str, member: Member | None, proposal: Proposal) -> Iterator[str]:
    if member is not None:
        branch = f" # the commit that {_clean(member.branch)} is now" if member.branch else ""
        yield f"{key}{_scalar(member.written)}{branch}"


def _left_out(member: Member, why: str) -> Iterator[str]:
    yield from _comment(f"Left out: {why}", "  # ")
    yield f"  # - model: {_scalar(member.written)}"


def _shared(shared: Mapping[str, Any]) -> Iterator[str]:
    if shared:
        yield "parameters:"
        for name, value in shared.items():
            if name in _MEANING:
                yield from _comment(_MEANING[name], "  # ")
            yield f"  {name}: {_scalar(value)}"


def _settings(proposal: Proposal) -> Iterator[str]:
    first = proposal.first
    dtypes = dtypes_said((first, *proposal.others))
    if proposal.dtype:
        yield from _comment(f"The models' differ ({dtypes}): {first.name}'s is kept.")
        yield f"dtype: {proposal.dtype}"
    else:
        yield from _comment(f"dtype: not set, each tensor keeps its own ({dtypes}).")
    if proposal.tokenizer_source:
        what = {
            "union": "all tokens of all models; `base` would keep only those of the first",
            "base": f"those of {first.name} are kept; tokens that only others have are left out",
        }[proposal.tokenizer_source]
        yield from _comment(f"The vocabularies differ: {what}.")
        yield f"tokenizer_source: {proposal.tokenizer_source}"
    if proposal.missing != "error":
        listed = "; ".join(missing_tensors(first, proposal.others))
        yield from _comment(
            f"Not all models have the same tensors ({listed}): {first.name}'s stand in for what others lack, and what "
            "it lacks is left out. Without this line the recipe is refused."
        )
        yield f"missing: {proposal.missing}"
    if "output" in RecipeSchema.model_fields and all(member.adapted for member in proposal.models):
        yield from _comment("All models are adapters: the result can be one, too.")
        yield "# output: {lora: {rank: 16}}"


def _comment(text: str, begin: str = "# ", after: str = "") -> list[str]:
    """Lines of comment, whatever is in the text."""
    return textwrap.wrap(
        _clean(text), _WIDTH, initial_indent=begin, subsequent_indent=begin + after, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _clean(text: str) -> str:
    """One line of what may be printed: names in cards are anybody's."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").removesuffix("\n")


def _flow(values: Mapping[str, Any]) -> str:
    return _scalar(dict(values))
