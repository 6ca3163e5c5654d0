"""Sequences to tune on, to validate, to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ctl_merge.deferred import torch
from ctl_merge.errors import DataError
from ctl_merge.evaluating.passages import Passage
from ctl_merge.probing.data import TokenSet, strata_of

Texts = Mapping[str, Sequence[Passage]]
_LEAST = 2  # sequences of a part: an interval needs as many


@dataclass(frozen=True)
class Splits:
    """The sequences of each data set in three parts; `said` tells in words which is which."""

    tuning: Texts
    validation: Texts
    held_out: Texts
    said: str


def split(texts: Texts, held_out: Texts, seed: int) -> Splits:
    """Consecutive parts of each data set's sequences, which `seed` turns round: neighbours stay together.

    Three eighths, an eighth and half; three quarters and a quarter where held-out data are given. Raises DataError
    where a part would be too small, or the held-out data sets are not those that are tuned on.
    """
    if held_out and set(held_out) != set(texts):
        raise DataError(
            f"held-out data is given for {', '.join(held_out)}, and tuned is on {', '.join(texts)}: give the same names"
        )
    parts: list[dict[str, Sequence[Passage]]] = [{}, {}, {}]
    for name, own in texts.items():
        count = len(own)
        by = seed * 7919 % count
        turned = [*own[by:], *own[:by]]
        first, second = (3 * count // 4, count) if held_out else (3 * count // 8, count // 2)
        found = [turned[:first], turned[first:second], held_out[name] if held_out else turned[second:]]
        if min(map(len, found)) < _LEAST:
            raise DataError(
                f"{name}: {count} sequences are too few to tune on, to validate and to compare: use a smaller --length"
            )
        for part, passages in zip(parts, found, strict=True):
            part[name] = passages
    sizes = ", ".join(f"{name} {' + '.join(str(len(part[name])) for part in parts)}" for name in texts)
    longest = max(len(passage.ids) for own in texts.values() for passage in own)
    said = f"sequences of up to {longest} tokens to tune on + to validate + held out: {sizes} (seed {seed})"
    return Splits(parts[0], parts[1], parts[2], said)


def windows(texts: Texts, tokenizer: Any, most: int | None = None) -> list[TokenSet]:
    """The sequences as a probe runs over them: of one length, their median; shorter ones are left out."""
    found = []
    for name, passages in texts.items():
        length = max(2, int(median(len(passage.ids) for passage in passages)))
        ids = torch.stack([passage.ids[:length] for passage in passages if len(passage.ids) >= length][:most])
        found.append(TokenSet(name, ids, strata_of(ids, tokenizer)))
    return found
