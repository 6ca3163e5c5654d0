"""A merge, its parents and their base in weight space."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.findings import find_flags, say_findings, say_flags
from ctl_merge.header import dtype_name
from ctl_merge.layers import block_index
from ctl_merge.merged import MergedCheckpoint
from ctl_merge.merging import Merge
from ctl_merge.reference import ModelRef
from ctl_merge.roles import roles
from ctl_merge.weights import TaskGrams, TensorStatistics, tensor_statistics

FORMAT = 1
DENSITIES = (1.0, 0.5, 0.2, 0.1)
OUTSIDE = "(outside blocks)"


@dataclass(frozen=True)
class Comparison:
    """What was found, as plain data: `data` is what `--json` prints, `rows` is flat, for pandas.

    τ_i = θ_i - θ_0 and τ_m = θ_m - θ_0 are the task vectors of parent i and of the merge, before it is rounded. For
    the model, every block, every kind of module and every tensor:

    - `task_vector`: ‖τ‖ / ‖θ_0‖. `cosine_to_base`: cos(θ_i, θ_0), the lineage.
    - `coefficient`: ĉ = argmin ‖τ_m - Σ c_i τ_i‖², what the merge is in terms of its parents, and `explained`: R², the
      share of ‖τ_m‖² that this combination reaches. Both over the group's tensors together.
    - `pairs`: cos(τ_i, τ_j), and the distance ‖θ_i - θ_j‖ / ‖θ_0‖.
    - `signs`, at each density d: `contested`, the share of entries where at least two task vectors are not zero and
      among the d largest of their tensor (see `tensor_statistics`); `conflict`, the share of those in which two have
      opposite signs; `chance`, what signs thrown by coins would give, 1 - 2^(1-n) where n take part.
    - `rounding_loss`: ‖round(θ_m) - θ_m‖ / ‖τ_m‖, rounded to the dtype of the output.
    - `nonfinite`: how many entries are NaN or infinite; these entries are left out of all else. `flags`: see
      `ctl_merge.findings`.

    A number that does not exist, such as the cosine of a zero vector, is None.
    """

    data: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One flat row for the model, each block, each kind and each tensor: `pandas.DataFrame(comparison.rows)`."""
        groups = [("model", [self.data["model"]])] + [(k, self.data[f"{k}s"]) for k in ("block", "kind", "tensor")]
        return [{"by": by, **_flat(row)} for by, rows in groups for row in rows]


def compare(
    opened: Merge, mapped: Callable[..., Iterable[TensorStatistics]] = map, *, base: ModelRef | None = None,
    densities: Sequence[float] = DENSITIES, told: Callable[[int], object] = lambda count: None,
) -> Comparison:  # fmt: skip
    """Compare the merge that a recipe describes with its models, without writing it.

    `base`: where the task vectors begin, for recipes that name no base. `mapped` may map over tensors in parallel;
    `told` hears of each finished tensor. Raises CtlMergeError as merging does, but not for values that are not finite.
    """
    opened.fetch()
    origin, parents = roles(opened, base)
    plan = replace(opened.plan, recipe=replace(opened.recipe, allow_nonfinite=True))
    merged = MergedCheckpoint(plan, opened.checkpoints, opened.devices)
    merged.measures.take(mapped)  # type: ignore[arg-type]
    of = partial(
        tensor_statistics, base=origin, parents=list(parents.values()), merged=merged, densities=tuple(densities)
    )
    names = compared_tensors(opened, origin)
    found = {}
    for name, statistics in zip(names, mapped(of, names), strict=True):
        found[name] = statistics
        told(1)
    table = _Table(list(parents), densities)
    data = {
        "format": FORMAT, "method": opened.recipe.method.name, "base": origin.name,
        "parents": {short: checkpoint.name for short, checkpoint in parents.items()}, "densities": list(densities),
        "dtypes": sorted({dtype_name(merged.tensors[name].dtype) for name in names}),
        "model": table.row("model", found.values()),
        "blocks": table.rows(_by_block(found, merged)), "kinds": table.rows(_by_kind(found, merged)),
        "tensors": table.rows({name: [statistics] for name, statistics in found.items()}),
    }  # fmt: skip
    return Comparison({**data, "flags": say_flags(data), "findings": say_findings(data)})


def compared_tensors(opened: Merge, base: Checkpoint) -> list[str]:
    """The tensors that are merged, in order; those that are only copied have nothing to tell."""
    merged = (name for name, plan in opened.plan.tensors.items() if plan.operation == "merge" and plan.spec.numel)
    return [name for name in merged if name in base.tensors]


# ---- groups of tensors

Groups = dict[str, list[TensorStatistics]]


def _by_block(found: Mapping[str, TensorStatistics], merged: Checkpoint) -> Groups:
    places = block_index(merged.tensors, merged.config)
    groups: Groups = {}
    for name, statistics in found.items():
        stack, index, _ = places.get(name, ("", 0, 0))
        groups.setdefault(f"{stack}.{index}" if name in places else OUTSIDE, []).append(statistics)
    return {**{name: group for name, group in groups.items() if name == OUTSIDE}, **groups}


