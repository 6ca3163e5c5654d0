"""Whether heads are tied to embeddings, which only weights tell."""

from __future__ import annotations

from collections.abc import Mapping

from ctl_merge.checkpoint import CHUNK, FileCheckpoint, torch_dtype
from ctl_merge.deferred import torch
from ctl_merge.plan import Plan
from ctl_merge.reference import ModelRef
from ctl_merge.token_rows import Input


def settle_ties(plan: Plan, checkpoints: Mapping[ModelRef, FileCheckpoint]) -> Plan:
    """The plan with its open ties decided: a tensor is left out where every model has the same as in its source."""
    for target, source in plan.tied.items():
        if target not in plan.tensors:
            continue
        heads, embeddings = ({p.model: p for p in plan.tensors[name].everyone} for name in (target, source))
        apart = [m for m, head in heads.items() if m not in embeddings or not _same(checkpoints, head, embeddings[m])]
        if apart:
            decision = f"{target} differs from {source} in {apart[0]}: both are written, untied"
        else:
            decision = f"{target} is tied to {source} in every model: not written"
        plan = plan.settled(target, decision, leave=not apart)
    return plan


def _same(checkpoints: Mapping[ModelRef, FileCheckpoint], one: Input, other: Input) -> bool:
    if one == other:
        return True
    checkpoint = checkpoints[one.model]
    spec = checkpoint.tensors[one.tensor]
    if spec != checkpoint.tensors[other.tensor]:
        return False
    step = max(checkpoint.block(one.tensor), checkpoint.block(other.tensor), CHUNK)
    buffers = torch.empty(2, min(step, spec.numel), dtype=torch_dtype(spec.dtype))
    for start in range(0, spec.numel, step):
        pair = buffers[:, : min(step, spec.numel - start)]
        for row, part in zip(pair, (one, other), strict=True):
            checkpoint.read_into(part.tensor, row, start)
        if not torch.equal(pair[0], pair[1]):
            return False
    return True
