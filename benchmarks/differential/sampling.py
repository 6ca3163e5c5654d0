"""Methods that draw random numbers, compared in distribution: the same configuration under many seeds of both tools.

Entry by entry, over S seeds of each tool: are the means equal (Welch's t, the largest against a Bonferroni bound; their
mean square against 1), are the variances (t over the tensors), and with one model, is the share of entries that are
kept the density (binomial)?
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import NormalDist
from typing import Any

import numpy as np

from differential.cases import Case, generate
from differential.families import Family
from differential.reference import Array, Wanted, as_float64, wanted
from differential.tools import Mergekit, Ours, Outcome

LEVEL = 0.01 / 60  # of one test: there are some sixty a method, and one run in a hundred is to be wrong by chance
# Fewer entries than this and mergekit's L1 rescaling is far from 1/density.
LARGE = 300
# Ours and mergekit's `rescale`. Dividing by the density and restoring the L1 norm have the same mean where all entries
# have one density; DELLA divides each by its own probability, and mergekit scales all entries alike.
_SAME: Sequence[tuple[Any, Any]] = ((False, False), ("l1", True))
_RESCALES = {"dare_linear": (*_SAME, (True, True)), "dare_ties": (*_SAME, (True, True))}


@dataclass
class Sampled:
    """One configuration under many seeds. `numbers`: the tests' statistics."""

    case: Case
    rescale: tuple[Any, Any]  # ours, mergekit's
    seeds: int
    numbers: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def sample(
    method: str, families: Sequence[Family], count: int, seeds: int, seed: int, ours: Ours, mergekit: Mergekit
) -> Iterator[Sampled]:  # fmt: skip
    """`count` configurations, each in every way of rescaling that both tools have and in the one that only ours has."""
    plain = [family for family in families if family.name == "tied-float32"]
    # Layers that are stacked twice have the same mask twice, and the tests take entries for independent: no slices.
    drawn_cases = (c for c in generate(method, 20 * count, plain, seed) if "models" in c.config)
    for number, case in enumerate(islice((c for c in drawn_cases if "density" in c.text()), count)):
        case = replace(case, config=_fixed(case, single=number == 0))
        first = seed + number * seeds
        drawn: dict[tuple[str, Any], Sequence[Outcome]] = {}
        for own, other in _RESCALES.get(method, _SAME):
            for tool, rescale in ((ours, own), (mergekit, other)):
                if (tool.name, rescale) not in drawn:
                    shared = {**(case.config.get("parameters") or {}), "rescale": rescale}
                    text = case.text(parameters=shared)
                    drawn[tool.name, rescale] = [tool.run(text, seed) for seed in range(first, first + seeds)]
            runs = Sampled(case, (own, other), seeds)
            _compare(runs, drawn[ours.name, own], drawn[mergekit.name, other])
            yield runs


def _fixed(case: Case, single: bool) -> dict[str, Any]:
    """The configuration in float32 and without `rescale`; `single`: one model besides the base, and no parameters."""
    config = {key: value for key, value in _without(case.config).items() if key not in ("dtype", "out_dtype")}
    if single:
        config["models"] = [{"model": "a", "parameters": {"weight": 1.0, "density": 0.4}}]
        config["parameters"] = {}
    return config


def _without(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(inner) for key, inner in value.items() if key != "rescale"}
    return [_without(item) for item in value] if isinstance(value, list) else value


def _compare(runs: Sampled, mine: Sequence[Outcome], theirs: Sequence[Outcome]) -> None:
    for name, outcomes in (("ctl-merge", mine), ("mergekit", theirs)):
        error = next((found.error for found in outcomes if found.error), None)
        if error:
            runs.failures.append(f"{name} refuses: {' '.join(error.split())[:200]}")
            return
    tensors = list(wanted(runs.case))
    samples = [[{n: as_float64(t) for n, t in found.tensors.items()} for found in drawn] for drawn in (mine, theirs)]
    # 1/density and the restored L1 norm are the same only where the tensor is large.
    fitting = [t for t in tensors if runs.rescale[0] is not True or t.models[0].size >= LARGE]
    _test_moments(runs, fitting, samples)
    if runs.rescale[0] is not True:
        _test_variances(runs, [t for t in tensors if t.models[0].size >= LARGE], samples)
    if len(tensors[0].job.inputs) == 1 and not runs.rescale[0]:
        _test_share(runs, tensors, samples)


