"""Adapters of one base merged into one adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from math import prod
from typing import Any

from ctl_merge import hub
from ctl_merge.adapter import AdaptedCheckpoint
from ctl_merge.adapter_changes import Change
from ctl_merge.adapter_files import Form
from ctl_merge.adapter_fit import Fit
from ctl_merge.adapter_output import WEIGHTS, Wanted, completed
from ctl_merge.adapter_targets import Target, find_targets
from ctl_merge.checkpoint import Checkpoint, FileCheckpoint, torch_dtype
from ctl_merge.deferred import torch
from ctl_merge.definition import Evidence
from ctl_merge.errors import MismatchError, RecipeError
from ctl_merge.factors import Factors, concatenated
from ctl_merge.header import TensorSpec
from ctl_merge.merged import MergedCheckpoint
from ctl_merge.plan import Plan, TensorPlan
from ctl_merge.reference import ModelRef
from ctl_merge.task_vectors import AdapterChange, BaseView, Difference
from ctl_merge.writer import Shard

_WIDEST = ("F64", "F32", "BF16", "F16")


class LoraOutput:
    """The adapter that a recipe over adapters comes to: decided from headers, fitted when it is written.

    plan, merged: of the whole merge. `lazy`: the merged task vectors, for which only the adapters are read; methods
    that work on weights need the models themselves. Raises RecipeError and MismatchError for what is no merge of
    adapters alone, or would change what no adapter holds.
    """

    def __init__(
        self, plan: Plan, merged: MergedCheckpoint, checkpoints: Mapping[ModelRef, FileCheckpoint],
        devices: Mapping[str, str], evidence: Callable[[], Evidence],
    ) -> None:  # fmt: skip
        assert plan.recipe.lora is not None
        self.plan, self.merged, self.setting = plan, merged, plan.recipe.lora
        self.base = _common_base(plan, checkpoints)
        self.views = {
            ref: AdapterChange(c, c if isinstance(c, AdaptedCheckpoint) else None) for ref, c in checkpoints.items()
        }
        self.touched = {name for name, tensor in plan.tensors.items() if any(self._changes(tensor))}
        self._check_shapes()
        own = [tensor for tensor in plan.tensors.values() if tensor.operation == "merge"]
        self.lazy = merged
        if all(tensor.base for tensor in own):
            self.lazy = MergedCheckpoint(plan, self.views, devices)
            if plan.method.statistic:
                self.lazy.definition.evidence = evidence()
        self.targets = find_targets(plan.specs, self.base.config, self.base.name)
        self.wanted = self._wanted()

    @property
    def on_weights(self) -> bool:
        """Whether the method works on weights, so that the base is read."""
        return self.lazy is self.merged

    @property
    def adapters(self) -> dict[ModelRef, FileCheckpoint]:
        """The adapters by their own names."""
        return {ref: source for view in self.views.values() for ref, source in view.sources().items()}

    @property
    def belongs_on(self) -> tuple[str | None, str | None]:
        """The base's name and revision for the adapter's config: a folder by its own name, wherever it lies."""
        ref = self.base.ref
        return ref.short, ref.revision if ref.repo_id else None

    @cached_property
    def dtype(self) -> str:
        """Of the adapter: the recipe's, else the widest of those that go in."""
        kinds = {spec.dtype for adapter in self.adapters.values() for spec in adapter.tensors.values()}
        asked = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(
            str(self.plan.recipe.dtype)
        )
        return asked or next(kind for kind in _WIDEST if kind in kinds)

    # ---- what is read, and what it takes

    @property
    def needs_base(self) -> bool:
        """Whether the base's weights are read: they are not where the output follows from the adapters alone."""
        whole = any(wanted.form != "low_rank" for wanted in self.wanted)
        return self.on_weights or whole or any(view.needs_base for view in self.views.values())

    def fetch(self) -> None:
        """Download what is read and is not here."""
        read: list[FileCheckpoint] = list(self.adapters.values())
        read += [self.base] if self.needs_base else []
        hub.check_space(sum(checkpoint.missing_bytes() for checkpoint in read))
        for checkpoint in read:
            checkpoint.fetch()

    def planned_rank(self, target: Target) -> int:
        """The most that the parameter's matrices can come to have."""
        known = self._known_rank(target)
        return min(known or min(target.matrix), self.setting.rank or min(target.matrix), *target.matrix)

    @property
    def fitting_bytes(self) -> int:
        """What a worker takes to fit the largest matrix: itself, its factors and what they are made of, in float64."""
        sizes = [prod(w.target.matrix) for w in self.wanted if w.form == "low_rank"]
        return 8 * 6 * max(sizes, default=0)

    @property
    def shard(self) -> Shard:
        """The file that is written, its tensors as large as they can come to be."""
        specs = {}
        for wanted in self.wanted:
            target = wanted.target
            outputs, inputs = target.matrix
            shape = (len(wanted.rows), *target.shape[1:]) if wanted.rows else target.shape
            if wanted.form == "low_rank":
                shape = (target.count * self.planned_rank(target) * (1 + len(target.tied)), outputs + inputs)
            specs[target.parameter] = TensorSpec(self.dtype, shape)
        return Shard(WEIGHTS, specs)

    def decisions(self) -> Iterator[str]:
        """What is written, in words."""
        low = [wanted.target for wanted in self.wanted if wanted.form == "low_rank"]
        exact = sum(self._is_exact(target) for target in low)
        asked = f"rank at most {self.setting.rank}" if self.setting.rank else "rank as needed"
        if self.setting.energy:
            asked += f", or for {self.setting.energy:.4g} of ‖change‖²"
        yield (
            f"written as one {self.dtype} adapter of {self.base.ref.short}: {len(low)} parameters of low rank "
            f"({asked}), {exact} of them exact, by concatenation; {len(self.wanted) - len(low)} stored whole or by rows"
        )
        if not self.needs_base:
            yield f"{self.base.ref.short} is not read: the adapters' task vectors are merged without it"

    def warnings(self) -> Iterator[str]:
        open_ = self.setting.rank is None and self.setting.energy is None
        wide = [w.target for w in self.wanted if w.form == "low_rank" and self._known_rank(w.target) is None]
        if open_ and wide:
            yield (
                f"{self.plan.method.name} gives {len(wide)} matrices of any rank, and the adapter has all of it: set "
                "`rank` or `energy` below `output: {lora: …}` for a small one"
            )

    # ---- what goes into it

    def fit(self, device: str) -> Fit:
        """How the changes become factors. Checks, of methods on weights, that what no adapter touches stays."""
        dtype = torch_dtype(self.dtype)
        change: Checkpoint = self.lazy
        if self.on_weights:
            views = [view.adapted for view in self.views.values() if view.adapted]
            before = BaseView(self.merged, self.base, views)
            change = Difference(self.merged, before)
            self._check_untouched(change)
        return Fit(
            change, self.merged, dtype, self.setting.rank, self.setting.energy, self._known, device,
            self.plan.recipe.allow_nonfinite,
        )  # fmt: skip

    def _check_untouched(self, change: Checkpoint) -> None:
        """Refuse a method on weights under which models that are all the base do not give the base."""
        left = [t for name, t in self.plan.tensors.items() if name not in self.touched and t.operation == "merge"]
        smallest = {id(t.parameters): t for t in sorted(left, key=lambda t: -t.spec.numel) if t.spec.numel}
        for tensor in smallest.values():
            found = torch.empty(tensor.spec.numel, dtype=torch.float64)
            before = torch.empty_like(found)
            change.read_into(tensor.name, found)
            self.merged.read_into(tensor.name, before)
            if float(found.abs().max()) > 1e-9 * float(before.abs().max()):
                raise MismatchError(
                    f"{self.plan.method.name} with these parameters changes {tensor.name}, which no adapter touches, "
                    "so that no adapter can hold the merge: use weights that sum to 1, or a method on task vectors "
                    "with `base_model`"
                )

    def _check_shapes(self) -> None:
        for name in self.touched:
            tensor = self.plan.tensors[name]
            rows = any(part.rows is not None for part in tensor.everyone)
            if rows or any(self.views[p.model].tensors[p.tensor].shape != tensor.spec.shape for p in tensor.everyone):
                raise MismatchError(
                    f"{name} changes its number of rows, which an adapter cannot say: merge into a model (without "
                    "`output`), or use adapters that leave the vocabulary as it is"
                )
        if not self.touched:
            raise MismatchError("no adapter changes anything: there is nothing to write")

    def _changes(self, tensor: TensorPlan) -> list[tuple[int, AdaptedCheckpoint, Change]]:
        """The adapters that change a tensor, by their place among its inputs."""
        found = []
        for place, part in enumerate(tensor.inputs):
            view = self.views[part.model]
            if view.adapted and view.alters(part.tensor):
                found.append((place, view.adapted, view.adapted.changes[part.tensor]))
        return found

    def _of(self, target: Target) -> list[Change]:
        return [
            change
            for place in target.places
            if place.name in self.touched
            for _, _, change in self._changes(self.plan.tensors[place.name])
        ]

    def _wanted(self) -> list[Wanted]:
        """Every parameter that is changed, and those that are stored with it."""
        lost = sorted(self.touched & set(self.targets.other))
        if lost:
            raise MismatchError(f"{lost[0]} is changed, and is no parameter of the model's class in transformers")
        forms = {target.parameter: self._form(target) for target in self.targets.parameters if self._of(target)}
        for target in self.targets.parameters:
            if forms.get(target.parameter) == "whole" and not self.targets.can_be_saved(target):
                raise MismatchError(
                    f"{target.parameter} is changed in a way that no low rank holds, and PEFT cannot store it whole: "
                    "merge into a model (without `output`)"
                )
        wanted = [
            Wanted(target, forms[target.parameter], self._rows(target) if forms[target.parameter] == "rows" else ())
            for target in self.targets.parameters
            if target.parameter in forms
        ]
        return completed(wanted, self.targets)

    def _form(self, target: Target) -> Form:
        changes = self._of(target)
        if all(change.rows and not change.stored and not change.low_rank for change in changes):
            return "rows"
        if target.kind == "bias":
            return "bias"
        partial = any(change.stored or change.rows for change in changes)
        tied = bool(target.tied) and not target.tied_by_peft
        return "low_rank" if target.low_rank and not partial and not tied else "whole"

    def _rows(self, target: Target) -> tuple[int, ...]:
        return tuple(sorted({row for change in self._of(target) if change.rows for row, _ in change.rows[1]}))

    # ---- exact factors

    def _is_exact(self, target: Target) -> bool:
        known = self._known_rank(target)
        return known is not None and known <= min(self.setting.rank or known, *target.matrix)

    def _known_rank(self, target: Target) -> int | None:
        """How many columns the adapters' factors have together, where they make up the merge by themselves."""
        if not self.plan.method.linear:
            return None
        ranks = [self._sum_of(place.name) for place in target.places]
        if any(found is None for found in ranks):
            return None
        return max((sum(low.rank for _, _, low in found or []) for found in ranks), default=0)

    def _sum_of(self, tensor: str) -> list[tuple[int, AdaptedCheckpoint, Any]] | None:
        """The low ranks that a tensor's change is a sum of; None where it is none."""
        changes = self._changes(self.plan.tensors[tensor])
        if any(not change.is_sum or change.shift or not change.low_rank for _, _, change in changes):
            return None
        return [(place, adapted, change.low_rank) for place, adapted, change in changes]

    def _known(self, target: Target, number: int) -> Factors | None:
        """The adapters' own factors side by side, where the method adds them up."""
        own = [place for place in target.places if place.expert in (None, number)]
        first = self._sum_of(own[0].name)
        if self._known_rank(target) is None or not first:
            return None
        outputs = target.matrix[0]
        parts = []
        for order, (_, adapted, low) in enumerate(first):
            b, a = adapted.factors(low, number if target.count > 1 else low.expert or 0)
            if (b.shape[0], a.shape[1]) != target.matrix:
                return None
            columns = torch.zeros(outputs, 1, dtype=torch.float64)
            for place in own:
                coefficients, sums = self.lazy.coefficients(place.name), self._sum_of(place.name)
                if coefficients is None or not sums or len(sums) != len(first):
                    return None
                count = outputs if place.expert is None else self.plan.specs[place.name].shape[0]
                columns[place.row : place.row + count] = coefficients[sums[order][0]]
            if bool(columns.any()):
                parts.append((b, a, low.scale, columns))
        return concatenated(parts) if parts else None