def _by_kind(found: Mapping[str, TensorStatistics], merged: Checkpoint) -> Groups:
    """By the name without the block's own prefix and `.weight`; numbers in it (experts) are one kind."""
    places = block_index(merged.tensors, merged.config)
    several = len({stack for stack, _, _ in places.values()}) > 1
    inside: Groups = {}
    outside: Groups = {}
    for name, statistics in found.items():
        kind = name.removesuffix(".weight")
        if name not in places:
            outside.setdefault(kind, []).append(statistics)
            continue
        stack = places[name][0]
        own = kind.removeprefix(f"{stack}.").partition(".")[2]
        own = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", own)
        inside.setdefault(f"{stack}.*.{own}" if several else own, []).append(statistics)
    return {**outside, **inside}


class _Table:
    """Turns sums over tensors into numbers."""

    def __init__(self, parents: list[str], densities: Sequence[float]) -> None:
        self.parents, self.densities = parents, densities

    def rows(self, groups: Groups) -> list[dict[str, Any]]:
        return [self.row(name, group) for name, group in groups.items()]

    def row(self, name: str, group: Iterable[TensorStatistics]) -> dict[str, Any]:
        """All numbers of one group; the fields are explained in `Comparison`."""
        first, *rest = group
        total = sum(rest, first)
        k, gram = len(self.parents), total.gram
        base, merged = gram[k, k], gram[-1, -1]
        coefficients, explained = TaskGrams(k, {}).coefficients(gram, 0)
        parents = {
            parent: {
                "task_vector": _root(gram[i, i], base),
                "cosine_to_base": _ratio(base + gram[i, k], math.sqrt(base * (base + 2 * gram[i, k] + gram[i, i]))),
                "cosine_to_merged": _cosine(gram, i, k + 1),
                "distance_to_merged": _root(_distance(gram, i, k + 1), base),
                "coefficient": float(coefficients[i]) if gram[i, i] > 0 and merged > 0 else None,
            }
            for i, parent in enumerate(self.parents)
        }
        row = {
            "name": name, "tensors": total.tensors, "parameters": total.numel, "parents": parents,
            "pairs": [
                {
                    "parents": [self.parents[i], self.parents[j]], "cosine": _cosine(gram, i, j),
                    "distance": _root(_distance(gram, i, j), base),
                }
                for i, j in combinations(range(k), 2)
            ],
            "signs": list(self._signs(total)),
            "merged": {
                "task_vector": _root(merged, base),
                "to_largest_parent": _root(merged, max(gram[i, i] for i in range(k))),
                "explained": None if math.isnan(explained) else explained,
                "rounding_loss": _root(total.rounding, merged),
            },
            "nonfinite": dict(zip([*self.parents, "base", "merged", "rounded"], total.nonfinite.tolist(), strict=True)),
        }  # fmt: skip
        return {**row, "flags": find_flags(row)}

    def _signs(self, total: TensorStatistics) -> Iterator[dict[str, Any]]:
        if len(self.parents) < 2:
            return
        number = np.arange(2, len(self.parents) + 1)
        for density, voters, conflicts in zip(self.densities, total.voters, total.conflicts, strict=True):
            contested = int(voters[2:].sum())
            yield {
                "density": density, "contested": contested / total.numel, "conflict": _ratio(conflicts, contested),
                "chance": _ratio(float(voters[2:] @ (1 - 0.5 ** (number - 1))), contested),
            }  # fmt: skip


def _distance(gram: np.ndarray, i: int, j: int) -> float:
    """‖τ_i - τ_j‖²."""
    return max(0.0, gram[i, i] + gram[j, j] - 2 * gram[i, j])


def _cosine(gram: np.ndarray, i: int, j: int) -> float | None:
    return _ratio(gram[i, j], math.sqrt(gram[i, i] * gram[j, j]))


def _root(square: float, of: float) -> float | None:
    return _ratio(math.sqrt(square), math.sqrt(of))


def _ratio(value: float, of: float) -> float | None:
    return float(value / of) if of > 0 else None


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: row[key] for key in ("name", "tensors", "parameters")}
    flat |= {f"merged_{key}": value for key, value in row["merged"].items()}
    flat |= {f"{key}[{parent}]": v for parent, numbers in row["parents"].items() for key, v in numbers.items()}
    for pair in row["pairs"]:
        flat |= {f"{key}[{', '.join(pair['parents'])}]": pair[key] for key in ("cosine", "distance")}
    for signs in row["signs"]:
        flat |= {f"{key}@{signs['density']:g}": signs[key] for key in ("contested", "conflict", "chance")}
    return flat | {"nonfinite": sum(row["nonfinite"].values()), "flags": " ".join(row["flags"])}
