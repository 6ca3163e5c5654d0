"""From the names of models to a recipe that plans."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ctl_merge.errors import CtlMergeError, MismatchError, OutputError
from ctl_merge.family import Family, Member
from ctl_merge.fitting import most_like, objection
from ctl_merge.kinship import Kinship, sample_kinship
from ctl_merge.pedigree import Common
from ctl_merge.plan import Plan, make_plan
from ctl_merge.proposal import Proposal, propose
from ctl_merge.proposal_text import render
from ctl_merge.recipe_file import parse_recipe


def propose_recipe(
    models: Sequence[str], base: str | None = None, *, method: str | None = None, path: str | Path = "recipe.yaml"
) -> Proposal:
    """A commented recipe (`.text`) that merges the models, planned from headers; nothing is written or downloaded.

    Models as a recipe names them. `path` is where the recipe is to lie: relative folders are seen from there. Raises a
    CtlMergeError where a model cannot be read, or no two can be merged.
    """
    path = Path(path)
    family = Family(path.parent)
    members = family.open_all(models)
    chosen, common, kinship = _base(family, members, base)
    proposal = propose(members, chosen, common, kinship, method, tuple(dict.fromkeys(family.notes)))
    return _planned(proposal, family, path)


def _base(family: Family, members: list[Member], given: str | None) -> tuple[Member | None, Common, Kinship | None]:
    """The base, how it is known, and how near the models are: of it, then of the others."""
    common = family.common_base(members)
    if given is not None:
        base: Member | None = family.open(given)
        assert base is not None
        contrary = common.base not in (None, base.key)
        doubts = [f"the models name {family.names[str(common.base)]} as their base"] if contrary else []
        common = Common(base.key, "given", common.reasons if common.base else (), tuple(doubts))
    else:
        base = _opened(family, members, common)
        if base is None:
            common = replace(common, base=None, confidence="unknown")
    kinship = _sampled(family, base, members)
    if base is None and common.confidence == "unknown" and kinship:
        by_key = {member.key: member for member in members}
        nearest = by_key[kinship.keys[kinship.nearest()]]
        if kinship.centre() is not None:
            base = nearest
            reason = f"{base.name}: the others differ from it in directions of their own, from each other by more"
            return base, Common(base.key, "by weights", (*common.reasons, reason), common.doubts), kinship
        if len(kinship.keys) > 2:
            hint = f"if a model is the base of the others, {nearest.name} is the likeliest by its weights: give --base"
            common = replace(common, doubts=(*common.doubts, hint))
    return base, common, kinship


def _opened(family: Family, members: Sequence[Member], common: Common) -> Member | None:
    """The stated base; None, with a note of why, where it cannot be had or is not what they come from."""
    if common.base is None:
        return None
    name = family.names[common.base]
    try:
        base = next((m for m in members if m.key == common.base), None) or family.open_stated(common.base)
    except CtlMergeError as error:
        family.notes.append(f"the base {name} cannot be read, so the recipe has none: {error}")
        return None
    objections = [objection(base, member) for member in members if member.key != base.key]
    if objections and all(objections):
        family.notes.append(f"{name} is named as base, but does not fit, so the recipe has none: {objections[0]}")
        return None
    return base


def _sampled(family: Family, base: Member | None, members: Sequence[Member]) -> Kinship | None:
    """From weights that are here already, of the models that fit: nothing is downloaded for it."""
    reference = base or most_like(members)
    fitting = [reference, *(m for m in members if m.key != reference.key and objection(reference, m) is None)]
    checkpoints = {member.key: family.checkpoint(member) for member in fitting}
    try:
        if any(source.missing_bytes() for c in checkpoints.values() for source in c.sources().values()):
            return None
        for checkpoint in checkpoints.values():
            checkpoint.fetch()
        return sample_kinship(checkpoints)
    except CtlMergeError:  # weights that cannot be read are the merge's to report
        return None


def _planned(proposal: Proposal, family: Family, path: Path) -> Proposal:
    """The proposal as text of which the plan is made; models that none can be made with are left out."""
    try:
        return _first_planned(proposal, family, path)
    except MismatchError:
        odd = {}
        with_it = () if proposal.base else proposal.models[:1]
        for member in proposal.models[len(with_it) :]:
            try:
                _first_planned(replace(proposal, models=(*with_it, member)), family, path)
            except MismatchError as error:
                odd[member] = str(error)
        kept = tuple(member for member in proposal.models if member not in odd)
        if not odd or not kept or (proposal.base is None and len(kept) < 2):
            raise
        left_out = (*proposal.left_out, *((member, reason) for member, reason in odd.items()))
        return _first_planned(replace(proposal, models=kept, left_out=left_out), family, path)


def _first_planned(proposal: Proposal, family: Family, path: Path) -> Proposal:
    """The proposal with the first choice of vocabulary and missing tensors with which it plans."""
    refusals: list[CtlMergeError] = []
    for variant in _variants(proposal):
        recipe = parse_recipe(render(variant, os.fspath(path)), os.fspath(path), family.folder)
        try:
            plan = make_plan(recipe, {ref: family.checkpoints[ref] for ref in recipe.refs})
        except MismatchError as error:
            refusals.append(error)
            continue
        return _finished(variant, plan, family, os.fspath(path))
    raise refusals[0]


def _variants(proposal: Proposal) -> Iterator[Proposal]:
    sources = [None] if proposal.tokenizer_source is None else ["union", "base"]
    for missing in ("error", "base"):
        for source in sources:
            yield replace(proposal, tokenizer_source=source, missing=missing)


def _finished(proposal: Proposal, plan: Plan, family: Family, file: str) -> Proposal:
    """The proposal with what its plan has to say."""
    members = {member.key: member for member in (proposal.first, *proposal.models)}.values()
    sources = {ref: c for member in members for ref, c in family.checkpoint(member).sources().items()}
    nbytes = sum(source.missing_bytes() for source in sources.values())
    found = replace(proposal, doubts=(*proposal.doubts, *plan.warnings), decisions=plan.decisions, nbytes=nbytes)
    return replace(found, text=render(found, file))


def require_free(path: Path, overwrite: bool) -> None:
    """Refuse to write where something is, or nothing can be. Raises OutputError."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file for the recipe, such as -o {path / 'recipe.yaml'}")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists: choose another file with -o, or --overwrite to replace it")
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: no permission in {str(path.parent)!r}")


def write_recipe(proposal: Proposal, path: Path, overwrite: bool = False) -> None:
    """Write the recipe: whole, or not at all. Raises OutputError."""
    require_free(path, overwrite)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(proposal.text, "utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None
