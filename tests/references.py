"""What each merge method should give: definitions in float64 written from the papers, and the table the laws run over.

NumPy on whole tensors, one entry's arithmetic after the other as the paper says it, sharing no code with the package.
A method that is added to the registry needs one row in `ROWS`; `tests/test_laws.py` fails until it has one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import definitions_elementwise
import numpy as np
import torch
from checkpoints import recipe_text, write_checkpoint
from definitions import Array, Row, elect_and_merge, keep_largest, weighted
from definitions_evidence import MADE_UP, fisher_of, gram_of, has_gram
from definitions_evidence import ROWS as EVIDENCE
from definitions_wholetensor import ROWS as WHOLE_TENSOR

import ctl_merge
from ctl_merge.merged import MergedCheckpoint
from ctl_merge.methods import Method, registry

Tensors = Mapping[str, torch.Tensor]

# ---- definitions: (base or None, models (n, *shape), noise (n, *shape) or None, parameters) -> (*shape)


def linear(base: Array | None, models: Array, noise: Array | None, *, weight: Sequence[float], normalize: bool = True):
    """Model soups, arXiv 2203.05482: the weighted average."""
    return weighted(models, weight) / (sum(weight) if normalize else 1.0)


def passthrough(base: Array | None, models: Array, noise: Array | None, *, scale: Sequence[float] = (1.0,)) -> Array:
    """The one model, times a number."""
    return models[0] * scale[0]


def slerp(base: Array, models: Array, noise: Array | None, *, t: float) -> Array:
    """Shoemake 1985: the point at t on the arc from base to model; on the chord where they are almost parallel."""
    other = models[0]
    norms = np.sqrt((base**2).sum()) * np.sqrt((other**2).sum())
    cosine = (base * other).sum() / norms if norms > 0 else 0.0
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * other
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - t) * angle) * base + np.sin(t * angle) * other) / np.sin(angle)


def task_arithmetic(
    base: Array, models: Array, noise: Array | None, *, weight: Sequence[float], normalize: bool = False,
    lambda_: float = 1.0,
) -> Array:  # fmt: skip
    """arXiv 2212.04089: base plus the scaled sum of task vectors."""
    return base + lambda_ * weighted(models - base, weight) / (sum(weight) if normalize else 1.0)


def ties(
    base: Array, models: Array, noise: Array | None, *, weight: Sequence[float], density: Sequence[float],
    normalize: bool = True, rescale: bool = False, lambda_: float = 1.0, elect: str = "weighted",
    divide: str = "weights", trim: str = "",
) -> Array:  # fmt: skip
    """arXiv 2306.01708 on one vector: for `trim: model` call it on all tensors, flattened and concatenated."""
    kept = np.stack([keep_largest(delta, share) for delta, share in zip(models - base, density, strict=True)])
    if rescale:
        norms = [(np.abs(delta).sum(), np.abs(left).sum()) for delta, left in zip(models - base, kept, strict=True)]
        kept = np.stack([left * (b / a if a else 1.0) for left, (b, a) in zip(kept, norms, strict=True)])
    return base + lambda_ * elect_and_merge(kept, weight, elect, divide if normalize else "none")


def dare_linear(
    base: Array, models: Array, noise: Array, *, weight: Sequence[float], density: Sequence[float],
    normalize: bool = False, rescale: bool | str = True, lambda_: float = 1.0,
) -> Array:  # fmt: skip
    """arXiv 2311.03099: drop at random, divide by the share that is kept, add up."""
    kept = _drop(models - base, noise, density, rescale)
    return base + lambda_ * weighted(kept, weight) / (sum(weight) if normalize else 1.0)


def dare_ties(
    base: Array, models: Array, noise: Array, *, weight: Sequence[float], density: Sequence[float],
    normalize: bool = False, rescale: bool | str = True, lambda_: float = 1.0,
) -> Array:  # fmt: skip
    """arXiv 2311.03099 with the election of TIES instead of the sum."""
    kept = _drop(models - base, noise, density, rescale)
    return base + lambda_ * elect_and_merge(kept, weight, "weighted", "weights" if normalize else "none")


def _drop(deltas: Array, noise: Array, density: Sequence[float], rescale: bool | str) -> Array:
    found = []
    for delta, numbers, share in zip(deltas, noise, density, strict=True):
        kept = np.where(numbers < share, delta, 0.0)
        left = np.abs(kept).sum()
        if rescale == "l1":
            kept = kept * (np.abs(delta).sum() / left if left > 0 else 1.0)
        elif rescale and share > 0:
            kept = kept / share
        found.append(kept)
    return np.stack(found)


# ---- random numbers and rounding


def philox_uniform(seed: int, model: str, tensor: str, count: int) -> Array:
    """Philox4x64-10 (Salmon et al. 2011) in plain integers: 32-bit words of block 0, 1, ..., their upper 24 bits."""
    mask, digest = (1 << 64) - 1, hashlib.sha256("\0".join((str(seed), model, tensor)).encode()).digest()
    words: list[int] = []
    for block in range(-(-count // 8)):
        x = [block, 0, 0, 0]
        keys = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
        for _ in range(10):
            first, second = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
            x = [(second >> 64) ^ x[1] ^ keys[0], second & mask, (first >> 64) ^ x[3] ^ keys[1], first & mask]
            keys = [(keys[0] + 0x9E3779B97F4A7C15) & mask, (keys[1] + 0xBB67AE8584CAA73B) & mask]
        words += [half for word in x for half in (word & 0xFFFFFFFF, word >> 32)]
    return np.array([word >> 8 for word in words[:count]], dtype=np.float64) / 2**24


def round_once(values: Array, dtype: torch.dtype) -> Array:
    """The nearest number that `dtype` has, halfway cases to even, without a stop at float32 on the way."""
    bits, least = {torch.float32: (23, -126), torch.bfloat16: (7, -126), torch.float16: (10, -14)}[dtype]
    exponent = np.maximum(np.frexp(values)[1] - 1, least)
    unit = np.ldexp(1.0, exponent - bits)
    return np.rint(values / unit) * unit


# ---- the table


# Weights with few digits (0.5, 0.3, 0.2) make votes of exactly zero common, and sums halfway between two bfloat16
# numbers: there the last bit of the arithmetic decides. That has tests of its own.
_W = (0.5137, 0.2911, 0.1873)
_SIGNED = (0.6137, 0.5211, -0.2973)
_MASKED = {"weight": _SIGNED, "density": (0.5, 0.7, 1.0)}
_ELECTION = "the election adds only the copy whose ballot is positive: a model and its negation do not cancel"

ROWS: Mapping[str, Row] = {
    **definitions_elementwise.ROWS,
    **EVIDENCE,
    "linear": Row(
        linear,
        cases=({"weight": _W}, {"weight": (0.9137, -0.4211, 0.7373), "normalize": False}),
        average={"weight": (0.7, 0.4, 0.3)},
    ),
    "passthrough": Row(
        passthrough,
        cases=({}, {"scale": (0.7137,)}),
        average={"scale": (1.0,)},
        exempt={"cancel": "one model only", "zero weight": "one model only", "symmetric": "one model only"},
    ),
    "slerp": Row(
        slerp,
        cases=({"t": 0.3137}, {"t": 0.5}),
        average={"t": 0.3},
        exempt={
            "single": "two models; the ends of the arc have tests of their own",
            "cancel": "no weights",
            "zero weight": "no weights",
            "symmetric": "the base has a place of its own; exchanging both with 1 - t has a test of its own",
        },
    ),
    "task_arithmetic": Row(
        task_arithmetic,
        cases=(
            {"weight": _SIGNED, "lambda": 0.7},
            {"weight": (0.7, 0, 1), "normalize": True},
        ),
        average={"weight": (0.7, 0.4, 0.3), "normalize": True},
    ),
    "ties": Row(
        ties,
        cases=(
            {"weight": _W, "density": (0.5, 0.5, 0.5)},
            {"weight": _SIGNED, "density": (0.2, 0.7, 1.0), "lambda": 0.7},
            {"weight": (1, 1, 1), "density": (0.3, 0.3, 0.3), "elect": "unweighted", "divide": "count"},
            {"weight": _W, "density": (0.4, 0.6, 0.0), "elect": "count", "divide": "weights"},
            {"weight": _W, "density": (0.4, 0.6, 0.8), "elect": "count", "divide": "none"},
            {"weight": _W, "density": (0.5, 0.5, 0.5), "normalize": False},
            {"weight": _SIGNED, "density": (0.2, 0.7, 1.0), "rescale": True, "lambda": 0.7},
            {"weight": _W, "density": (0.3, 0.6, 1.0), "rescale": True, "trim": "model", "elect": "unweighted"},
        ),
        average={"weight": (0.7, 0.4, 0.3), "density": (1.0, 1.0, 1.0)},
        exempt={"cancel": _ELECTION},
    ),
    "dare_linear": Row(
        dare_linear,
        cases=(_MASKED, {**_MASKED, "rescale": "l1", "lambda": 0.7}, {**_MASKED, "rescale": False, "normalize": True}),
        average={"weight": (0.7, 0.4, 0.3), "density": (1.0, 1.0, 1.0), "normalize": True},
    ),
    "dare_ties": Row(
        dare_ties,
        cases=(_MASKED, {**_MASKED, "rescale": "l1", "lambda": 0.7}, {**_MASKED, "rescale": False, "normalize": True}),
        average={"weight": (0.7, 0.4, 0.3), "density": (1.0, 1.0, 1.0), "normalize": True},
        exempt={"cancel": _ELECTION},
    ),
    **WHOLE_TENSOR,
}


# The package's own methods: other tests and installed plugins may have registered more.
METHODS: Mapping[str, Method] = {
    name: method for name, method in registry().items() if method.function.__module__.startswith("ctl_merge.")
}


def cases() -> list[tuple[str, Mapping[str, Any]]]:
    """Every method with every one of its parameter sets."""
    return [(name, case) for name, row in ROWS.items() for case in row.cases]


# ---- the whole pipe


def draw_family(
    models: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, *,
    spread: float = 0.3, seed: int = 0,
) -> dict[str, dict[str, torch.Tensor]]:  # fmt: skip
    """Models that come from one base: `spread` is the size of their task vectors relative to the weights."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {
        model: {
            name: (tensor + spread * (model != "base") * torch.randn(tensor.shape, generator=generator)).to(dtype)
            for name, tensor in base.items()
        }
        for model in models
    }


