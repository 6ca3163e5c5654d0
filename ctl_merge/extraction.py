"""A finetuned model's difference from its base, as an adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ctl_merge
from ctl_merge.adapter import AdaptedCheckpoint
from ctl_merge.adapter_card import build_adapter_card
from ctl_merge.adapter_files import Form, Held
from ctl_merge.adapter_fit import Fit
from ctl_merge.adapter_output import AdapterWriter, Wanted, as_records, completed, open_folder, summarised
from ctl_merge.adapter_targets import Target, Targets, find_targets
from ctl_merge.card import RECIPE, recipe_section
from ctl_merge.checkpoint import Checkpoint, torch_dtype
from ctl_merge.deferred import torch, torch_version
from ctl_merge.devices import checked_device
from ctl_merge.document import Document
from ctl_merge.errors import CheckpointError, MismatchError, RecipeError
from ctl_merge.evaluating.likelihood import predict
from ctl_merge.evaluating.metrics import TokenLoss
from ctl_merge.evaluating.passages import of_windows
from ctl_merge.front_matter import stated_licence
from ctl_merge.header import TensorSpec, dtype_code
from ctl_merge.manifest import build_manifest, write_manifest
from ctl_merge.merging import Merge, MergeResult, Meter, no_meter
from ctl_merge.model import load_weights
from ctl_merge.output import disk_errors
from ctl_merge.probing.data import TokenSet
from ctl_merge.probing.placement import Options, placed
from ctl_merge.probing.windows import token_sets
from ctl_merge.public_recipe import PublicRecipe
from ctl_merge.recipe import Recipe
from ctl_merge.recipe_check import RecipeChecker
from ctl_merge.recipe_file import load_recipe
from ctl_merge.reference import ModelRef
from ctl_merge.task_vectors import Difference
from ctl_merge.workers import pool
from ctl_merge.writer import Shard

RANK = 32
SAVED = ("embeddings", "head", "norms", "biases", "all")  # what may be stored whole instead, by what it is


@dataclass(frozen=True)
class Extraction:
    """How a difference becomes an adapter.

    `rank`: of each matrix at most (32, or any where `energy` is given). `energy`: the share of each matrix's
    ‖change‖² that is enough. `save`: what is stored whole, of SAVED. `dtype`: of the adapter; the model's if None.
    """

    rank: int | None = None
    energy: float | None = None
    save: tuple[str, ...] = ()
    dtype: str | None = None

    @property
    def most(self) -> int | None:
        return self.rank if self.rank or self.energy else RANK

    def saves(self, kind: str) -> bool:
        return kind in self.save or "all" in self.save


def extract_lora(
    model: Recipe | str | Path, base: str | Path, output: str | Path, *, rank: int | None = None,
    energy: float | None = None, save: Sequence[str] = (), dtype: str | None = None, data: str | Sequence[str] = (),
    sequences: int = 64, length: int | None = None, device: str = "cpu", num_workers: int | None = None,
    overwrite: bool = False, resume: bool = False, hash_files: bool = True, meter: Meter = no_meter,
) -> MergeResult:  # fmt: skip
    """Write the difference of `model` from `base` as a LoRA adapter that PEFT loads.

    `model`: a folder, `org/name`, either with an adapter after a `+`, or a recipe, whose merge is not written. `rank`,
    `energy`, `save` and `dtype` as Extraction has them. `data`: texts on which the losses of base, model and base with
    adapter are told. What the adapter does not hold is listed in the manifest's `left_out`. Raises a CtlMergeError; an
    unfinished adapter lies in `output`.partial for `resume`.
    """
    how = _checked(Extraction(rank, energy, tuple(save), dtype))
    opened = _opened(model, str(base), num_workers, device)
    return _Extractor(opened, how, checked_device(device)).write(
        Path(output), overwrite, resume, hash_files, meter, data, Options(sequences=sequences, length=length)
    )


def _checked(how: Extraction) -> Extraction:
    unknown = [kind for kind in how.save if kind not in SAVED]
    if unknown:
        raise CheckpointError(f"--save-modules {unknown[0]}: there are {', '.join(SAVED)}")
    if how.energy is not None and not 0 < how.energy <= 1:
        raise CheckpointError(f"--energy {how.energy}: it is a share, above 0 and at most 1")
    if how.rank is not None and how.rank < 1:
        raise CheckpointError(f"--rank {how.rank}: it is at least 1")
    return how


def _opened(model: Recipe | str | Path, base: str, workers: int | None, device: str) -> Merge:
    """Model and base side by side, as a merge that is the model: whatever names, ties and shards either has."""
    recipe = model if isinstance(model, Recipe) else load_recipe(model) if Path(model).is_file() else None
    name = Path(recipe.name).stem if recipe else str(model)
    text = {
        "merge_method": "task_arithmetic", "base_model": base,
        "models": [{"model": name, "parameters": {"weight": 1.0}}],
    }  # fmt: skip
    document = Document.parse(json.dumps(text, ensure_ascii=False), f"extraction of {name}")[0]
    try:
        return Merge(
            RecipeChecker(document, None, {name: recipe} if recipe else {}).recipe(), num_workers=workers,
            device_map=device,
        )  # fmt: skip
    except MismatchError as error:
        raise MismatchError(
            f"{error}\nAn adapter fits the base's own shapes: {name} cannot be one of {base} as it is"
        ) from None
    except RecipeError as error:
        raise CheckpointError(str(error).partition("\n")[2].strip() or str(error)) from None


class _Extractor:
    def __init__(self, opened: Merge, how: Extraction, device: str) -> None:
        self.opened, self.how, self.device = opened, how, device
        recipe = opened.recipe
        assert recipe.base is not None
        self.model_ref, self.base_ref = recipe.models[0].ref, recipe.base
        if self.model_ref == self.base_ref:
            raise CheckpointError(f"{self.model_ref} is the base itself: there is no difference to extract")
        self.base_files = opened.checkpoints[self.base_ref]

    @property
    def model(self) -> Checkpoint:
        return self.opened.merged.parent(self.model_ref)

    @property
    def base(self) -> Checkpoint:
        return self.opened.merged.parent(self.base_ref)

    def write(
        self, output: Path, overwrite: bool, resume: bool, hash_files: bool, meter: Meter, data: str | Sequence[str],
        options: Options,
    ) -> MergeResult:  # fmt: skip
        sets: list[TokenSet] = []
        if data:  # before an hour of fitting
            placed(options, self.base)
            sets = token_sets(self.opened, self.base, data, options)
        target = open_folder(output, overwrite, resume, self._bound(self._decided(self._targets())[0]))
        self.opened.fetch()
        targets = self._targets()
        wanted, reasons = self._decided(targets)
        folder = target.open(self._fingerprint())
        try:
            change = Difference(self.model, self.base)
            dtype = torch_dtype(self._dtype())
            fit = Fit(change, self.model, dtype, self.how.most, self.how.energy, device=self.device)
            writer = AdapterWriter(folder, fit, wanted, targets)
            belongs = self.base_ref.short, self.base_ref.revision if self.base_ref.repo_id else None
            held, shard = writer.write(self.opened.workers, meter, belongs, self.base.config)
            left = list(_left_out(change, reasons))
            with disk_errors(folder):
                manifest = self._manifest(folder, held, shard, left, hash_files)
                manifest["adapter"]["losses"] = self._losses(folder, sets, options) if sets else None
                self._finish(folder, manifest, shard)
                target.commit()
        finally:
            target.close()
        return MergeResult(target.final, manifest, 0)

    def _targets(self) -> Targets:
        plan = self.opened.plan
        float_ones = {n: t.spec for n, t in plan.tensors.items() if t.operation == "merge"}
        return find_targets(float_ones, self.base.config, self.base_ref.short)

    def _dtype(self) -> str:
        kinds = [t.spec.dtype for t in self.opened.plan.tensors.values() if t.operation == "merge"]
        return dtype_code(self.how.dtype) if self.how.dtype else max(kinds, key=kinds.count)

    def _bound(self, wanted: Sequence[Wanted]) -> int:
        """Bytes that the adapter takes at most: not counted where the rank is open."""
        specs = []
        for own in wanted:
            rank = min(self.how.most or 1, *own.target.matrix)
            shape = (own.target.count * rank, sum(own.target.matrix)) if own.form == "low_rank" else own.target.shape
            specs.append(TensorSpec(self._dtype(), shape))
        return sum(spec.nbytes for spec in specs)

    # ---- what goes into the adapter, and what does not

    def _decided(self, targets: Targets) -> tuple[list[Wanted], dict[str, str]]:
        """What is held, and of the tensors that are not, why."""
        wanted: list[Wanted] = []
        left = dict.fromkeys(targets.other, "no parameter of the model's class in transformers")
        for target in targets.parameters:
            form = self._form(target, targets)
            if form:
                wanted.append(Wanted(target, form))
            else:
                left |= {place.name: self._why(target, targets) for place in target.places}
        wanted = completed(wanted, targets)
        held = {place.name for own in wanted for place in own.target.places}
        return wanted, {name: why for name, why in left.items() if name not in held}

    def _form(self, target: Target, targets: Targets) -> Form | None:
        if self.how.saves(target.category):
            if target.kind == "bias":
                return "bias"
            if _can_be_saved(target, targets):
                return "whole"
        tied = bool(target.tied) and not target.tied_by_peft
        return "low_rank" if target.low_rank and not tied else None

    def _why(self, target: Target, targets: Targets) -> str:
        if target.kind != "bias" and not _can_be_saved(target, targets):
            return "PEFT cannot store it"
        why = f"tied to {', '.join(target.tied)}" if target.tied else "no matrix of a layer"
        return f"{why}; --save-modules {target.category} stores it"

    # ---- what is told

    def _fingerprint(self) -> str:
        state = [source.state() for source in self.opened.sources.values()]
        settings = [self.opened.recipe.text, str(self.how), state, ctl_merge.__version__, torch_version()]
        settings.append([recipe.text for recipe in self.opened.recipe.steps.values()])
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def _losses(self, folder: Path, sets: Sequence[TokenSet], options: Options) -> dict[str, dict[str, float]]:
        """Nats per token by data set: of the base, the model, and the base with the adapter as it was written.

        Weights are rounded to each checkpoint's dtype, as a reader of its files sees them.
        """
        adapter = ModelRef(folder.name, folder=folder)
        both = AdaptedCheckpoint(self.base_ref.bare.with_adapter(adapter), self.base_files, adapter)
        everyone: dict[str, Checkpoint] = {"base": self.base, "model": self.model, "base + adapter": both}
        running = placed(options, self.base)
        found: dict[str, dict[str, float]] = {tokens.name: {} for tokens in sets}
        for name, checkpoint in everyone.items():
            model = load_weights(
                checkpoint, running.placement, as_written=True, blocks=running.blocks,
                trust_remote_code=running.trust_remote_code,
            )  # fmt: skip
            for tokens in sets:
                measured = predict({checkpoint.name: model}, of_windows(tokens), running.batch,
                                   device=running.placement.device)[checkpoint.name]  # fmt: skip
                found[tokens.name][name] = TokenLoss.items(measured.nll, measured.tokens).whole(TokenLoss.kind)
        return found

    @property
    def _public(self) -> PublicRecipe:
        """The recipe, where the model is one, and what the sources are called."""
        return PublicRecipe.of(next(iter(self.opened.recipe.steps.values()), None), self.opened.sources)

    def _manifest(
        self, folder: Path, held: Sequence[Held], shard: Shard, left: Sequence[dict[str, Any]], hash_files: bool
    ) -> dict[str, Any]:
        opened = self.opened
        with pool(opened.workers) as mapped:
            manifest = build_manifest(
                opened.merged,
                opened.sources,
                self._public,
                folder,
                (shard,),
                opened.devices,
                mapped if hash_files else None,
            )
        bases = self.base_files.sources()
        for source, ref in zip(manifest["sources"], opened.sources, strict=True):
            source["role"] = "base" if ref in bases else "finetuned" if ref == self.model_ref else "of the model"
        recipe = next(iter(opened.recipe.steps.values()), None)
        manifest["method"], manifest["parameters"] = "extract-lora", {
            "rank": self.how.most, "energy": self.how.energy, "save_modules": list(self.how.save),
        }  # fmt: skip
        if not recipe:
            manifest["recipe_sha256"] = None
        manifest["adapter"] = {
            "summary": summarised(held), "parameters": as_records(held), "left_out": _with_shares(held, left)
        }  # fmt: skip
        return manifest

    def _finish(self, folder: Path, manifest: dict[str, Any], shard: Shard) -> None:
        """Card, manifest and, where the model is one, the recipe."""
        recipe = next(iter(self.opened.recipe.steps.values()), None)
        if recipe:
            (folder / RECIPE).write_text(self._public.text, "utf-8")
        licences = [stated_licence(source.folder) for source in self.opened.sources.values()]
        what = f"the merge of the recipe below, by `{recipe.method.name}`" if recipe else f"`{self.model_ref.short}`"
        card = build_adapter_card(
            manifest, self.base_ref, licences, folder.name.removesuffix(".partial"),
            f"extracted as the difference of {what} from it", ["extracted"],
            recipe_section(self._public.text) if recipe else "",
        )  # fmt: skip
        (folder / "README.md").write_text(card, "utf-8")
        write_manifest(folder, manifest, [shard])


def _can_be_saved(target: Target, targets: Targets) -> bool:
    """Whether the target's module may be stored whole: not where that would store the matrices of a layer too."""
    matrices = any(t.low_rank and t.category == "all" for t in targets.of(target.module))
    return targets.can_be_saved(target) and not matrices


def _left_out(change: Checkpoint, reasons: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Every tensor that differs and is not held, with ‖change‖²."""
    for name, why in reasons.items():
        squares = _squares(change, name)
        if squares:
            yield {"tensor": name, "why": why, "squares": squares}


def _squares(change: Checkpoint, tensor: str) -> float:
    total, numel, step = 0.0, change.tensors[tensor].numel, change.block(tensor)
    for start in range(0, numel, step):
        piece = torch.empty(min(step, numel - start), dtype=torch.float64)
        change.read_into(tensor, piece, start)
        total += float(piece.square().sum())
    return total


def _with_shares(held: Sequence[Held], left: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest first, each with its share of ‖change‖² of what is held by low rank or left out."""
    total = sum(own.squares for own in held) + sum(own["squares"] for own in left)
    return [
        {"tensor": own["tensor"], "why": own["why"], "norm": own["squares"] ** 0.5, "share": own["squares"] / total}
        for own in sorted(left, key=lambda own: -own["squares"])
    ]
