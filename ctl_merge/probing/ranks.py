"""Sequences shared by the ranks of a launcher, statistics gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

from ctl_merge.probing.data import TokenSet
from ctl_merge.probing.observer import Observations, Rider, Subject
from ctl_merge.probing.run import Running, batch_size, observe
from ctl_merge.processes import Ranks


def observed(
    subject: Subject, riders: Sequence[Rider], sets: Sequence[TokenSet], running: Running,
    told: Callable[[int], object], ranks: Ranks,
) -> dict[str, Observations]:  # fmt: skip
    """What `observe` finds, the sequences shared by all ranks."""
    if ranks.count == 1:
        return observe(subject, riders, sets, running, told)

    def told_of_all(count: int) -> None:
        told(count * ranks.count)

    return gather(observe(subject, riders, share(sets, running.batch, ranks), running, told_of_all), ranks)


def share(sets: Sequence[TokenSet], batch: int, ranks: Ranks) -> list[TokenSet]:
    """This rank's consecutive part of every set's sequences: whole batches, as a sum depends on a batch's size.

    Sets of which nothing is left for this rank are not among them.
    """
    found = []
    for tokens in sets:
        size = batch_size(tokens, batch)
        batches = -(-len(tokens.ids) // size)
        bounds = [size * -(-batches * r // ranks.count) for r in (ranks.index, ranks.index + 1)]
        part = slice(*bounds)
        if not len(tokens.ids[part]):
            continue
        first = tokens.ids[:1] if bounds[0] else None
        found.append(replace(tokens, ids=tokens.ids[part], strata=tokens.strata[part], first=first))
    return found


def gather(observed: Mapping[str, Observations], ranks: Ranks) -> dict[str, Observations]:
    """All ranks' observations, in the order of the sequences: the same on every rank."""
    parts = ranks.gather(dict(observed))  # the first rank has a part of every set
    return {name: _joined([part[name] for part in parts if name in part]) for name in parts[0]}


def _joined(parts: list[Observations]) -> Observations:
    first, *others = parts
    for other in others:
        first.grams.tokens += other.grams.tokens
        for site, grams in first.grams.sites.items():
            for name in ("gram", "robust", "cosines", "tokens"):
                getattr(grams, name).extend(getattr(other.grams.sites[site], name))
        first.feature_bytes = max(first.feature_bytes, other.feature_bytes)
        first.logit_bytes = max(first.logit_bytes, other.logit_bytes)
        if first.losses and other.losses:
            first.losses.tokens += other.losses.tokens
            for each in fields(first.losses):
                table, more = getattr(first.losses, each.name), getattr(other.losses, each.name)
                if isinstance(table, dict):
                    for key in table:
                        table[key] += more[key]
    return first
