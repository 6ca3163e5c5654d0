"""A plan as a lazy checkpoint: reading merges."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ctl_merge.checkpoint import Checkpoint, FileCheckpoint
from ctl_merge.compiled import LOOP_CHUNK, CompiledLoops, loop_step, working_bytes, worthwhile
from ctl_merge.counting import counting_bytes
from ctl_merge.deferred import Tensor, torch
from ctl_merge.definition import Definition
from ctl_merge.errors import MismatchError
from ctl_merge.header import TensorSpec
from ctl_merge.inputs import Inputs
from ctl_merge.measures import Measures, Results
from ctl_merge.plan import Plan, TensorPlan
from ctl_merge.reference import ModelRef
from ctl_merge.sums import State


class MergedCheckpoint(Checkpoint):
    """The merge that a plan describes. Nothing is kept but a few numbers per tensor.

    Reads are float64 arithmetic on chunks, rounded at the end to the output's dtype: by compiled loops where there are
    such, else, and where these do not decide, as the method defines it. Thread-safe. `devices` says where the
    arithmetic of each tensor happens, by default the CPU; `loops`, whether there are any, by default where they pay.
    """

    def __init__(
        self, plan: Plan, checkpoints: Mapping[ModelRef, FileCheckpoint], devices: Mapping[str, str] | None = None,
        loops: bool | None = None,
    ) -> None:  # fmt: skip
        self.name, self.plan, self.method = plan.recipe.name, plan, plan.method
        self.tensors: Mapping[str, TensorSpec] = plan.specs
        self.config = plan.fit(checkpoints[plan.recipe.refs[0]].config)
        self.inputs, self._loops_wanted = Inputs(checkpoints), loops
        self.definition = Definition(plan, self.inputs, devices or {}, self._decode)
        self.measures = Measures(self)

    @property
    def checkpoints(self) -> Mapping[ModelRef, FileCheckpoint]:
        """The models that are read."""
        return self.inputs.checkpoints

    @property
    def devices(self) -> Mapping[str, str]:
        """Where the arithmetic of each tensor happens; the CPU where nothing is said."""
        return self.definition.devices

    @property
    def code(self) -> Path | None:
        return self.checkpoints[self.plan.recipe.refs[0]].code  # that of the config

    # ---- what loops do

    @cached_property
    def has_loops(self) -> bool:
        """Whether compiled loops serve: for what is read from files as it is, and where there is enough of it."""
        if self._loops_wanted is not None:
            return self._loops_wanted
        return worthwhile(self.plan) and all(
            self.checkpoints[part.model].stored_as(part.tensor) for tensor in self._merged for part in tensor.everyone
        )

    @cached_property
    def _loops(self) -> CompiledLoops | None:
        """The compiled loops, where they serve; loading them takes a second, so not before the first read."""
        if not self.has_loops:
            return None
        return CompiledLoops.load(self.plan, self.inputs, self.columns, self.definition.stack)

    @property
    def _merged(self) -> list[TensorPlan]:
        return [tensor for tensor in self.plan.tensors.values() if tensor.operation == "merge"]

    def _loops_for(self, plan: TensorPlan) -> CompiledLoops | None:
        return self._loops if self._by_loops(plan) else None

    def _by_loops(self, plan: TensorPlan) -> bool:
        return self.has_loops and self.definition.grain(plan) != "tensor" and self.definition.on_cpu(plan)

    def _decode(self, plan: TensorPlan, start: int, stack: Tensor) -> bool:
        loops = self._loops_for(plan)
        return loops is not None and loops.decode(plan, start, stack)

    @property
    def copies(self) -> bool:
        """Whether some of what is read is copied out of the files, and not worked on where it lies, as on Linux."""
        return not all(self._by_loops(t) and all(map(self.inputs.are_words, t.everyone)) for t in self._merged)

    @property
    def needs_torch(self) -> bool:
        """Whether it takes more than compiled loops from and to bfloat16."""
        measured = [(self.method.measures[name], t) for t in self._merged for name in self.method.scopes(t.parameters)]
        return not (
            not self.copies and all(measure.loop(t.parameters) for measure, t in measured)
            and all(t.spec.dtype == "BF16" for t in self._merged)
        )  # fmt: skip

    def working_bytes(self) -> int:
        """How much its models keep in memory for each thread."""
        width, models = max(map(self._whole, self.plan.tensors.values()), default=1), len(self.checkpoints)
        own = 0
        if self.has_loops:
            own = working_bytes(models, not self.copies, width) + counting_bytes(self.method, models)
        return own + sum(checkpoint.working_bytes() for checkpoint in self.checkpoints.values())

    # ---- reading

    def block(self, tensor: str) -> int:
        step, plan = self.step(tensor), self.plan.tensors[tensor]
        if not self._by_loops(plan):
            return step
        # A multiple of the other for rows, so that falling back on the plain definition computes nothing twice.
        element = self.definition.grain(plan) == "element"
        return max(step, LOOP_CHUNK) if element else step * max(1, LOOP_CHUNK // step)

    def step(self, tensor: str) -> int:
        """How much is computed at once where the plain definition is asked."""
        return self.definition.step(self.plan.tensors[tensor])

    def _whole(self, plan: TensorPlan) -> int:
        """Entries that stay together: those of a row, for methods that want it whole."""
        return plan.spec.width if self.definition.grain(plan) == "row" else 1

    def bytes_into(self, tensor: str, out: np.ndarray, start: int = 0) -> None:
        plan = self.plan.tensors[tensor]
        if plan.operation == "copy" or plan.spec.dtype != "BF16" or not self._loop(plan, out.view(np.uint16), start):
            super().bytes_into(tensor, out, start)

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        plan = self.plan.tensors[tensor]
        if plan.operation == "copy":
            self._copy(plan, out, start)
            return
        words = plan.spec.dtype == "BF16" and out.dtype == torch.bfloat16
        if not self._loop(plan, out.view(torch.int16).numpy().view(np.uint16) if words else out, start):
            self.definition.read_into(plan, self.measures.of(plan), out, start)

    def _loop(self, plan: TensorPlan, out: Tensor | np.ndarray, start: int) -> bool:
        """Whether a compiled loop filled `out`, an array of bfloat16's bits; else the plain definition is asked."""
        loops = self._loops_for(plan)
        if loops is None:
            return False
        results, width = self.measures.of(plan), self._whole(plan)
        step = loop_step(width)
        for begin in range(0, len(out), step):
            wanted = out[begin : begin + step]
            words = wanted if isinstance(wanted, np.ndarray) else None
            merged = loops.merge(plan, results, start + begin, len(wanted), width, words)
            if merged is None:
                return False
            if merged is not words:
                unrounded = torch.from_numpy(merged)
                self.definition.check(plan, unrounded, start + begin)
                kept = torch.from_numpy(wanted).view(torch.bfloat16) if isinstance(wanted, np.ndarray) else wanted
                kept.copy_(unrounded)
        return True

    def _copy(self, plan: TensorPlan, out: Tensor, start: int) -> None:
        first, *others = plan.inputs
        self.checkpoints[first.model].read_into(first.tensor, out, start)
        for part in others:
            other = torch.empty_like(out)
            self.checkpoints[part.model].read_into(part.tensor, other, start)
            if not torch.equal(out, other):
                raise MismatchError(
                    f"{plan.name} ({plan.spec.dtype}) is not floating point and differs between {first.model} and "
                    f"{part.model}: it cannot be merged. Use models that agree on it."
                )

    # ---- what runs over a whole tensor

    def columns(self, plan: TensorPlan) -> Mapping[str, Any]:
        """The parameters, per-model ones as float64 columns (models,)."""
        return self.definition.columns(plan)

    def accumulate(self, plan: TensorPlan, name: str, results: Results) -> State:
        """The state of one of the method's measures over a whole tensor, given the results of those before it."""
        loops = self._loops_for(plan) if self.method.measures[name].loop(plan.parameters) else None
        return loops.state(plan, name, results) if loops else self.definition.accumulate(plan, name, results)

    def coefficients(self, tensor: str) -> list[float] | None:
        """The c of a linear method's Σ c x, in the order of the tensor's inputs; None where the method is none."""
        plan = self.plan.tensors[tensor]
        if not self.method.linear or plan.operation == "copy":
            return None
        return self.definition.coefficients(plan, self.measures.of(plan))

    def parent(self, ref: ModelRef) -> ParentView:
        """One of the models as the merge sees it: under the output's names, with the output's rows."""
        return ParentView(self, ref)


class ParentView(Checkpoint):
    """A model under the names, shapes and rows of the merge that it goes into."""

    def __init__(self, merged: MergedCheckpoint, ref: ModelRef) -> None:
        self.name, self.merged, self.ref = ref.text, merged, ref
        self.tensors, self.config = merged.tensors, merged.config

    @property
    def code(self) -> Path | None:
        return self.merged.code

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        parts = self.merged.plan.tensors[tensor].everyone
        part = next((p for p in parts if p.model == self.ref), parts[0])  # a computed buffer: the first model's
        self.merged.inputs.fill(out, part, start)