def takes_base(method: Method) -> bool:
    """Whether the families here have a "base" for it: where it is optional, methods of task vectors are given one."""
    return method.base == "required" or (method.base == "optional" and method.space == "task_vectors")


def members(name: str, parameters: Mapping[str, Any]) -> list[str]:
    """The models of a family for these parameters: base, if the method takes one, and a, b, c."""
    method = METHODS[name]
    return ["base"] * takes_base(method) + list("abc"[: model_count(method, parameters)])


def model_count(method: Method, parameters: Mapping[str, Any]) -> int:
    """How many models besides a required base the parameters are for."""
    given = [len(value) for value in parameters.values() if isinstance(value, tuple)]
    return given[0] if given else (method.models[1] or 3) - (method.space == "weights" and method.base == "required")


def open_family(
    folder: Path, name: str, family: Mapping[str, Tensors], parameters: Mapping[str, Any], **keys: Any
) -> MergedCheckpoint:
    """Write the models of `family` into `folder` and open their merge."""
    return ctl_merge.open_merge(write_family(folder, name, family, parameters, **keys))


def write_family(
    folder: Path, name: str, family: Mapping[str, Tensors], parameters: Mapping[str, Any], *,
    order: Sequence[str] | None = None, shards: int = 1, **keys: Any,
) -> ctl_merge.Recipe:  # fmt: skip
    """Write the models of `family` into `folder`; the recipe that merges them, with its "base" if the method takes one.

    `order` lists the models (a name may come twice), other `keys` go into the recipe. Names in the recipe are
    relative, so that random masks do not depend on where the test runs.
    """
    method = METHODS[name]
    for model, tensors in family.items():
        write_checkpoint(folder / model, tensors, shards=shards)
    models = list(order or (model for model in family if model != "base" or not takes_base(method)))
    own = [{n: v[i] for n, v in parameters.items() if isinstance(v, tuple)} for i in range(len(models))]
    shared = {n: v for n, v in parameters.items() if not isinstance(v, tuple)}
    base = Path("base") if takes_base(method) and "base" in family else None
    if method.statistic:
        keys = {"data": {"texts": MADE_UP}, **keys}
    text = recipe_text(name, [(Path(m), o) for m, o in zip(models, own, strict=True)], base, shared, **keys)
    return ctl_merge.parse_recipe(text, relative_to=folder)


