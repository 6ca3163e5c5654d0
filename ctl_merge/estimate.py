"""What a plan costs: bytes and memory, from headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ctl_merge import hub
from ctl_merge.checkpoint import CHUNK, FileCheckpoint
from ctl_merge.merged import MergedCheckpoint
from ctl_merge.plan import Plan, TensorPlan
from ctl_merge.reference import ModelRef
from ctl_merge.writer import Shard

# Interpreter, torch and, where names or ties leave a question, transformers, before the first tensor: measured as
# anonymous memory (benchmarks/memory.py).
INTERPRETER_BYTES = 300_000_000
# Copies of a chunk that a method holds besides its inputs, as a multiple of their number (TIES is the largest).
_TEMPORARIES = 5
_LEAST_STATE = 8 * ((1 << 15) + (1 << 16))  # of a method that measures, for each model: that of one order statistic


@dataclass(frozen=True)
class Estimate:
    """Bytes. `memory` is a bound on anonymous memory, whatever the size of the model."""

    read: int
    download: int
    write: int
    memory: int
    passes: int  # over all inputs, before the merge itself


def estimate(
    plan: Plan,
    merged: MergedCheckpoint,
    checkpoints: Mapping[ModelRef, FileCheckpoint],
    shards: tuple[Shard, ...],
    workers: int,
) -> Estimate:
    """What carrying out the plan with so many workers takes."""
    inputs = sum(_input_bytes(tensor, checkpoints) for tensor in plan.tensors.values())
    passes = merged.model_passes
    return Estimate(
        read=inputs * (1 + passes), passes=passes, download=sum(missing_bytes(c) for c in checkpoints.values()),
        write=sum(shard.nbytes for shard in shards), memory=memory_bound(plan, workers, chunk_of(merged)),
    )  # fmt: skip


def memory_bound(plan: Plan, workers: int, chunk: int = CHUNK) -> int:
    """Anonymous memory at most: 2 × workers × (chunk × 8 bytes × (temporaries × models + base) + histograms).

    Twice, as the allocator keeps about as much again as is in use.
    """
    models = max((len(tensor.inputs) for tensor in plan.tensors.values()), default=1)
    largest = max((tensor.spec.numel for tensor in plan.tensors.values()), default=0)
    entries = largest if plan.method.grain == "tensor" else min(chunk, largest)
    measures = plan.method.measures.values()
    states = 2 * models * max(_LEAST_STATE, sum(measure.state_bytes for measure in measures)) if measures else 0
    noise = 2 * models if plan.method.random else 0
    each = 8 * entries * (_TEMPORARIES * models + noise + 4) + states + 8 * CHUNK
    return INTERPRETER_BYTES + 2 * workers * each


def _input_bytes(tensor: TensorPlan, checkpoints: Mapping[ModelRef, FileCheckpoint]) -> int:
    parts = (*tensor.inputs, tensor.base) if tensor.base else tensor.inputs
    return sum(checkpoints[part.model].tensors[part.tensor].nbytes for part in parts)


def chunk_of(merged: MergedCheckpoint) -> int:
    """The most entries of a tensor that a worker holds at once."""
    return max((merged.block(name) for name in merged.tensors), default=CHUNK)


def missing_bytes(checkpoint: FileCheckpoint) -> int:
    """What is to be downloaded of a checkpoint's weights."""
    if checkpoint.snapshot is None:
        return 0
    there = hub.cached(checkpoint.snapshot, checkpoint.file_sizes)
    return sum(size for file, size in checkpoint.file_sizes.items() if file not in there)
