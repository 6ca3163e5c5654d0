"""How long a merge takes, from a short measurement."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ctl_merge.checkpoint import CHUNK, FileCheckpoint
from ctl_merge.counting import LOOP_CHUNK
from ctl_merge.deferred import Tensor, torch
from ctl_merge.estimate import input_bytes
from ctl_merge.header import TensorSpec
from ctl_merge.merged import MergedCheckpoint
from ctl_merge.merging import Merge
from ctl_merge.plan import Plan, TensorPlan
from ctl_merge.rates import Map, Rates, dirty_limit, measure_rates
from ctl_merge.reference import ModelRef
from ctl_merge.workers import pool

_SMALL, _LARGE = 1 << 12, 32 * CHUNK  # entries of the tensors that are merged to measure
_SIDE = 768  # of the matrices that methods on whole matrices are measured on
_KINDS = 4  # of tensors that are measured, those with the most entries
_LOADING = 1.0  # seconds at most to load compiled loops


def predict(opened: Merge, output: Path, hash_files: bool = True) -> dict[str, Any]:
    """Seconds that a merge takes in one process, whole and by what they are spent on, and what was measured for that.

    Measures for a few seconds: reads pieces of the sources, writes (and deletes) a file beside the output, merges
    made-up tensors by the recipe's method, hashes. Raises OutputError where that place cannot be written.
    """
    begun = time.perf_counter()
    started = _seconds_of_this_process() + _torch_seconds(opened)
    with pool(opened.workers) as mapped:
        loading, measuring, merging = _arithmetic(opened, mapped)
        files = [source.folder / file for source in opened.sources.values() for file in source.file_sizes]
        rates = measure_rates(files, output, opened.workers, mapped)
    parts = {"start": started + loading, **_reading(opened, rates), "measure": measuring, "merge": merging}
    written = sum(shard.nbytes for shard in opened.shards)
    parts["write"] = written / rates.write
    throttled = max(0.0, (written - dirty_limit()) / rates.disk)
    parts["hash"] = _hashing(opened, rates.hash) if hash_files else 0.0
    busy = sum(parts[name] for name in ("read", "measure", "merge", "write"))
    waiting = max(parts.pop("wait"), throttled)
    # While one worker waits for the disk the others work; a lone one cannot.
    pace = busy + waiting if opened.workers == 1 else max(busy, waiting)
    parts["wait"] = pace - busy
    total = parts["start"] + pace + parts["hash"]
    return {
        "seconds": round(total, 2), "parts": {name: round(value, 2) for name, value in parts.items()},
        "bytes_per_second": {
            "read": rates.warm, "read_cold": rates.cold, "write": rates.write, "disk": rates.disk, "hash": rates.hash,
            "merge": sum(t.spec.nbytes for t in opened.plan.tensors.values()) / merging if merging else None,
        },
        "cached": rates.warm_share, "workers": opened.workers, "notes": _notes(opened),
        "calibrated_in": round(time.perf_counter() - begun, 2),
    }  # fmt: skip


def _notes(opened: Merge) -> list[str]:
    """What the prediction leaves out."""
    found = []
    if any(source.missing_bytes() for source in opened.sources.values()):
        found.append("downloads")
    if any(merged.method.statistic for merged in opened.merges):
        found.append("running the models on text, and the arithmetic that needs its statistics")
    if any(checkpoint.working_bytes() for checkpoint in opened.checkpoints.values()):
        found.append("the products of adapters")
    return found


def _torch_seconds(opened: Merge) -> float:
    """What the import of torch, which measuring takes in any case, takes of the merge."""
    begun = time.perf_counter()
    torch.get_num_threads()
    return (time.perf_counter() - begun) * any(merged.needs_torch for merged in opened.merges)


# ---- arithmetic


@dataclass(frozen=True)
class Round:
    """Bytes of a piece of memory whose entries come round after a chunk."""

    memory: np.ndarray

    def bytes(self, start: int, size: int) -> np.ndarray | None:
        found = self.memory[start % (2 * CHUNK) :][:size]
        return found if found.size == size else None


class Drawn(FileCheckpoint):
    """Made-up numbers in the place of a model's: near 0, and of no two models the same. They come round after a chunk.

    Stored bfloat16 is worked on where it lies, as a mapped file's is.
    """

    def __init__(self, ref: ModelRef, like: FileCheckpoint, seed: int) -> None:
        self.ref, self.name, self.config, self.tensors = ref, str(ref), like.config, {}
        values = torch.randn(CHUNK, generator=torch.Generator().manual_seed(seed))
        self._values, self._like = (values * 0.02).bfloat16(), like
        self._round = Round(self._values.repeat(1 + LOOP_CHUNK // CHUNK).view(torch.uint8).numpy())

    def fetch(self) -> None:
        pass

    def stored_as(self, tensor: str) -> str | None:
        return self._like.stored_as(tensor.rpartition(".")[0])

    def mapped(self, tensor: str) -> Round | None:
        return self._round if self._like.mapped(tensor.rpartition(".")[0]) else None

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        filled = 0
        while filled < out.numel():
            at = (start + filled) % CHUNK
            piece = out[filled : filled + CHUNK - at]
            piece.copy_(self._values[at : at + piece.numel()])
            filled += piece.numel()


def _arithmetic(opened: Merge, mapped: Map) -> tuple[float, float, float]:
    """Seconds before the first tensor, of measuring whole models, and of merging, without reading and writing.

    Steps are merged once.
    """
    loading = measuring = merging = 0.0
    for merged in opened.merges:
        if merged.method.statistic:
            continue
        drawn: dict[ModelRef, FileCheckpoint] = {
            ref: Drawn(ref, like, seed) for seed, (ref, like) in enumerate(merged.checkpoints.items())
        }
        kinds: dict[Any, list[TensorPlan]] = {}
        for tensor in merged.plan.tensors.values():
            if tensor.operation == "merge" and tensor.spec.numel:
                kinds.setdefault(_kind(merged, tensor), []).append(tensor)
        sizes = {key: sum(_work(merged, tensor) for tensor in tensors) for key, tensors in kinds.items()}
        measured = sorted(kinds, key=lambda key: -sizes[key])[:_KINDS]
        share = sum(sizes[key] for key in measured) / max(1, sum(sizes.values()))
        for key in measured:
            costs = _cost_of_kind(merged, kinds[key], drawn, opened.workers, mapped)
            loading = max(loading, costs[0])
            measuring, merging = measuring + costs[1] / share, merging + costs[2] / share
    return loading, measuring, merging


def _kind(merged: MergedCheckpoint, tensor: TensorPlan) -> Any:
    """Tensors of a kind take the same time for the same number of entries."""
    grain = merged.method.grain_for(tensor.parameters)
    width = tensor.spec.shape[-1] if grain == "row" and tensor.spec.shape else 0
    matrix = grain == "tensor" and len(tensor.spec.shape) == 2
    return (len(tensor.inputs), id(tensor.parameters), tensor.spec.dtype, grain, width, matrix)


def _work(merged: MergedCheckpoint, tensor: TensorPlan) -> float:
    """What the time of a tensor grows with: its entries; for decompositions of matrices, times the shorter side."""
    shape = tensor.spec.shape
    whole = merged.method.grain_for(tensor.parameters) == "tensor" and len(shape) == 2
    return float(tensor.spec.numel) * (min(shape) if whole else 1)


def _cost_of_kind(
    merged: MergedCheckpoint, tensors: list[TensorPlan], drawn: dict[ModelRef, FileCheckpoint], workers: int,
    mapped: Map,
) -> tuple[float, float, float]:  # fmt: skip
    """Seconds that the first tensor takes more than others, and of measuring and of merging tensors of a kind.

    These have a fixed part for each tensor, and one that grows.
    """

    def run(count: int, shape: tuple[int, ...]) -> tuple[float, float, float]:
        sample = _sample(merged, likely, shape, count, drawn)
        begun = measured = time.perf_counter()
        if sample.measures.passes:
            sample.measures.take(mapped)
            measured = time.perf_counter()
        for _ in mapped(lambda name: _read_whole(sample, name), list(sample.tensors)):
            pass
        return measured - begun, time.perf_counter() - measured, _work(sample, next(iter(sample.plan.tensors.values())))

    likely = max(tensors, key=lambda tensor: _work(merged, tensor))
    small, large = _shape(merged, likely, _SMALL), _shape(merged, likely, _LARGE)
    first = sum(run(workers, small)[:2])  # makes buffers, and loads compiled loops
    few, many, big = run(workers, small), run(9 * workers, small), run(workers, large)
    work = sum(_work(merged, tensor) for tensor in tensors)
    found = []
    for one, more, most in zip(few[:2], many[:2], big[:2], strict=True):
        growing = max(0.0, most - one) / (workers * max(1.0, big[2] - few[2]))
        fixed = max(0.0, (more - one) / (8 * workers) - growing * few[2])
        found.append(fixed * len(tensors) + growing * work)
    # What had to be compiled is not compiled again.
    return min(_LOADING, max(0.0, first - sum(few[:2]))), found[0], found[1]


def _shape(merged: MergedCheckpoint, tensor: TensorPlan, entries: int) -> tuple[int, ...]:
    """That of a smaller tensor of the kind; a matrix that is decomposed keeps its proportions."""
    shape, grain = tensor.spec.shape, merged.method.grain_for(tensor.parameters)
    if grain == "tensor" and len(shape) == 2:
        scale = min(1.0, (_SIDE if entries == _LARGE else 64) / max(shape))
        return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
    entries = min(entries, tensor.spec.numel)
    if grain == "row" and shape:
        return max(1, entries // max(1, shape[-1])), shape[-1]
    return (entries,)


def _sample(
    merged: MergedCheckpoint, tensor: TensorPlan, shape: tuple[int, ...], count: int,
    drawn: dict[ModelRef, FileCheckpoint],
) -> MergedCheckpoint:  # fmt: skip
    """The merge of so many made-up tensors as the recipe merges this one, on its device."""
    spec = TensorSpec(tensor.spec.dtype, shape)
    tensors = {}
    for index in range(count):
        name = f"{tensor.name}.{index}"
        parts = [replace(part, tensor=f"{part.tensor}.{index}", rows=None) for part in tensor.everyone]
        base = parts.pop() if tensor.base else None
        tensors[name] = TensorPlan(name, spec, "merge", tuple(parts), base, tensor.parameters)
    plan: Plan = replace(merged.plan, tensors=tensors)
    devices = dict.fromkeys(tensors, merged.devices.get(tensor.name, "cpu"))
    return MergedCheckpoint(plan, drawn, devices, merged.has_loops)


def _read_whole(sample: MergedCheckpoint, name: str) -> None:
    """As the writer reads: block after block."""
    spec, step = sample.tensors[name], sample.block(name)
    out = np.empty(min(step, spec.numel) * spec.itemsize, np.uint8)
    for start in range(0, spec.numel, step):
        sample.bytes_into(name, out[: min(step, spec.numel - start) * spec.itemsize], start)


# ---- reading and hashing


def _reading(opened: Merge, rates: Rates) -> dict[str, float]:
    """Seconds of copying what is read out of the kernel's cache, and of waiting for what is not in it."""
    once = copied = 0
    for merged in opened.merges:
        scopes = [merged.method.scopes(t.parameters) for t in merged.plan.tensors.values() if t.operation == "merge"]
        # Bytes that are worked on where they lie stay at hand for all that is measured of one tensor.
        passes = 1 + max((sum(merged.copies or s == "model" for s in scope.values()) for scope in scopes), default=0)
        inputs = input_bytes(merged.plan, merged.checkpoints)
        once, copied = once + inputs, copied + inputs * passes
    cold = (1 - rates.warm_share) * once / rates.cold if rates.cold else 0.0
    return {"read": copied / rates.warm, "wait": cold}


def _hashing(opened: Merge, rate: float) -> float:
    """Files are hashed whole, each by one worker: no sooner than the largest one."""
    sizes = [shard.nbytes for shard in opened.shards]
    sizes += [size for s in opened.sources.values() if s.snapshot is None for size in s.file_sizes.values()]
    return max(sum(sizes) / rate, max(sizes, default=0) / (rate / opened.workers))


def _seconds_of_this_process() -> float:
    """Since it was started: what a merge takes too before its first tensor."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return up - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.process_time()
