"""The whole way: recipe, plan, weights, folder."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ctl_merge import hub
from ctl_merge.adapter import AdaptedCheckpoint
from ctl_merge.architecture import ties_embeddings
from ctl_merge.card import RECIPE
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.companions import companions
from ctl_merge.devices import assign_devices, parse_max_memory
from ctl_merge.errors import DeviceError, OutputError, RecipeError
from ctl_merge.estimate import estimate, memory_bound
from ctl_merge.evidence import TextEvidence, Texts
from ctl_merge.finishing import finish
from ctl_merge.identity import agreed_fingerprint, identity
from ctl_merge.loadable import check_stack
from ctl_merge.lora_output import LoraOutput
from ctl_merge.lora_writing import write_merged_adapter
from ctl_merge.measured import keep, recall
from ctl_merge.merged import MergedCheckpoint
from ctl_merge.model_config import patch_config
from ctl_merge.moe import plan_mixture
from ctl_merge.output import OutputFolder, disk_errors
from ctl_merge.plan import Plan, make_plan
from ctl_merge.prefix_evidence import PrefixEvidence
from ctl_merge.processes import ALONE, Ranks
from ctl_merge.recipe import Recipe
from ctl_merge.recipe_file import load_recipe
from ctl_merge.reference import ModelRef
from ctl_merge.shard_stream import ShardStream
from ctl_merge.sizes import format_size, parse_size
from ctl_merge.step import StepCheckpoint
from ctl_merge.stored import open_checkpoint
from ctl_merge.summary import as_json
from ctl_merge.tying import settle_ties
from ctl_merge.workers import pool
from ctl_merge.writer import JOURNAL, Shard, ShardWriter, owned, plan_shards

logger = logging.getLogger("ctl_merge")

Meter = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: its folder, and the manifest that lies in it."""

    folder: Path
    manifest: dict[str, Any]
    resumed_tensors: int


