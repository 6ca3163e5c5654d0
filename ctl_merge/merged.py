"""A plan as a lazy checkpoint: reading merges."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ctl_merge.checkpoint import CHUNK, Checkpoint, FileCheckpoint, torch_dtype
from ctl_merge.compiled import LOOP_CHUNK, CompiledLoops, loop_step, working_bytes, worthwhile
from ctl_merge.counting import counting_bytes
from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import DeviceError, MismatchError, NonFiniteError
from ctl_merge.header import TensorSpec, dtype_name
from ctl_merge.mapped import InPlace
from ctl_merge.measures import Measures, Results, tensors
from ctl_merge.methods.noise import uniform
from ctl_merge.methods.registry import Grain
from ctl_merge.plan import Plan, TensorPlan
from ctl_merge.reference import ModelRef
from ctl_merge.sums import State
from ctl_merge.token_rows import Input, RowReader
from ctl_merge.workers import compute_alone

# An accelerator wants larger pieces than a cache does, or launching kernels costs more than running them.
DEVICE_CHUNK = 32 * CHUNK


class Evidence(Protocol):
    """Statistics of models on texts, by model and tensor: see `ctl_merge.evidence`."""

    def of(self, ref: ModelRef, tensor: str, start: int = 0, count: int | None = None) -> Tensor | None: ...
    def transposed(self, ref: ModelRef, tensor: str) -> bool: ...


class MergedCheckpoint(Checkpoint):
    """The merge that a plan describes. Nothing is kept but a few numbers per tensor.

    Reads are float64 arithmetic on chunks, rounded at the end to the output's dtype. (In float32 one 16-bit result in
    a few hundred would fall on the wrong side: few-digit weights often put it just between two values.) Thread-safe:
    every thread has buffers of its own. `devices` says where the arithmetic of each tensor happens, by default the CPU;
    `loops`, whether compiled loops do it, by default where they pay.
    """

    def __init__(
        self, plan: Plan, checkpoints: Mapping[ModelRef, FileCheckpoint], devices: Mapping[str, str] | None = None,
        loops: bool | None = None,
    ) -> None:  # fmt: skip
        self.name, self.plan, self.method = plan.recipe.name, plan, plan.method
        self.tensors: Mapping[str, TensorSpec] = plan.specs
        self.config = plan.fit(checkpoints[plan.recipe.refs[0]].config)
        self._checkpoints, self._devices, self._rows = checkpoints, devices or {}, RowReader(checkpoints)
        self.evidence: Evidence | None = None  # for methods that want a statistic of each model on its own text
        self._accepted = inspect.signature(self.method.function).parameters
        self._columns: dict[int, Mapping[str, Any]] = {}
        self._loops_wanted = loops
        self._buffers = threading.local()
        self.measures = Measures(self)

    @cached_property
    def has_loops(self) -> bool:
        """Whether compiled loops serve: for what is read from files as it is, and where there is enough of it."""
        if self._loops_wanted is not None:
            return self._loops_wanted
        merged = (t for t in self.plan.tensors.values() if t.operation == "merge")
        return worthwhile(self.plan) and all(
            self._checkpoints[part.model].stored_as(part.tensor) for tensor in merged for part in tensor.everyone
        )

    @cached_property
    def _loops(self) -> CompiledLoops | None:
        """The compiled loops, where they serve; loading them takes a second, so not before the first read."""
        if not self.has_loops:
            return None
        return CompiledLoops.load(self.plan, self.arrays_of, self.fill, self._is_plain, self._mapped, self._stack)

    @property
    def checkpoints(self) -> Mapping[ModelRef, FileCheckpoint]:
        """The models that are read."""
        return self._checkpoints

    @property
    def devices(self) -> Mapping[str, str]:
        """Where the arithmetic of each tensor happens; the CPU where nothing is said."""
        return self._devices

    @property
    def code(self) -> Path | None:
        return self._checkpoints[self.plan.recipe.refs[0]].code  # that of the config

    def block(self, tensor: str) -> int:
        step, plan = self.step(tensor), self.plan.tensors[tensor]
        if not self._by_loops(plan):
            return step
        # A multiple of the other for rows, so that falling back on the plain definition computes nothing twice.
        return max(step, LOOP_CHUNK) if self._grain(plan) == "element" else step * max(1, LOOP_CHUNK // step)

    def _by_loops(self, plan: TensorPlan) -> bool:
        return self.has_loops and self._grain(plan) != "tensor" and self._on_cpu(plan.name)

    def _whole(self, plan: TensorPlan) -> int:
        """Entries that stay together: those of a row, for methods that want it whole."""
        return plan.spec.width if self._grain(plan) == "row" else 1

    def step(self, tensor: str) -> int:
        """How much is computed at once where the plain definition is asked."""
        if self._grain(self.plan.tensors[tensor]) == "tensor":
            return max(1, self.tensors[tensor].numel)
        most = CHUNK if self._on_cpu(tensor) else DEVICE_CHUNK
        most = max(most, *(self._checkpoints[p.model].block(p.tensor) for p in self.plan.tensors[tensor].everyone))
        if self._grain(self.plan.tensors[tensor]) == "element":
            return most
        width = self.tensors[tensor].width
        return width * max(1, most // width)

    @property
    def needs_torch(self) -> bool:
        """Whether it takes more than compiled loops from and to bfloat16."""
        merged = [t for t in self.plan.tensors.values() if t.operation == "merge"]
        measured = [(self.method.measures[name], t) for t in merged for name in self.method.scopes(t.parameters)]
        return not (
            not self.copies and all(measure.loop(t.parameters) for measure, t in measured)
            and all(t.spec.dtype == "BF16" and self._by_loops(t) for t in merged)
        )  # fmt: skip

    @property
    def copies(self) -> bool:
        """Whether what is read is copied out of the files, and not worked on where it lies."""
        return not (self.has_loops and self._all_plain)

    def working_bytes(self) -> int:
        """How much its models keep in memory for each thread."""
        width, models = max(map(self._whole, self.plan.tensors.values()), default=1), len(self._checkpoints)
        own = 0
        if self.has_loops:
            own = working_bytes(models, self._all_plain, width) + counting_bytes(self.method, models)
        return own + sum(checkpoint.working_bytes() for checkpoint in self._checkpoints.values())

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
        if self._loop(plan, out.view(torch.int16).numpy().view(np.uint16) if words else out, start):
            return
        results, stop = self.measures.of(plan), start + out.numel()
        with self._on(self._device(tensor)):
            for begin, end in self._pieces(plan, start, stop):
                merged = self._merge(plan, begin, end - begin, results)
                self._check_result(plan, merged, begin)
                wanted = merged[max(start - begin, 0) : stop - begin]
                # Waits for the device, so that the pinned buffer may be filled again.
                out[max(begin - start, 0) :][: wanted.numel()].copy_(wanted)

    def _loop(self, plan: TensorPlan, out: Tensor | np.ndarray, start: int) -> bool:
        """Whether a compiled loop filled `out`, an array of bfloat16's bits; else the plain definition is asked."""
        if not self._by_loops(plan) or self._loops is None:
            return False
        results, width = self.measures.of(plan), self._whole(plan)
        step = loop_step(width)
        for begin in range(0, len(out), step):
            wanted = out[begin : begin + step]
            words = wanted if isinstance(wanted, np.ndarray) else None
            merged = self._loops.merge(plan, results, start + begin, len(wanted), width, words)
            if merged is None:
                return False
            if merged is not words:
                unrounded = torch.from_numpy(merged)
                self._check_result(plan, unrounded, start + begin)
                kept = torch.from_numpy(wanted).view(torch.bfloat16) if isinstance(wanted, np.ndarray) else wanted
                kept.copy_(unrounded)
        return True

    @property
    def _all_plain(self) -> bool:
        tensors = (t for t in self.plan.tensors.values() if t.operation == "merge")
        return all(self._is_plain(part) for tensor in tensors for part in tensor.everyone)

    def _is_plain(self, part: Input) -> bool:
        """Whether an input's values are stored in bfloat16, and read as they are."""
        return part.rows is None and self._checkpoints[part.model].stored_as(part.tensor) == "BF16"

    def _mapped(self, part: Input) -> InPlace | None:
        return self._checkpoints[part.model].mapped(part.tensor)

    def _pieces(self, plan: TensorPlan, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """What is computed at once for the entries [start, stop): chunks of them, or the whole blocks that they lie in.

        Rows and tensors come in the same blocks whatever is asked for, so that a sum over a row has the same bits.
        """
        step = self.step(plan.name)
        whole = self._grain(plan) != "element"
        for begin in range(start - start % step if whole else start, stop, step):
            yield begin, min(begin + step, plan.spec.numel if whole else stop)

    def coefficients(self, tensor: str) -> list[float] | None:
        """The c of a linear method's Σ c x, in the order of the tensor's inputs; None where the method is none."""
        plan = self.plan.tensors[tensor]
        if not self.method.linear or plan.operation == "copy":
            return None
        each = torch.eye(len(plan.inputs), dtype=torch.float64)
        results = tensors({name: result for name, result in self.measures.of(plan).items() if name in self._accepted})
        return self.method.function(each, **self._arguments(plan, each, 0), **results).tolist()

    # ---- one chunk

    def _merge(self, plan: TensorPlan, start: int, count: int, results: Results) -> Tensor:
        """Unrounded values of the entries [start, start + count) of a tensor."""
        # First: it may be of inputs that come out of this merge, whose reading uses the same buffers.
        statistic = self._statistic(plan, start, count) if self.method.statistic else None
        stack, base = self._stack(plan, start, count)
        wanted = tensors({name: result for name, result in results.items() if name in self._accepted})
        arguments = {**self._arguments(plan, stack, start), **wanted}
        try:
            if self.method.statistic:
                merged = self._on_statistic(plan, stack, statistic, arguments)
            else:
                merged = self.method.function(stack, **arguments)
        except torch.linalg.LinAlgError as error:
            raise NonFiniteError(
                f"{plan.name}: {self.method.name} finds no decomposition of {_listed(plan)} ({error}). "
                "Look at these tensors with `ctl-merge compare`, or leave one of the models out."
            ) from None
        return merged.flatten().add_(base) if base is not None else merged.flatten()

    def _grain(self, plan: TensorPlan) -> Grain:
        """On what of the tensor the method is called at once."""
        return self.method.grain_for(plan.parameters) if plan.operation == "merge" else "element"

    def _stack(self, plan: TensorPlan, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """The inputs' entries on the tensor's device, shaped as the method's grain says, and the base's (count,).

        For methods that work on task vectors the base is subtracted. Both are views of this thread's buffer.
        """
        parts = plan.everyone
        device = self._device(plan.name)
        buffer = self._buffer(len(parts), count, pinned=device.type == "cuda")
        if self._by_loops(plan) and self._loops is not None and self._loops.decode(plan, start, buffer):
            stack, base = (buffer, None) if plan.base is None else (buffer[:-1], buffer[-1])
            return self._shaped(stack, plan), base
        for row, part in zip(buffer, parts, strict=True):
            self.fill(row, part, start)
        if not self.plan.recipe.allow_nonfinite and not torch.isfinite(buffer.sum()):
            self._refuse_nonfinite(buffer, parts, start)
        if device.type != "cpu":
            buffer = buffer.to(device, non_blocking=True)
        if plan.base is None:
            return self._shaped(buffer, plan), None
        return self._shaped(buffer[:-1].sub_(buffer[-1]), plan), buffer[-1]

    def _shaped(self, stack: Tensor, plan: TensorPlan) -> Tensor:
        """(models, count) as (models, rows, width) or (models, *shape) where the method wants it so."""
        grain = self._grain(plan)
        if grain == "element":
            return stack
        return stack.view(len(stack), *((-1, plan.spec.width) if grain == "row" else plan.spec.shape))

    def fill(self, row: Tensor, part: Input, start: int) -> None:
        """Read one model's entries of an output tensor."""
        if part.rows is not None:
            self._rows.read_into(part.rows, row, start)
        else:
            self._checkpoints[part.model].read_into(part.tensor, row, start)

    def _arguments(self, plan: TensorPlan, stack: Tensor, start: int) -> dict[str, Any]:
        """The parameters: per-model ones as float64 columns, shared ones as they are; noise where it is due."""
        ones = [1] * (stack.ndim - 1)
        columns = {n: v.reshape(-1, *ones) if isinstance(v, np.ndarray) else v for n, v in self.arrays_of(plan).items()}
        arguments = tensors(columns)
        if self.method.random:
            seed, count = self.plan.recipe.seed, stack[0].numel()
            rows = [uniform(seed, part.model.short, part.tensor, start, count) for part in plan.inputs]
            arguments["noise"] = torch.stack(rows).view(stack.shape).to(stack.device)
        return arguments

    def arrays_of(self, plan: TensorPlan) -> Mapping[str, Any]:
        """The parameters, per-model ones as float64 columns (models,)."""
        key = id(plan.parameters)
        if key not in self._columns:
            self._columns[key] = {n: np.array(v, float) if _numeric(v) else v for n, v in plan.parameters.items()}
        return self._columns[key]

    def _statistic(self, plan: TensorPlan, start: int, count: int) -> Tensor | None:
        """What the method wants to know of each model on its own text: (models, …), None if one has none."""
        evidence, parts = self.evidence, [(part.model, part.tensor) for part in plan.inputs]
        assert evidence is not None
        if self.method.statistic == "fisher":  # entry by entry: rows that are another token's have none
            same = all(part.rows is None for part in plan.inputs)
            found = [evidence.of(*part, start, count) if same else None for part in parts]
        else:
            found = [evidence.of(*part) for part in parts]
        known = [statistic for statistic in found if statistic is not None]
        return torch.stack(known) if len(known) == len(found) else None

    def _on_statistic(self, plan: TensorPlan, stack: Tensor, statistic: Tensor | None, arguments: dict) -> Tensor:
        """The method's result with the statistic under its name; its layers' weights are (out, in)."""
        name, first = self.method.statistic, plan.inputs[0]
        assert self.evidence is not None and name is not None
        turned = name == "gram" and self.evidence.transposed(first.model, first.tensor)
        own = statistic.to(stack.device) if statistic is not None else None
        merged = self.method.function(stack.mT if turned else stack, **arguments, **{name: own})
        return merged.mT.contiguous() if turned else merged

    # ---- what runs over a whole tensor

    def accumulate(self, plan: TensorPlan, name: str, results: Results) -> State:
        """The state of one of the method's measures over a whole tensor, given the results of those before it."""
        measure = self.method.measures[name]
        if measure.loop(plan.parameters) and self._by_loops(plan) and self._loops is not None:
            return self._loops.state(plan, name, results)
        compute_alone()
        results = tensors(results)
        state: Tensor | None = None
        with self._on(self._device(plan.name)):
            for start, end in self._pieces(plan, 0, plan.spec.numel):
                stack, _ = self._stack(plan, start, end - start)
                part = measure.accumulate(stack, **self._arguments(plan, stack, start), **results).cpu()
                state = part if state is None else state.add_(part)
        assert state is not None
        return state

    def parent(self, ref: ModelRef) -> ParentView:
        """One of the models as the merge sees it: under the output's names, with the output's rows."""
        return ParentView(self, ref)

    # ---- copies, checks, buffers

    def _copy(self, plan: TensorPlan, out: Tensor, start: int) -> None:
        first, *others = plan.inputs
        self._checkpoints[first.model].read_into(first.tensor, out, start)
        for part in others:
            other = torch.empty_like(out)
            self._checkpoints[part.model].read_into(part.tensor, other, start)
            if not torch.equal(out, other):
                raise MismatchError(
                    f"{plan.name} ({plan.spec.dtype}) is not floating point and differs between {first.model} and "
                    f"{part.model}: it cannot be merged. Use models that agree on it."
                )

    def _refuse_nonfinite(self, buffer: Tensor, parts: tuple[Input, ...], start: int) -> None:
        for row, part in zip(buffer, parts, strict=True):
            bad = torch.nonzero(~torch.isfinite(row))
            if len(bad):
                raise NonFiniteError(
                    f"{part.model}: {part.tensor} holds {row[bad[0]].item()} at element {start + int(bad[0])}. "
                    "Use an intact model, or set `nonfinite: allow` in the recipe to let it through."
                )

    def _check_result(self, plan: TensorPlan, merged: Tensor, start: int) -> None:
        """Refuse a result that its dtype cannot hold; NaN and infinity of the inputs are dealt with before."""
        if self.plan.recipe.allow_nonfinite:
            return
        low, high = (float(bound) for bound in torch.aminmax(merged))
        largest = torch.finfo(torch_dtype(plan.spec.dtype)).max
        if not (low >= -largest and high <= largest):  # so written that NaN is refused too
            name, entry = dtype_name(plan.spec.dtype), int(torch.nonzero(~(merged.abs() <= largest))[0])
            raise NonFiniteError(
                f"{plan.name}: the merged values reach from {low:g} to {high:g}, and {name} ends at {largest:g} (the "
                f"first beyond it is element {start + entry}, {float(merged[entry]):g}, of "
                f"{_listed(plan)}): set a wider `dtype`, or smaller weights"
            )

    def _on_cpu(self, tensor: str) -> bool:
        return self._devices.get(tensor, "cpu") == "cpu"

    def _device(self, tensor: str) -> torch.device:
        return torch.device(self._devices.get(tensor, "cpu"))

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        """On CUDA a stream of this thread's own, so that one worker's copies overlap with another's arithmetic."""
        if device.type != "cuda":
            yield
            return
        streams = self._buffers.__dict__.setdefault("streams", {})
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
        try:
            with torch.cuda.stream(streams[device]):
                yield
        except torch.OutOfMemoryError:
            raise DeviceError(
                f"{device} ran out of memory: use fewer workers (--num-workers) or --device cpu"
            ) from None

    def _buffer(self, rows: int, count: int, pinned: bool) -> Tensor:
        """This thread's float64 memory, (rows, count): reused, as fresh pages cost more than the arithmetic."""
        held = getattr(self._buffers, "held", None)
        if held is None or held.numel() < rows * count:
            held = self._buffers.held = torch.empty(rows * count, dtype=torch.float64, pin_memory=pinned)
        return held[: rows * count].view(rows, count)


class ParentView(Checkpoint):
    """A model under the names, shapes and rows of the merge that it goes into."""

    def __init__(self, merged: MergedCheckpoint, ref: ModelRef) -> None:
        self.name, self.merged, self.ref = ref.text, merged, ref
        self.tensors, self.config = merged.tensors, merged.config

    @property
    def code(self) -> Path | None:
        return self.merged.code

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        plan = self.merged.plan.tensors[tensor]
        parts = plan.everyone
        part = next((p for p in parts if p.model == self.ref), parts[0])  # a computed buffer: the first model's
        self.merged.fill(out, part, start)


def _listed(plan: TensorPlan) -> str:
    return ", ".join(str(part.model) for part in plan.everyone)


def _numeric(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, int | float) for v in value)
