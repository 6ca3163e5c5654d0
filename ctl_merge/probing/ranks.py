"""Sequences shared by the ranks of a launcher, statistics gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

from ctl_merge.errors import DeviceError
from ctl_merge.probing.data import TokenSet
from ctl_merge.probing.observer import Observations, Rider, Subject
from ctl_merge.probing.run import Running, observe
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

    return gather(observe(subject, riders, share(sets, ranks), running, told_of_all), ranks)


def share(sets: Sequence[TokenSet], ranks: Ranks) -> list[TokenSet]:
    """This rank's consecutive part of every set's sequences."""
    found = []
    for tokens in sets:
        bounds = [len(tokens.ids) * r // ranks.count for r in (ranks.index, ranks.index + 1)]
        if bounds[0] == bounds[1]:
            raise DeviceError(f"{tokens.name} has {len(tokens.ids)} sequences, too few for {ranks.count} processes")
        part = slice(*bounds)
        first = tokens.ids[:1] if bounds[0] else None
        found.append(replace(tokens, ids=tokens.ids[part], strata=tokens.strata[part], first=first))
    return found


def gather(observed: Mapping[str, Observations], ranks: Ranks) -> dict[str, Observations]:
    """All ranks' observations, in the order of the sequences: the same on every rank."""
    parts = ranks.gather(dict(observed))
    return {name: _joined([part[name] for part in parts]) for name in observed}


def _joined(parts: list[Observations]) -> Observations:
    first, *others = parts
    for other in others:
        first.grams.tokens += other.grams.tokens
        for site, grams in first.grams.sites.items():
            for name in ("gram", "robust", "cosines", "tokens"):
                getattr(grams, name).extend(getattr(other.grams.sites[site], name))
        if first.losses and other.losses:
            first.losses.tokens += other.losses.tokens
            for each in fields(first.losses):
                table, more = getattr(first.losses, each.name), getattr(other.losses, each.name)
                if isinstance(table, dict):
                    for key in table:
                        table[key] += more[key]
    return first