def no_meter(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Progress that nobody sees."""
    return nullcontext(lambda count: None)


class Merge:
    """A recipe with its checkpoints open: planned from headers, ready to be looked at or written.

    `device_map` and `max_memory` as in `ctl_merge.devices`; `max_shard_size` such as `5GB`; `num_workers` threads (the
    CPU cores if None). None of them changes the weights.
    """

    def __init__(
        self, recipe: Recipe | str | Path, *, device_map: str | None = None, max_memory: str | None = None,
        num_workers: int | None = None, max_shard_size: str = "5GB",
    ) -> None:  # fmt: skip
        self.recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        self.shard_bytes = _shard_bytes(max_shard_size)
        self.device_map, self.max_memory = device_map, max_memory
        self.checkpoints = {ref: self._open(ref) for ref in self.recipe.refs}
        self._fetched = False
        self.workers = num_workers or len(os.sched_getaffinity(0))
        self._use(self._with_steps(self._planned()))
        self._limit_memory(parse_max_memory(max_memory).get("cpu"))

    def _planned(self) -> Plan:
        if self.recipe.mixture is None:
            plan = make_plan(self.recipe, self.checkpoints)
            stacked = sum(part.layers is not None for part in self.recipe.slices) > 1 or plan.changes
            return check_stack(plan, self.checkpoints[self.recipe.refs[0]]) if stacked else plan
        plan, made = plan_mixture(self.recipe, self.checkpoints)
        self.checkpoints[made.ref] = made
        return plan

    def _use(self, plan: Plan) -> None:
        self.plan = plan
        self.devices = assign_devices(plan.specs, self.device_map, self.max_memory)
        self.merged = MergedCheckpoint(plan, self.checkpoints, self.devices)
        if plan.method.statistic:
            self.merged.definition.evidence = self._evidence
        self.shards = plan_shards(plan.specs, self.shard_bytes)
        self.lora = self._adapter_of(plan) if self.recipe.lora else None

    def _adapter_of(self, plan: Plan) -> LoraOutput:
        """The adapter that is written instead of a model; the plan then tells of it too."""
        lora = LoraOutput(plan, self.merged, self.checkpoints, self.devices, lambda: self._evidence)
        others = (line for line in plan.decisions if not line.startswith("written as "))
        decisions, warnings = (*others, *lora.decisions()), (*plan.warnings, *lora.warnings())
        self.plan = replace(plan, decisions=decisions, warnings=warnings)
        self.merged.plan = lora.lazy.plan = self.plan
        self.shards = (lora.shard,)
        return lora

    @cached_property
    def _evidence(self) -> TextEvidence | PrefixEvidence:
        """What the method measures of each model on its own text: taken when the first tensor is merged."""
        data, kind = self.recipe.data, self.recipe.method.statistic
        assert data is not None and kind is not None
        sources = [s for part in self.recipe.slices for s in part.models] or list(self.recipe.models)
        base = self.recipe.base if data.inputs == "base" else None
        own = {source.ref: source.texts or self.recipe.texts for source in sources}
        texts = Texts(own, data.sequences, data.length, base)
        if data.inputs == "merged":
            return PrefixEvidence(texts, self.checkpoints, lambda: self.merged)
        return TextEvidence(kind, texts, self.checkpoints)

    def _open(self, ref: ModelRef) -> FileCheckpoint:
        if ref.step is None:
            return open_checkpoint(ref)
        step = Merge(self.recipe.steps[ref.step], device_map=self.device_map, max_memory=self.max_memory, num_workers=1)
        checkpoint = StepCheckpoint(ref.bare, step)
        return AdaptedCheckpoint(ref, checkpoint, ref.adapter) if ref.adapter else checkpoint

    @property
    def _steps(self) -> list[StepCheckpoint]:
        """The steps that are read as they are, or with an adapter."""
        bare = [c.base if isinstance(c, AdaptedCheckpoint) else c for c in self.checkpoints.values()]
        return [c for c in bare if isinstance(c, StepCheckpoint)]

    def _with_steps(self, plan: Plan) -> Plan:
        """The plan, which tells of its steps' decisions too."""
        steps = {step.name: step.opened.plan for step in self._steps}
        decisions = [f"{name}: {line}" for name, step in steps.items() for line in step.decisions]
        warnings = [f"{name}: {line}" for name, step in steps.items() for line in step.warnings]
        return replace(plan, decisions=(*decisions, *plan.decisions), warnings=(*warnings, *plan.warnings))

    @property
    def sources(self) -> dict[ModelRef, FileCheckpoint]:
        """Every checkpoint in files that is read, those of steps included."""
        return {ref: c for checkpoint in self.checkpoints.values() for ref, c in checkpoint.sources().items()}

    @property
    def merges(self) -> list[MergedCheckpoint]:
        """This merge and, each once, the steps that it reads."""
        return [self.merged, *(merged for step in self._steps for merged in step.opened.merges)]

    def _memory_bound(self) -> int:
        held = sum(checkpoint.held_bytes for checkpoint in self.checkpoints.values())
        held += self.workers * self.lora.fitting_bytes if self.lora else 0
        return memory_bound(self.merges, self.workers) + held

    def _limit_memory(self, limit: int | None) -> None:
        """Fewer workers where the CPU's share of `max_memory` is small."""
        while limit is not None and self._memory_bound() > limit:
            if self.workers == 1:
                needed = format_size(self._memory_bound())
                raise DeviceError(
                    f"--max-memory: the merge takes {needed} of cpu memory with one worker, more than allowed"
                )
            self.workers -= 1

    def summary(self, processes: int = 1) -> dict[str, Any]:
        """The plan and its cost as plain data, from headers alone; how so many processes share the shards."""
        lazy, read = self.merged, self.checkpoints
        if self.lora and not self.lora.needs_base:
            lazy, read = self.lora.lazy, {**self.lora.views}
        cost = estimate(self.plan, lazy, read, self.shards, self._memory_bound())
        return as_json(self.plan, cost, self.checkpoints, self.shards, self.devices, processes)

    def write(
        self, output: str | Path, *, overwrite: bool = False, resume: bool = False, hash_files: bool = True,
        meter: Meter = no_meter, attach: Callable[[Path], str] | None = None, stream: ShardStream | None = None,
        ranks: Ranks = ALONE,
    ) -> MergeResult:  # fmt: skip
        """Merge into the folder `output`, which appears whole or not at all.

        Raises a CtlMergeError for all that can go wrong; the unfinished work then lies in `output`.partial for
        `resume`. `meter(what, bytes)` gives a context in which progress is told in bytes. `attach(folder)` may put
        files into the folder before it is whole, and gives Markdown for the card; every rank calls it. `stream` takes
        each shard away once it is whole, and everything in the end: the folder then keeps all but the weights.
        `ranks`: the processes that write together, each its shards; all call this, and the first has the manifest.
        """
        target = OutputFolder(Path(output), overwrite=overwrite, resume=resume)
        ranks.at_first(lambda: self.check_output(target, bool(stream)))
        if stream or self.lora:
            ranks.require_alone("a streamed upload" if stream else "an adapter")
        if self.lora:
            manifest = write_merged_adapter(
                self, self.lora, target, self.fingerprint(), hash_files=hash_files, meter=meter, attach=attach
            )
            return MergeResult(target.final, manifest, 0)
        if ranks.count > 1:
            ranks.together(lambda: self.fetch() if ranks.local_index == 0 else None)  # one download a machine
        ranks.together(self.fetch)
        fingerprint = self.fingerprint(ranks)
        ranks.at_first(lambda: target.open(fingerprint))
        try:
            ranks.together(lambda: target.check_same(fingerprint))
            resumed = sum(ranks.gather(self.write_shards(target.path, ranks, meter, True, stream)))
            manifest = finish(self, target, hash_files, attach, ranks, stream)
        finally:
            target.close()
        return MergeResult(target.final, manifest, resumed)

    def check_output(self, target: OutputFolder, streamed: bool = False) -> None:
        """Refuse early an output that cannot be written or would cost the user something."""
        sizes = sorted((shard.nbytes for shard in self.shards), reverse=True)
        with disk_errors(target.final):
            target.check(sum(sizes[:2] if streamed else sizes))
        if any(c.folder.resolve().is_relative_to(target.final.resolve()) for c in self.sources.values()):
            raise OutputError(f"{target.final} is, or holds, one of the models that are merged: choose another output")
        companions(self.checkpoints[self.recipe.refs[0]].folder)  # links that lead elsewhere are refused now, not last

    def write_shards(
        self, folder: Path, ranks: Ranks, meter: Meter, shared: bool, stream: ShardStream | None = None
    ) -> int:
        """Write this process's shards; `shared`: the others help to measure. Returns how many tensors were there."""
        process = "" if ranks.count == 1 else f".{ranks.index}-of-{ranks.count}"
        self.recall(folder)
        self._measure(meter, ranks if shared else ALONE)
        keep(self.merges, folder, process)
        own: Sequence[Shard] = owned(self.shards, ranks.index, ranks.count)
        shards = stream.begin(folder, self.shards) if stream else own
        with meter("merging", sum(shard.nbytes for shard in shards)) as told:
            sent = stream.send if stream else None
            journal, counted = f"{JOURNAL}{process}", self.recipe.allow_nonfinite
            found = ShardWriter(folder, shards, self.merged, sent, journal, counted).write(self.workers, told)
        keep(self.merges, folder, process)
        return found + sum(len(shard.specs) for shard in own) - sum(len(shard.specs) for shard in shards)

    def recall(self, folder: Path) -> None:
        """Take over what was measured for an unfinished output."""
        recall(self.merges, folder)

    def _measure(self, meter: Meter, ranks: Ranks) -> None:
        """Take the statistics of whole models, those of steps before those of what reads them."""
        pending = [merged for merged in reversed(self.merges) if merged.measures.passes_left]
        count = sum(merged.measures.passes_left * len(merged.tensors) for merged in pending) // ranks.count
        with pool(self.workers) as mapped, meter("measuring", count) if count else nullcontext() as told:
            for merged in pending:
                merged.measures.take(_telling(mapped, told), ranks)

    def fetch(self) -> None:
        """Download the weights that are not here, and decide what only weights can tell: whether heads are tied."""
        if self._fetched:
            return
        self._fetched = True
        hub.check_space(sum(source.missing_bytes() for source in self.sources.values()))
        for checkpoint in self.checkpoints.values():
            checkpoint.fetch()
        settled = settle_ties(self.plan, self.checkpoints)
        if settled is not self.plan:
            self._use(settled)

    def fingerprint(self, ranks: Ranks = ALONE) -> str:
        """What an unfinished output belongs to. Raises MismatchError where it is not the same for all ranks."""
        return agreed_fingerprint(identity(self.plan, self.sources, self.shards, self.devices), ranks)

    def write_companions(self, folder: Path) -> None:
        """Config, tokenizer and what else belongs to the model beside its weights; the config last."""
        first = self.checkpoints[self.recipe.refs[0]]
        for relative, content in companions(first.folder, self.plan.vocabulary.files).items():
            target = folder / relative
            if target.name in ("config.json", RECIPE):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)
        untie = any(target in self.plan.tensors for target in self.plan.tied) and ties_embeddings(first.config)
        original = (first.folder / "config.json").read_bytes()
        config = patch_config(original, self.recipe.dtype, untie, self.plan.fit)
        (folder / "config.json").write_bytes(config)


def merge(
    recipe: Recipe | str | Path, output: str | Path, *, overwrite: bool = False, resume: bool = False, **machine: Any
) -> MergeResult:
    """Merge a recipe (a file's path, or a Recipe) into a folder; `machine` as `Merge` takes it."""
    return Merge(recipe, **machine).write(output, overwrite=overwrite, resume=resume)


def open_merge(recipe: Recipe | str | Path, **machine: Any) -> MergedCheckpoint:
    """A recipe as a lazy checkpoint: `read(name)` merges one tensor, nothing is written."""
    opened = Merge(recipe, **machine)
    opened.fetch()
    return opened.merged


def _shard_bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise RecipeError(f"--max-shard-size: {error}") from None


def _telling(mapped: Callable, told: Callable[[int], object] | None) -> Callable:
    """A map that tells progress, one for each item."""

    def telling(function: Callable, items: Any) -> Iterator[Any]:
        for result in mapped(function, items):
            if told:
                told(1)
            yield result

    return telling
