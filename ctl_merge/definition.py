"""What a merge's method defines, computed with torch in float64."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from ctl_merge.checkpoint import CHUNK, torch_dtype
from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import DeviceError, NonFiniteError
from ctl_merge.header import dtype_name
from ctl_merge.inputs import Inputs
from ctl_merge.measures import Results, tensors
from ctl_merge.methods.noise import uniform
from ctl_merge.methods.registry import Grain
from ctl_merge.plan import Plan, TensorPlan
from ctl_merge.reference import ModelRef
from ctl_merge.token_rows import Input
from ctl_merge.workers import compute_alone

# An accelerator wants larger pieces than a cache does, or launching kernels costs more than running them.
DEVICE_CHUNK = 32 * CHUNK

Decode = Callable[[TensorPlan, int, Tensor], bool]


class Evidence(Protocol):
    """Statistics of models on texts, by model and tensor: see `ctl_merge.evidence`."""

    def of(self, ref: ModelRef, tensor: str, start: int = 0, count: int | None = None) -> Tensor | None: ...
    def transposed(self, ref: ModelRef, tensor: str) -> bool: ...


class Definition:
    """The merge of any piece of a tensor, as the method's function has it: on chunks, rows or whole tensors.

    In float64, unrounded. (In float32 one 16-bit result in a few hundred would fall on the wrong side: few-digit
    weights often put it just between two values.) Thread-safe: every thread has buffers of its own. `devices` says
    where the arithmetic of each tensor happens, by default the CPU. `decode(tensor, start, stack)` may fill the stack
    with the inputs from `start` on, the base subtracted, and says whether it did.
    """

    def __init__(
        self, plan: Plan, inputs: Inputs, devices: Mapping[str, str], decode: Decode = lambda plan, start, stack: False
    ) -> None:  # fmt: skip
        self._recipe, self._method, self._inputs, self.devices = plan.recipe, plan.method, inputs, devices
        self._decode = decode
        self.evidence: Evidence | None = None  # for methods that want a statistic of each model on its own text
        self._accepted = inspect.signature(self._method.function).parameters
        self._columns: dict[int, Mapping[str, Any]] = {}
        self._buffers = threading.local()

    def grain(self, plan: TensorPlan) -> Grain:
        """On what of the tensor the method is called at once."""
        return self._method.grain_for(plan.parameters) if plan.operation == "merge" else "element"

    def step(self, plan: TensorPlan) -> int:
        """How many entries are computed at once."""
        if self.grain(plan) == "tensor":
            return max(1, plan.spec.numel)
        most = max(CHUNK if self.on_cpu(plan) else DEVICE_CHUNK, *map(self._inputs.block, plan.everyone))
        if self.grain(plan) == "element":
            return most
        return plan.spec.width * max(1, most // plan.spec.width)

    def read_into(self, plan: TensorPlan, results: Results, out: Tensor, start: int) -> None:
        """Fill `out` with the merged entries from `start` on, rounded to its dtype."""
        stop = start + out.numel()
        with self._on(self._device(plan)):
            for begin, end in self._pieces(plan, start, stop):
                merged = self._merge(plan, begin, end - begin, results)
                self.check(plan, merged, begin)
                wanted = merged[max(start - begin, 0) : stop - begin]
                # Waits for the device, so that the pinned buffer may be filled again.
                out[max(begin - start, 0) :][: wanted.numel()].copy_(wanted)

    def accumulate(self, plan: TensorPlan, name: str, results: Results) -> Tensor:
        """The state of one of the method's measures over a whole tensor, given the results of those before it."""
        compute_alone()
        measure, results = self._method.measures[name], tensors(results)
        state: Tensor | None = None
        with self._on(self._device(plan)):
            for start, end in self._pieces(plan, 0, plan.spec.numel):
                stack, _ = self.stack(plan, start, end - start)
                part = measure.accumulate(stack, **self._arguments(plan, stack, start), **results).cpu()
                state = part if state is None else state.add_(part)
        assert state is not None
        return state

    def coefficients(self, plan: TensorPlan, results: Results) -> list[float]:
        """The c of a linear method's Σ c x, in the order of the tensor's inputs."""
        each = torch.eye(len(plan.inputs), dtype=torch.float64)
        return self._method.function(each, **self._arguments(plan, each, 0), **self._wanted(results)).tolist()

    def columns(self, plan: TensorPlan) -> Mapping[str, Any]:
        """The parameters, per-model ones as float64 columns (models,)."""
        key = id(plan.parameters)
        if key not in self._columns:
            self._columns[key] = {n: np.array(v, float) if _numeric(v) else v for n, v in plan.parameters.items()}
        return self._columns[key]

    def stack(self, plan: TensorPlan, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """The inputs' entries on the tensor's device, shaped as the method's grain says, and the base's (count,).

        For methods that work on task vectors the base is subtracted. Both are views of this thread's buffer. Raises
        NonFiniteError where NaN or infinity is among the entries, and is not let through.
        """
        parts = plan.everyone
        device = self._device(plan)
        buffer = self._buffer(len(parts), count, pinned=device.type == "cuda")
        if self._decode(plan, start, buffer):
            stack, base = (buffer, None) if plan.base is None else (buffer[:-1], buffer[-1])
            return self._shaped(stack, plan), base
        for row, part in zip(buffer, parts, strict=True):
            self._inputs.fill(row, part, start)
        if not self._recipe.allow_nonfinite and not torch.isfinite(buffer.sum()):
            self._refuse_nonfinite(buffer, parts, start)
        if device.type != "cpu":
            buffer = buffer.to(device, non_blocking=True)
        if plan.base is None:
            return self._shaped(buffer, plan), None
        return self._shaped(buffer[:-1].sub_(buffer[-1]), plan), buffer[-1]

    def check(self, plan: TensorPlan, merged: Tensor, start: int) -> None:
        """Refuse a result that its dtype cannot hold; NaN and infinity of the inputs are dealt with before."""
        if self._recipe.allow_nonfinite:
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

    def on_cpu(self, plan: TensorPlan) -> bool:
        """Whether the arithmetic of a tensor happens on the CPU."""
        return self.devices.get(plan.name, "cpu") == "cpu"

    # ---- one piece

    def _pieces(self, plan: TensorPlan, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """What is computed at once for the entries [start, stop): chunks of them, or the whole blocks that they lie in.

        Rows and tensors come in the same blocks whatever is asked for, so that a sum over a row has the same bits.
        """
        step = self.step(plan)
        whole = self.grain(plan) != "element"
        for begin in range(start - start % step if whole else start, stop, step):
            yield begin, min(begin + step, plan.spec.numel if whole else stop)

    def _merge(self, plan: TensorPlan, start: int, count: int, results: Results) -> Tensor:
        """Unrounded values of the entries [start, start + count) of a tensor."""
        # First: it may be of inputs that come out of this merge, whose reading uses the same buffers.
        statistic = self._statistic(plan, start, count) if self._method.statistic else None
        stack, base = self.stack(plan, start, count)
        arguments = {**self._arguments(plan, stack, start), **self._wanted(results)}
        try:
            if self._method.statistic:
                merged = self._on_statistic(plan, stack, statistic, arguments)
            else:
                merged = self._method.function(stack, **arguments)
        except torch.linalg.LinAlgError as error:
            raise NonFiniteError(
                f"{plan.name}: {self._method.name} finds no decomposition of {_listed(plan)} ({error}). "
                "Look at these tensors with `ctl-merge compare`, or leave one of the models out."
            ) from None
        return merged.flatten().add_(base) if base is not None else merged.flatten()

    def _shaped(self, stack: Tensor, plan: TensorPlan) -> Tensor:
        """(models, count) as (models, rows, width) or (models, *shape) where the method wants it so."""
        grain = self.grain(plan)
        if grain == "element":
            return stack
        return stack.view(len(stack), *((-1, plan.spec.width) if grain == "row" else plan.spec.shape))

    def _wanted(self, results: Results) -> dict[str, Any]:
        """Those results that the method itself takes, as tensors."""
        return tensors({name: result for name, result in results.items() if name in self._accepted})

    def _arguments(self, plan: TensorPlan, stack: Tensor, start: int) -> dict[str, Any]:
        """The parameters: per-model ones as float64 columns, shared ones as they are; noise where it is due."""
        ones = [1] * (stack.ndim - 1)
        columns = {n: v.reshape(-1, *ones) if isinstance(v, np.ndarray) else v for n, v in self.columns(plan).items()}
        arguments = tensors(columns)
        if self._method.random:
            seed, count = self._recipe.seed, stack[0].numel()
            rows = [uniform(seed, part.model.short, part.tensor, start, count) for part in plan.inputs]
            arguments["noise"] = torch.stack(rows).view(stack.shape).to(stack.device)
        return arguments

    def _statistic(self, plan: TensorPlan, start: int, count: int) -> Tensor | None:
        """What the method wants to know of each model on its own text: (models, …), None if one has none."""
        evidence, parts = self.evidence, [(part.model, part.tensor) for part in plan.inputs]
        assert evidence is not None
        if self._method.statistic == "fisher":  # entry by entry: rows that are another token's have none
            same = all(part.rows is None for part in plan.inputs)
            found = [evidence.of(*part, start, count) if same else None for part in parts]
        else:
            found = [evidence.of(*part) for part in parts]
        known = [statistic for statistic in found if statistic is not None]
        return torch.stack(known) if len(known) == len(found) else None

    def _on_statistic(self, plan: TensorPlan, stack: Tensor, statistic: Tensor | None, arguments: dict) -> Tensor:
        """The method's result with the statistic under its name; its layers' weights are (out, in)."""
        name, first = self._method.statistic, plan.inputs[0]
        assert self.evidence is not None and name is not None
        turned = name == "gram" and self.evidence.transposed(first.model, first.tensor)
        own = statistic.to(stack.device) if statistic is not None else None
        merged = self._method.function(stack.mT if turned else stack, **arguments, **{name: own})
        return merged.mT.contiguous() if turned else merged

    def _refuse_nonfinite(self, buffer: Tensor, parts: tuple[Input, ...], start: int) -> None:
        for row, part in zip(buffer, parts, strict=True):
            bad = torch.nonzero(~torch.isfinite(row))
            if len(bad):
                raise NonFiniteError(
                    f"{part.model}: {part.tensor} holds {row[bad[0]].item()} at element {start + int(bad[0])}. "
                    "Use an intact model, or set `nonfinite: allow` in the recipe to let it through."
                )

    # ---- devices and buffers

    def _device(self, plan: TensorPlan) -> torch.device:
        return torch.device(self.devices.get(plan.name, "cpu"))

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


def _listed(plan: TensorPlan) -> str:
    return ", ".join(str(part.model) for part in plan.everyone)


def _numeric(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, int | float) for v in value)
