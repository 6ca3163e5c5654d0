"""Windows of a data set: to tune on, to validate, to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ctl_merge.errors import DataError
from ctl_merge.evaluating.passages import Passage, of_windows
from ctl_merge.probing.data import TokenSet

_LEAST = 2  # windows of a part: an interval needs as many


@dataclass(frozen=True)
class Splits:
    """The windows of each data set in three parts; `said` tells in words which is which."""

    tuning: Mapping[str, list[Passage]]
    validation: Mapping[str, list[Passage]]
    held_out: Mapping[str, list[Passage]]
    tokens: Mapping[str, TokenSet]  # those to tune on, as the probe runs over them
    compared: Mapping[str, TokenSet]  # those held out
    said: str


def split(sets: Sequence[TokenSet], held_out: Sequence[TokenSet], seed: int) -> Splits:
    """Consecutive parts of each data set's windows, which `seed` turns round: neighbours stay together.

    Raises DataError where a part would be too small, or the held-out data sets are not those that are tuned on.
    """
    names, others = [tokens.name for tokens in sets], {tokens.name: tokens for tokens in held_out}
    if others and set(others) != set(names):
        raise DataError(
            f"held-out data is given for {', '.join(others)}, and tuned is on {', '.join(names)}: same names"
        )
    tuning: dict[str, TokenSet] = {}
    validation: dict[str, list[Passage]] = {}
    compared: dict[str, TokenSet] = {}
    for tokens in sets:
        count = len(tokens.ids)
        turned = _turned(tokens, seed * 7919 % count if seed else 0)
        ends = (3 * count // 4, count) if others else (3 * count // 8, count // 2)
        parts = [slice(0, ends[0]), slice(*ends), slice(ends[1], count)]
        if min(p.stop - p.start for p in parts[: 2 if others else 3]) < _LEAST:
            raise DataError(
                f"{tokens.name}: {count} windows are too few to tune on, validate and compare: use a smaller --length"
            )
        tuning[tokens.name] = _part(turned, parts[0])
        validation[tokens.name] = of_windows(_part(turned, parts[1]))
        compared[tokens.name] = others.get(tokens.name) or _part(turned, parts[2])
    sizes = ", ".join(
        f"{name} {len(tuning[name].ids)} + {len(validation[name])} + {len(compared[name].ids)}" for name in names
    )
    length = sets[0].ids.shape[1]
    said = f"windows of {length} tokens to tune on + to validate + held out: {sizes} (seed {seed})"
    tuned, held = ({n: of_windows(t) for n, t in part.items()} for part in (tuning, compared))
    return Splits(tuned, validation, held, tuning, compared, said)


def _turned(tokens: TokenSet, by: int) -> TokenSet:
    return replace(tokens, ids=tokens.ids.roll(-by, 0), strata=tokens.strata.roll(-by, 0))


def _part(tokens: TokenSet, part: slice) -> TokenSet:
    return replace(tokens, ids=tokens.ids[part], strata=tokens.strata[part])
