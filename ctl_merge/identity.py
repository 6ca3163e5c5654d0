"""All on which the bytes of an output depend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

import ctl_merge
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.deferred import torch_version
from ctl_merge.errors import MismatchError
from ctl_merge.plan import Plan
from ctl_merge.processes import Ranks
from ctl_merge.reference import ModelRef
from ctl_merge.writer import Shard


def identity(
    plan: Plan, sources: Mapping[ModelRef, FileCheckpoint], shards: tuple[Shard, ...], devices: Mapping[str, str]
) -> dict[str, Any]:
    """The plan, the sources' state, the cut into shards, what computes: by words for them."""
    return {
        "recipe": plan.recipe.text,
        "sources": [source.state() for source in sources.values()],
        "plan": [(t.name, str(t.spec), t.operation, str(t.inputs), str(t.parameters)) for t in plan.tensors.values()],
        "shards": [(shard.file, list(shard.specs)) for shard in shards],
        "devices": sorted({device.partition(":")[0] for device in devices.values()}),
        "versions": [ctl_merge.__version__, torch_version(), np.__version__],
    }


def agreed_fingerprint(own: Mapping[str, Any], ranks: Ranks) -> str:
    """The digest of an identity. Raises MismatchError, on all ranks, where theirs differ, and says in what."""
    digests = {what: _digest(content) for what, content in own.items()}
    every = ranks.gather(digests)
    differing = [
        f"rank {index}: {', '.join(what for what in own if found[what] != every[0][what])}"
        for index, found in enumerate(every)
        if found != every[0]
    ]
    if differing:
        error = MismatchError(
            f"the processes do not plan the same merge as rank 0; what differs: {'; '.join(differing)}. Give all the "
            "same files (copied with their times, as by rsync -a), options and versions."
        )
        error.agreed = True
        raise error
    return _digest(digests)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
