"""What a plan costs: bytes and memory, from headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ctl_merge.checkpoint import CHUNK, FileCheckpoint
from ctl_merge.merged import MergedCheckpoint
from ctl_merge.plan import Plan, TensorPlan
from ctl_merge.reference import ModelRef
from ctl_merge.writer import Shard

# Interpreter, torch and, where names or ties leave a question, transformers, before the first tensor: measured as
# anonymous memory (benchmarks/merge_speed.py).
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
    memory: int,
) -> Estimate:
    """What carrying out the plan with so many workers takes."""
    inputs = input_bytes(plan, checkpoints)
    passes = merged.measures.passes
    sources = {ref: source for checkpoint in checkpoints.values() for ref, source in checkpoint.sources().items()}
    return Estimate(
        read=inputs * (1 + passes), passes=passes, download=sum(source.missing_bytes() for source in sources.values()),
        write=sum(shard.nbytes for shard in shards), memory=memory,
    )  # fmt: skip


def memory_bound(merges: Iterable[MergedCheckpoint], workers: int) -> int:
    """Anonymous memory at most: 2 × workers × (chunk × 8 bytes × (temporaries × models + base) + histograms).

    Twice, as the allocator keeps about as much again as is in use. What models keep to read on (adapters) counts like
    histograms. `merges`: the merge, and those that it reads.
    """
    return INTERPRETER_BYTES + 2 * workers * sum(_held(merged) for merged in merges)


def _held(merged: MergedCheckpoint) -> int:
    """What one worker holds for one merge."""
    plan, chunk = merged.plan, chunk_of(merged)
    models = max((len(tensor.inputs) for tensor in plan.tensors.values()), default=1)
    entries = max((_at_once(plan, tensor, chunk) for tensor in plan.tensors.values()), default=0)
    measures = plan.method.measures.values()
    states = 2 * models * max(_LEAST_STATE, sum(measure.state_bytes for measure in measures)) if measures else 0
    noise = 2 * models if plan.method.random else 0
    return 8 * entries * (_TEMPORARIES * models + noise + 4) + states + 8 * CHUNK + merged.working_bytes()


def _at_once(plan: Plan, tensor: TensorPlan, chunk: int) -> int:
    """How many entries of a tensor are merged in one call, at most."""
    whole = tensor.operation == "merge" and plan.method.grain_for(tensor.parameters) == "tensor"
    return tensor.spec.numel if whole else min(chunk, tensor.spec.numel)


def input_bytes(plan: Plan, checkpoints: Mapping[ModelRef, FileCheckpoint]) -> int:
    """What reading every input once reads from files."""
    parts = (part for tensor in plan.tensors.values() for part in tensor.everyone)
    return sum(checkpoints[part.model].read_bytes(part.tensor) for part in parts)


def chunk_of(merged: MergedCheckpoint) -> int:
    """The most entries of a tensor that a worker holds at once."""
    return max((merged.step(name) for name in merged.tensors), default=CHUNK)
