"""Probing a recipe, a pair of models, or a merge that somebody else made."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.merging import Merge
from ctl_merge.probing.run import Subject
from ctl_merge.weights import task_grams

logger = logging.getLogger("ctl_merge")
MERGED = "merged"


def subject_of(merges: Mapping[str, Merge]) -> Subject:
    """Recipes over the same models, by name, as a subject: base, parents, merges and their weight-space Grams."""
    opened = next(iter(merges.values()))
    for merge in merges.values():
        merge.fetch()
    base_ref = opened.recipe.base or opened.recipe.refs[0]
    parents = [ref for ref in opened.recipe.refs if ref != opened.recipe.base]
    views = {_short(ref.text): opened.merged.parent(ref) for ref in parents}
    base: Checkpoint = opened.merged.parent(base_ref)
    checkpoints = {name: merge.merged for name, merge in merges.items()}
    return Subject(base, views, checkpoints, task_grams(base, list(views.values()), list(checkpoints.values())))


def _short(text: str) -> str:
    return text.rstrip("/").rpartition("/")[2]
