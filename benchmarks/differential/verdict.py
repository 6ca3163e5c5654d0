"""One configuration through both tools and the definition, and what is to be said of it.

Three things are judged. Ours is the definition, rounded once. Ours is never further from it than mergekit is.
mergekit, told to compute in float32, agrees with it to float32 rounding, but for entries that a reason covers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from differential.cases import Case
from differential.families import TORCH
from differential.methods import METHODS
from differential.reasons import WRITES_FLOAT32, explained
from differential.reference import Array, Wanted, as_float64, defined, dtype_of, wanted
from differential.tools import Mergekit, Ours, Outcome

BITS = {"float32": (23, -126), "bfloat16": (7, -126), "float16": (10, -14)}
# An exact result rounded to 16 bits by way of float32 may be 2⁻¹³ of a unit further away than the nearest number.
HALF = 0.501
MEAN_SLACK = 1e-4  # units in the last place that ours may be further away in the mean: what that double rounding costs
EXACT, SINGLE = 2.0**-45, 2.0**-21


@dataclass(frozen=True)
class Errors:
    """Distance to the definition over all entries of a case, in units in the last place of the output's dtype.

    The unit is that of the largest of result and inputs. `relative`: ‖found - wanted‖ / ‖wanted‖; `exact`: the share
    of entries that are the definition rounded once. Where the definition lies halfway between two numbers, up to its
    own float64 rounding, both are.
    """

    largest: float
    mean: float
    relative: float
    exact: float


@dataclass
class Result:
    """What came of a case. `failures`: what nothing explains; `reasons`: entries by the reason why they differ."""

    case: Case
    dtype: str
    entries: int = 0
    ours: Errors | None = None
    theirs: Errors | None = None
    single: Errors | None = None  # mergekit with `dtype: float32`
    apart: int = 0  # entries that a reason covers: they differ by rule, or by a vote; left out of the errors
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    widened: bool = False  # mergekit wrote float32 where another dtype was asked for


def unit(values: Array, dtype: str) -> Array:
    """The unit in the last place at each value."""
    bits, least = BITS[dtype]
    return np.ldexp(1.0, np.maximum(np.frexp(values)[1] - 1, least) - bits)


def round_once(values: Array, dtype: str) -> Array:
    """The nearest numbers of the dtype, halfway cases to even."""
    step = unit(values, dtype)
    return np.rint(values / step) * step


def judge(case: Case, ours: Ours, mergekit: Mergekit | None) -> Result:
    """Run a case through the tools. Without mergekit ours is compared with the definition alone."""
    result = Result(case, dtype_of(case))
    text = case.text()
    own = ours.run(text)
    if mergekit is None:
        _refusals(result, own, None)
    else:
        seed = case.number if METHODS[case.method].random else None
        theirs = mergekit.run(text, seed)
        single = mergekit.run(case.text(dtype="float32", out_dtype=result.dtype), seed)
        theirs, single = theirs.in_order_of(own), single.in_order_of(own)
        _refusals(result, own, theirs)
    if result.failures:
        return result
    tensors = list(wanted(case))
    _same_tensors(result, own, tensors, "ctl-merge")
    if mergekit is not None:
        theirs = _as_asked(result, theirs)
        _same_tensors(result, theirs, tensors, "mergekit")
    if result.failures:
        return result
    result.entries = sum(tensor.models[0].size for tensor in tensors)
    if defined(case.method):
        alone = mergekit is None
        apart = [_covered(case.method, tensor, EXACT if alone else SINGLE, ours=alone) for tensor in tensors]
        result.apart = sum(int(where.sum()) for where in apart)
        result.ours = _errors(result.dtype, own, tensors, apart)
        _check_ours(result, own, tensors)
    if mergekit is not None and not METHODS[case.method].random:
        _check_theirs(result, own, single, tensors)
        if result.ours is not None:
            result.theirs, result.single = (_errors(result.dtype, found, tensors, apart) for found in (theirs, single))
            _check_nearer(result, result.ours, result.theirs)
    return result


def _covered(method: str, tensor: Wanted, rounding: float, ours: bool = False) -> NDArray[np.bool_]:
    masks = list(explained(method, tensor, rounding, ours).values())
    return np.any(masks, axis=0) if masks else np.zeros(tensor.models.shape[1:], dtype=bool)


def _refusals(result: Result, own: Outcome, theirs: Outcome | None) -> None:
    if own.error and theirs and theirs.error:
        result.failures.append(f"both refuse: {_first(own.error)} / {_first(theirs.error)}")
    elif own.error:
        result.failures.append(f"ctl-merge refuses: {_first(own.error)}")
    elif theirs and theirs.error:
        result.failures.append(f"mergekit refuses: {_first(theirs.error)}")


def _first(message: str) -> str:
    return " ".join(message.split())[:200]


def _same_tensors(result: Result, found: Outcome, tensors: Sequence[Wanted], name: str) -> None:
    expected = {tensor.job.name: tensor.models.shape[1:] for tensor in tensors}
    shapes = {tensor: tuple(value.shape) for tensor, value in found.tensors.items()}
    differing = sorted(n for n in expected.keys() | shapes.keys() if expected.get(n) != shapes.get(n))
    if differing:
        result.failures.append(f"{name} writes other tensors: {', '.join(differing[:3])}")
    kinds = {str(value.dtype).removeprefix("torch.") for value in found.tensors.values()}
    if kinds != {result.dtype}:
        result.failures.append(f"{name} writes {', '.join(sorted(kinds))}, not {result.dtype}")


def _as_asked(result: Result, theirs: Outcome) -> Outcome:
    """mergekit's tensors in the output's dtype where it is known to write another one."""
    kinds = {tensor.dtype for tensor in theirs.tensors.values()}
    result.widened = result.case.method in WRITES_FLOAT32 and kinds == {torch.float32} and result.dtype != "float32"
    if not result.widened:
        return theirs
    return replace(theirs, tensors={n: t.to(TORCH[result.dtype]) for n, t in theirs.tensors.items()})


def _errors(
    dtype: str, found: Outcome, tensors: Sequence[Wanted], apart: Sequence[NDArray[np.bool_]]
) -> Errors:  # fmt: skip
    distances, squares, norms, exact = [np.zeros(1)], 0.0, 0.0, 0
    for tensor, left_out in zip(tensors, apart, strict=True):
        assert tensor.value is not None
        value, got = tensor.value[~left_out], as_float64(found.tensors[tensor.job.name])[~left_out]
        distance = _distance(found, tensor, tensor.value)[~left_out]
        distances.append(distance / unit(_largest(tensor), dtype)[~left_out])
        squares += float((distance**2).sum())
        norms += float((value**2).sum())
        blur = EXACT * _scale(tensor, tensor.value)[~left_out]
        exact += int(((got == round_once(value - blur, dtype)) | (got == round_once(value + blur, dtype))).sum())
    every = np.concatenate(distances)
    count = every.size - 1
    relative = (squares / norms) ** 0.5 if norms else squares
    return Errors(float(every.max()), float(every.sum() / max(count, 1)), relative, exact / max(count, 1))


def _largest(tensor: Wanted) -> Array:
    largest = np.abs(tensor.operands).max(0)
    return largest if tensor.value is None else np.maximum(largest, np.abs(tensor.value))


def _check_ours(result: Result, own: Outcome, tensors: Sequence[Wanted]) -> None:
    """Every entry is the definition rounded, but where even float64 cannot tell what the definition gives."""
    wrong = {}
    for tensor in tensors:
        value, left_out = tensor.value, _covered(result.case.method, tensor, EXACT, ours=True)
        assert value is not None
        distance = _distance(own, tensor, value)
        beyond = (distance > HALF * unit(value, result.dtype) + EXACT * _scale(tensor, value)) & ~left_out
        wrong[tensor.job.name] = distance[beyond] / unit(_largest(tensor), result.dtype)[beyond]
    _add(result, "ctl-merge is not the definition", wrong, "units in the last place")


def _add(result: Result, what: str, wrong: Mapping[str, Array], units: str) -> None:
    """A failure that tells how many entries of which tensors are wrong, and by how much at worst."""
    found = {name: distances for name, distances in wrong.items() if distances.size}
    if found:
        count, worst = sum(d.size for d in found.values()), max(float(d.max()) for d in found.values())
        result.failures.append(
            f"{what}: {count} of {result.entries} entries in {len(found)} tensors such as {next(iter(found))}, "
            f"by {worst:.3g} {units}"
        )


def _distance(found: Outcome, tensor: Wanted, value: Array) -> Array:
    """|found - wanted|, NaN as far as can be."""
    return np.nan_to_num(np.abs(as_float64(found.tensors[tensor.job.name]) - value), nan=np.inf)


def _check_nearer(result: Result, ours: Errors, theirs: Errors) -> None:
    if ours.mean > theirs.mean + MEAN_SLACK:
        result.failures.append(f"ours is further: mean {ours.mean:.4g}, mergekit {theirs.mean:.4g}")
    if ours.largest > max(theirs.largest, HALF):
        result.failures.append(f"ours is further: largest {ours.largest:.4g}, mergekit {theirs.largest:.4g}")


def _check_theirs(result: Result, own: Outcome, single: Outcome, tensors: Sequence[Wanted]) -> None:
    """mergekit's float32 agrees up to rounding, but for entries that a reason covers."""
    wrong = {}
    for tensor in tensors:
        slack = _slack(result.case.method, tensor) * 2.0**-24
        mine = as_float64(own.tensors[tensor.job.name])
        value = mine if tensor.value is None else tensor.value
        distance = _distance(single, tensor, value)
        rounds = 1.0 if tensor.value is None else HALF  # without a definition both are rounded
        beyond = distance > rounds * unit(value, result.dtype) + slack * _scale(tensor, value)
        for text, where in explained(result.case.method, tensor, SINGLE).items():
            result.reasons[text] += int((beyond & where).sum())
            beyond &= ~where
        wrong[tensor.job.name] = distance[beyond] / _scale(tensor, value)[beyond] * 2**24
    _add(result, "mergekit in float32 is not the definition", wrong, "units of float32")


