"""Which base models have in common, by what they state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Confidence = Literal["given", "stated", "stated by some", "by weights", "unknown"]


@dataclass(frozen=True)
class Statement:
    """That a model was made from `parent`. `source`: which of its files says so. `firm`: that is what it is for."""

    parent: str
    source: str
    firm: bool = True


@dataclass(frozen=True)
class Common:
    """The base, how sure that is, and why; None where it is not known."""

    base: str | None
    confidence: Confidence
    reasons: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


Pedigree = Mapping[str, Sequence[Statement]]


def common_base(models: Sequence[str], stated: Pedigree, names: Mapping[str, str]) -> Common:
    """The nearest model that all others which state a parent come from; it may be one of them.

    `models` and parents are identifiers, `names` what messages call them. A model that states nothing contradicts
    nothing.
    """
    lines = {model: _ancestors(model, stated) for model in models}
    speaking = [model for model in models if len(lines[model]) > 1]
    if not speaking:
        return Common(None, "unknown", ("no card and no config names a base",))
    shared = [node for node in lines[speaking[0]] if all(node in lines[model] for model in speaking)]
    shared = [node for node in shared if any(model != node for model in speaking)]
    told = tuple(f"{names[model]}: {_chain(model, lines[model], shared, names)}" for model in speaking)
    if not shared:
        return Common(None, "unknown", told, ("what the models state of their origin leads to no common base",))
    base = min(shared, key=lambda node: (max(len(lines[m][node]) for m in speaking), len(lines[speaking[0]][node])))
    told = tuple(f"{names[m]}: {_chain(m, lines[m], [base], names)}" for m in speaking if m != base)
    silent = [model for model in models if model not in speaking and model != base]
    traces = [m for m in speaking if not all(step.firm for step in lines[m][base])]
    doubts = [f"{names[model]} does not say what it was trained from" for model in silent]
    doubts += [f"{names[model]}: config.json is no more than a trace of its origin" for model in traces]
    return Common(base, "stated by some" if doubts else "stated", told, tuple(doubts))


def _ancestors(model: str, stated: Pedigree) -> dict[str, tuple[Statement, ...]]:
    """Every model that this one comes from, itself first, with the statements that lead there: nearest first."""
    found: dict[str, tuple[Statement, ...]] = {model: ()}
    pending = [model]
    for node in pending:
        for statement in stated.get(node, ()):
            if statement.parent not in found:
                found[statement.parent] = (*found[node], statement)
                pending.append(statement.parent)
    return found


def _chain(model: str, line: Mapping[str, tuple[Statement, ...]], ends: Sequence[str], names: Mapping[str, str]) -> str:
    """The statements from a model to one of the ends, or all the way, in words."""
    steps = next((line[end] for end in ends if line.get(end)), None) or list(line.values())[-1]
    told = [f"{step.source} names {names[step.parent]}" for step in steps]
    return ", whose ".join([f"its {told[0]}", *told[1:]]) if told else "itself"