def _common_base(plan: Plan, checkpoints: Mapping[ModelRef, FileCheckpoint]) -> FileCheckpoint:
    """The one model that all adapters are on. Raises RecipeError where they are not adapters, or on different ones."""
    adapted = [checkpoint for checkpoint in checkpoints.values() if isinstance(checkpoint, AdaptedCheckpoint)]
    if not adapted:
        raise RecipeError(_NO_ADAPTERS.format("no model of the recipe is one"))
    base = adapted[0].base
    for ref, checkpoint in checkpoints.items():
        own = checkpoint.base if isinstance(checkpoint, AdaptedCheckpoint) else checkpoint
        if own.ref == base.ref:
            continue
        if isinstance(checkpoint, AdaptedCheckpoint):
            raise RecipeError(_NO_ADAPTERS.format(f"{ref} is on another base than {base.ref}"))
        raise RecipeError(_NO_ADAPTERS.format(f"{ref} is a whole model"))
    if base.ref.step is not None:
        raise RecipeError(_NO_ADAPTERS.format(f"{base.ref} is a step, which is written nowhere"))
    return base


_NO_ADAPTERS = (
    "`output: lora` merges adapters on one base: {}. For an adapter of any other merge leave `output` out and run "
    "`ctl-merge extract-lora RECIPE --base MODEL`"
)