def _stacked(tensors: Sequence[Wanted], drawn: Sequence[Mapping[str, Array]]) -> Array:
    """(seeds, entries)"""
    return np.concatenate([np.stack([found[t.job.name].ravel() for found in drawn]) for t in tensors], axis=1)


def _spread(tensors: Sequence[Wanted], samples: Sequence[Sequence[Mapping[str, Array]]]) -> tuple[Array, ...]:
    """Difference of the means, both variances, and where seeds move an entry at all: four of (entries,)."""
    first, second = (_stacked(tensors, drawn) for drawn in samples)
    scale = np.concatenate([np.abs(t.operands).max(0).ravel() for t in tensors])
    variances = first.var(0, ddof=1), second.var(0, ddof=1)
    return first.mean(0) - second.mean(0), *variances, sum(variances) > (1e-6 * scale) ** 2, scale


def _test_moments(
    runs: Sampled, tensors: Sequence[Wanted], samples: Sequence[Sequence[Mapping[str, Array]]]
) -> None:  # fmt: skip
    """Equal means: the largest t of all entries, and the mean square of all."""
    means, mine, theirs, moves, scale = _spread(tensors, samples)
    still = float((np.abs(means) / scale)[~moves].max(initial=0.0))
    if still > 1e-6:
        runs.failures.append(f"entries that no seed moves differ by {still:.2g} of their size")
    z = means[moves] / np.sqrt((mine + theirs)[moves] / runs.seeds)
    if not z.size:
        return
    freedom = 2 * (runs.seeds - 1)
    bound, largest = _student(LEVEL / z.size, freedom), float(np.abs(z).max())
    square = float((z**2).mean()) * (freedom - 2) / freedom
    runs.numbers |= {"entries": z.size, "largest z": largest, "bound": bound, "mean z²": square}
    if largest > bound:
        runs.failures.append(f"means differ: z {largest:.2f}, bound {bound:.2f}")
    if abs(square - 1) > 0.1:
        runs.failures.append(f"means differ: mean z² {square:.3f}, 1 if they are equal")


def _test_variances(
    runs: Sampled, tensors: Sequence[Wanted], samples: Sequence[Sequence[Mapping[str, Array]]]
) -> None:  # fmt: skip
    """Equal variances: t over the tensors, as entries of one tensor share the factor that restores its L1 norm."""
    found = []
    for tensor in tensors:
        _, mine, theirs, moves, _ = _spread([tensor], samples)
        if moves.any():
            found.append(float(((mine - theirs)[moves] / (mine + theirs)[moves]).mean()))
    if len(found) < 10:
        return
    t = float(np.mean(found) / (np.std(found, ddof=1) / math.sqrt(len(found))))
    runs.numbers["variance t"] = t
    if abs(t) > _student(LEVEL, len(found) - 1):
        runs.failures.append(f"variances differ: t {t:.2f} over {len(found)} tensors")


def _test_share(runs: Sampled, tensors: Sequence[Wanted], samples: Sequence[Sequence[Mapping[str, Array]]]) -> None:
    """With one model an entry is kept where the result is not the base."""
    for name, drawn in zip(("ours", "mergekit"), samples, strict=True):
        kept = total = expected = spread = 0.0
        for tensor in tensors:
            assert tensor.base is not None
            moved = tensor.models[0] != tensor.base
            share, density = int(moved.sum()) * runs.seeds, tensor.job.own["density"][0]
            kept += sum(int((found[tensor.job.name] != tensor.base)[moved].sum()) for found in drawn)
            total, expected = total + share, expected + share * density
            spread += share * density * (1 - density)
        z = (kept - expected) / math.sqrt(spread) if spread else 0.0
        runs.numbers |= {f"{name} share kept": kept / total, f"{name} share z": z, "density": expected / total}
        if abs(z) > _normal(LEVEL):
            runs.failures.append(
                f"{name} share kept is {kept / total:.5f} instead of {expected / total:.5f}: z {z:.1f}"
            )


def _normal(level: float) -> float:
    return NormalDist().inv_cdf(1 - level / 2)


def _student(level: float, freedom: int) -> float:
    """The two-sided bound of Student's t, by the first terms of its expansion around the normal one."""
    z = _normal(level)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