def expected(
    name: str, family: Mapping[str, Tensors], parameters: Mapping[str, Any], tensor: str, seed: int = 0
) -> Array:
    """The definition's value of one tensor, unrounded; where statistics are of the whole model, all are one vector."""
    method, row = METHODS[name], ROWS[name]
    whole = row.whole_model or parameters.get("trim") == "model"
    names = sorted(next(iter(family.values()))) if whole else [tensor]
    arrays = {m: [as_float64(t[n]) for n in names] for m, t in family.items()}
    vectors = {m: np.concatenate([a.ravel() for a in parts]) if whole else parts[0] for m, parts in arrays.items()}
    base = vectors.pop("base", None) if takes_base(method) else None
    models, noise = np.stack(list(vectors.values())), None
    if method.statistic == "fisher":
        noise = np.stack([fisher_of(model, tensor, models[0].shape) for model in vectors])
    if method.statistic == "gram" and has_gram(models[0].shape):
        noise = np.stack([gram_of(model, tensor, models[0].shape[1]) for model in vectors])
    if method.random:
        noise = np.stack([philox_uniform(seed, model, tensor, models[0].size) for model in vectors])
        noise = noise.reshape(models.shape)
    python_names = {"lambda_" if n == "lambda" else n: value for n, value in parameters.items()}
    merged = np.asarray(row.definition(base, models, noise, **python_names))
    if not whole:
        return merged
    shapes = {n: part.shape for n, part in zip(names, next(iter(arrays.values())), strict=True)}
    start = sum(math.prod(shapes[n]) for n in names[: names.index(tensor)])
    return merged[start : start + math.prod(shapes[tensor])].reshape(shapes[tensor])


def as_float64(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def last_place(wanted: Array, operands: Sequence[torch.Tensor]) -> Array:
    """Entry by entry, float32's unit in the last place of the largest of operands and result."""
    largest = np.max([np.abs(wanted), *(np.abs(as_float64(operand)) for operand in operands)], axis=0)
    return np.spacing(np.maximum(largest, 1e-30).astype(np.float32)).astype(np.float64)


def ulps(found: torch.Tensor, wanted: Array, operands: Sequence[torch.Tensor]) -> Array:
    """How far apart they are in those units."""
    return np.abs(as_float64(found) - wanted) / last_place(wanted, operands)
