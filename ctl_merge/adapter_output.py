"""An adapter's folder: fitted by module, resumable, whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctl_merge.adapter_files import AdapterLayout, Form, Held
from ctl_merge.adapter_fit import Fit
from ctl_merge.adapter_targets import Target, Targets
from ctl_merge.checkpoint import Checkpoint
from ctl_merge.deferred import Tensor
from ctl_merge.errors import CheckpointError
from ctl_merge.header import TensorSpec, local_header
from ctl_merge.output import OutputFolder, disk_errors
from ctl_merge.reference import ModelRef
from ctl_merge.stored import ADAPTER_CONFIG, StoredCheckpoint
from ctl_merge.workers import pool
from ctl_merge.writer import Shard, ShardWriter

WEIGHTS = "adapter_model.safetensors"
_PARTS = "parts"

Meter = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True)
class Wanted:
    """A parameter whose change goes into the adapter, and how."""

    target: Target
    form: Form
    rows: tuple[int, ...] = ()


def completed(wanted: Sequence[Wanted], targets: Targets) -> list[Wanted]:
    """With all parameters of the modules of which one is stored whole: PEFT loads such modules as a whole."""
    whole = {own.target.module for own in wanted if own.form == "whole"}
    others = [own for own in wanted if own.target.module not in whole]
    return [*others, *(Wanted(target, "whole") for target in targets.parameters if target.module in whole)]


class AdapterWriter:
    """Fits what is wanted and writes it into `folder`, a part a file, so that an interrupted run goes on.

    Raises CheckpointError where nothing is left that LoRA's matrices could hold.
    """

    def __init__(self, folder: Path, fit: Fit, wanted: Sequence[Wanted], targets: Targets) -> None:
        self.folder, self.fit, self.wanted, self.targets = folder, fit, wanted, targets
        self._parts = folder / _PARTS
        self._lock = threading.Lock()

    def write(
        self, workers: int, meter: Meter, base: tuple[str | None, str | None], config: Mapping[str, Any]
    ) -> tuple[list[Held], Shard]:
        """Everything but card and manifest. `base`: the name and revision of the model that the adapter belongs on."""
        self._parts.mkdir(exist_ok=True)
        with meter("fitting", len(self.wanted)) as told, pool(workers) as mapped:
            held = []
            for own in mapped(self._part, range(len(self.wanted))):
                held.append(own)
                told(1)
        kept = {i: own for i, own in enumerate(held) if own.form != "low_rank" or own.rank}
        layout = AdapterLayout(list(kept.values()), self.targets)
        if not layout.low:
            raise CheckpointError("nothing is changed that LoRA's matrices could hold: PEFT loads no adapter without")
        layout.write_config(self.folder, *base, config)
        parts = _Parts(self.folder, layout, kept)
        shard = Shard(WEIGHTS, parts.tensors)
        ShardWriter(self.folder, (shard,), parts, counted=self.fit.allow_nonfinite).write(workers)
        shutil.rmtree(self._parts)
        return list(kept.values()), shard

    def _part(self, number: int) -> Held:
        """What is held of one parameter; fitted, unless an earlier run has done it."""
        wanted, path = self.wanted[number], self._parts / f"{number}.safetensors"
        if path.exists():
            return _remembered(wanted, json.loads(local_header(path).metadata["held"]))
        held, tensors = self.fit.hold(wanted.target, wanted.form, wanted.rows)
        self._save(path, held, {f"{number}.{name}": tensor for name, tensor in tensors.items()})
        return held

    def _save(self, path: Path, held: Held, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        said = {key: getattr(held, key) for key in ("how", "rank", "scale", "squares", "lost")}
        unfinished = path.with_suffix(".unfinished")
        with disk_errors(self.folder):
            save_file(tensors, unfinished, {"held": json.dumps(said)})
            os.replace(unfinished, path)


def _remembered(wanted: Wanted, said: Mapping[str, Any]) -> Held:
    return Held(wanted.target, wanted.form, rows=wanted.rows, **said)


class _Parts(Checkpoint):
    """The fitted parts under the names and with the shapes that they have in the adapter."""

    def __init__(self, folder: Path, layout: AdapterLayout, kept: Mapping[int, Held]) -> None:
        files = [f"{_PARTS}/{number}.safetensors" for number in kept]
        headers = {file: local_header(folder / file) for file in files}
        sizes = {file: (folder / file).stat().st_size for file in files}
        ref = ModelRef(folder.name, folder=folder)
        self._stored = StoredCheckpoint(ref, folder, headers, sizes, None, ADAPTER_CONFIG)
        self.name, self.config = self._stored.name, self._stored.config
        self._own = {
            name: (f"{number}.{part}", shape)
            for number, held in kept.items()
            for name, part, shape in layout.names(held)
        }
        specs = self._stored.tensors
        self.tensors = {name: TensorSpec(specs[own].dtype, shape) for name, (own, shape) in sorted(self._own.items())}

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        self._stored.read_into(self._own[tensor][0], out, start)


def open_folder(output: Path, overwrite: bool, resume: bool, bound: int) -> OutputFolder:
    """The output's folder, refused early where it cannot be written; `bound`: bytes that it may take."""
    target = OutputFolder(output, overwrite=overwrite, resume=resume)
    with disk_errors(target.final):
        target.check(bound)
    return target


def as_records(held: Sequence[Held]) -> list[dict[str, Any]]:
    """What the manifest says of each parameter."""
    return [
        {
            "parameter": own.target.parameter, "form": own.form, "how": own.how,
            **({"rank": own.rank, "energy": own.kept, "error": own.error} if own.form == "low_rank" else {}),
            **({"rows": len(own.rows)} if own.rows else {}),
        }
        for own in held
    ]  # fmt: skip


def summarised(held: Sequence[Held]) -> dict[str, Any]:
    """The whole of what is low-rank: ranks, kept energy, relative error, and the worst of the modules."""
    low = [own for own in held if own.form == "low_rank"]
    squares, lost = sum(own.squares for own in low), sum(own.lost for own in low)
    worst = max(low, key=lambda own: own.error)
    return {
        "parameters": len(low), "ranks": [min(own.rank for own in low), max(own.rank for own in low)],
        "energy": 1.0 - lost / squares, "error": (lost / squares) ** 0.5,
        "worst": {"parameter": worst.target.parameter, "energy": worst.kept, "error": worst.error},
        "stored_whole": sum(own.form != "low_rank" for own in held),
        "tied": [own.target.module for own in low if own.target.tied],
    }  # fmt: skip