def _slack(method: str, tensor: Wanted) -> float:
    """How many units of float32 the method's arithmetic may be off in float32, where torch adds up norms in 32 bits."""
    spec, entries = METHODS[method], tensor.models[0].size
    found = spec.slack + (entries / 64 if spec.norms else 0.0)
    return found + 8 / _smallest_angle(tensor) if spec.arcs else found


def _smallest_angle(tensor: Wanted) -> float:
    """Between two inputs; float32 tells none below √2⁻²³ from zero."""
    flat = tensor.operands.reshape(len(tensor.operands), -1)
    units = flat / np.maximum(np.linalg.norm(flat, axis=1), 1e-300)[:, None]
    gaps = [float(np.linalg.norm(a - b)) for i, a in enumerate(units) for b in units[:i]]
    return max(min(gaps, default=1.0), 2.0**-11.5)


def _scale(tensor: Wanted, value: Array) -> Array:
    """The size of the numbers that go into each entry, enlarged where the method enlarges its task vectors."""
    inputs, change = np.abs(tensor.deltas).max(initial=0.0), value if tensor.base is None else value - tensor.base
    gain = max(1.0, float(np.abs(change).max(initial=0.0) / inputs)) if inputs > 0 else 1.0
    return gain * np.maximum(np.abs(tensor.operands).max(0), np.abs(value))
