"""The float64 definition of a case, tensor by tensor: the tests' NumPy definitions on what `resolve` reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from differential.cases import Case
from differential.families import Family
from differential.methods import METHODS
from differential.resolve import Job, output_dtype, resolve

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from references import ROWS, philox_uniform

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Wanted:
    """One tensor: its definition's value, unrounded (None where there is no definition), and what it is made from."""

    job: Job
    value: Array | None
    base: Array | None
    models: Array  # (models, *shape)

    @property
    def operands(self) -> Array:
        """All inputs: (inputs, *shape)."""
        return self.models if self.base is None else np.concatenate([self.base[None], self.models])

    @property
    def deltas(self) -> Array:
        return self.models if self.base is None else self.models - self.base


def defined(method: str) -> bool:
    """Whether the tests define the method."""
    return method in ROWS


def wanted(case: Case) -> Iterator[Wanted]:
    """The tensors that a case should give."""
    family, spec = case.family, METHODS[case.method]
    names = list(family.models[family.base])
    for job in resolve(case.config, spec, names, family.depth):
        base = _array(family, *job.base) if job.base else None
        models = [_array(family, *part) for part in job.inputs]
        if family.vocabularies_differ and _vocabulary(job):
            assert base is not None
            union = case.config["tokenizer_source"] == "union"
            rows = max(map(len, _everyone(case, job))) if union else len(base)
            base, *models = (_in_vocabulary([base, *models], own, rows) for own in (base, *models))
        value = _define(case, job, base, np.stack(models)) if defined(case.method) else None
        yield Wanted(job, value, base, np.stack(models))


def _everyone(case: Case, job: Job) -> list[Array]:
    """The tensor in every model of the configuration: the union is theirs, though a slice may take some of them."""
    named = [model for model in case.family.models if f"'{model}'" in str(case.config)]
    return [_array(case.family, model, job.name) for model in named]


def _in_vocabulary(models: list[Array], own: Array, rows: int) -> Array:
    """A model's rows in another vocabulary: those that it lacks are the base's (the first's), or of who has them."""
    owners = [next(m for m in (own, *models) if len(m) > row) for row in range(rows)]
    return np.stack([owner[row] for row, owner in enumerate(owners)])


def dtype_of(case: Case) -> str:
    return output_dtype(case.config, case.family.dtype)


def _vocabulary(job: Job) -> bool:
    return "embed_tokens" in job.name or "lm_head" in job.name


def _array(family: Family, model: str, tensor: str) -> Array:
    return as_float64(family.models[model][tensor])


def as_float64(tensor: Tensor) -> Array:
    return tensor.double().numpy()


def _define(case: Case, job: Job, base: Array | None, models: Array) -> Array:
    noise, given = None, {**job.own, **job.shared}
    if METHODS[case.method].random:
        noise = np.stack([_noise(case, *part, models[0].shape) for part in job.inputs])
    return ROWS[case.method].definition(base, models, noise, **{_keyword(n): v for n, v in given.items()})


def _keyword(name: str) -> str:
    return "lambda_" if name == "lambda" else name


def _noise(case: Case, model: str, tensor: str, shape: tuple[int, ...]) -> Array:
    """The numbers that our masks are drawn from: of the recipe's seed, the model's folder, the tensor in its file."""
    count = int(np.prod(shape))
    return philox_uniform(case.config.get("seed", 0), model, tensor, count).reshape(shape)


def parameters(job: Job) -> Mapping[str, Any]:
    return {**job.own, **job.shared}
