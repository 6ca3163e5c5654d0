"""A checkpoint plus an adapter, applied as tensors are read."""

from __future__ import annotations

import os
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import Any

from ctl_merge.adapter_changes import Change, Matcher
from ctl_merge.adapter_config import AdapterConfig, parse_adapter_config
from ctl_merge.checkpoint import CHUNK, FileCheckpoint
from ctl_merge.companions import companions, is_tokenizer_file
from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import CheckpointError
from ctl_merge.header import TensorSpec
from ctl_merge.low_rank import LowRank, Recent
from ctl_merge.model_config import fit_vocabulary, patch_config, vocab_size
from ctl_merge.reference import ModelRef
from ctl_merge.stored import ADAPTER_CONFIG, listed, open_checkpoint, open_files, read_json, with_files

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # safetensors first


class AdaptedCheckpoint(FileCheckpoint):
    """A checkpoint whose tensors are those of `base` with an adapter merged into them, piece by piece in float64.

    What PEFT's merge_and_unload gives, rounded once. Thread-safe. Only config and tokenizer may lie in a folder of its
    own, for as long as this lives. Raises CheckpointError or HubError.
    """

    def __init__(self, ref: ModelRef, base: FileCheckpoint, adapter: ModelRef) -> None:
        self.ref, self.name, self.base = ref, str(ref), base
        self.adapter = open_adapter(adapter)
        self.adapter.applied_to = base.ref
        self.snapshot, self.file_sizes = None, {}
        settings = parse_adapter_config(self.adapter.config, self.adapter.name)
        matcher = Matcher(base, self.adapter, settings)
        self.changes = matcher.match()
        self.tensors: Mapping[str, TensorSpec] = {
            **base.tensors, **{name: change.spec for name, change in self.changes.items()}
        }  # fmt: skip
        self._has_tokens, self._rows = matcher.changes_tokens, matcher.resized
        self.config = self._fit(base.config)
        self.decisions = (*base.decisions, self._said(settings))
        self.warnings = (*base.warnings, *self._warned(settings, matcher))
        self._read = Recent(self.adapter.read)
        self._factors: dict[str, Tensor] = {}

    def _fit(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The base's config with as many tokens as the adapter has rows for."""
        before = vocab_size(config)
        return fit_vocabulary(config, (before, self._rows) if before and self._rows else None, None)

    def _said(self, settings: AdapterConfig) -> str:
        changed = sum(name in self.base.tensors for name in self.changes)
        return (
            f"{self.name}: {settings.kind} of rank {settings.r}, which changes {changed} of {len(self.tensors)} tensors"
        )

    def _warned(self, settings: AdapterConfig, matcher: Matcher) -> Iterator[str]:
        trained, applied = settings.base_model_name_or_path or "", self.base.ref.short
        if trained and last_part(trained) != last_part(applied):
            yield f"{self.adapter.name} says that it was trained on {trained}; it is applied to {applied}"
        if matcher.added:
            yield (
                f"{self.adapter.name} brings tensors that {applied} lacks: {', '.join(matcher.added)}. The config "
                f"stays {applied}'s, whose architecture may have no use for them"
            )

    # ---- files

    @cached_property
    def folder(self) -> Path:  # type: ignore[override]
        """The base's; where the adapter has rows of tokens, one with the tokenizer that lies beside the adapter."""
        files: dict[str, Path | bytes] = {}
        if self._has_tokens:
            own = with_files(self.adapter.ref, self.adapter.snapshot, is_tokenizer_file)
            files = {path: file for path, file in companions(own).items() if is_tokenizer_file(path)}
        if not files and not self._rows:
            return self.base.folder
        self._held = tempfile.TemporaryDirectory(prefix="ctl-merge-adapted-")
        folder = Path(self._held.name)
        kept = {p: f for p, f in companions(self.base.folder).items() if not files or not is_tokenizer_file(p)}
        for path, file in (kept | files).items():
            assert isinstance(file, Path)  # nothing was changed in them
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / path)
        original = (self.base.folder / "config.json").read_bytes()
        (folder / "config.json").write_bytes(patch_config(original, None, False, self._fit))
        return folder

    def fetch(self) -> None:
        self.base.fetch()
        self.adapter.fetch()

    def sources(self) -> dict[ModelRef, FileCheckpoint]:
        return {**self.base.sources(), self.adapter.ref: self.adapter}

    def read_bytes(self, tensor: str) -> int:
        change = self.changes.get(tensor)
        if change is None:
            return self.base.read_bytes(tensor)
        origin = self.base.read_bytes(change.own) if change.own else change.spec.nbytes
        passes = 2 if change.low_rank and change.low_rank.magnitude else 1
        return passes * origin + sum(self.adapter.tensors[part].nbytes for part in change.parts)

    def working_bytes(self) -> int:
        changes = self.changes.values()
        factors = {part for change in changes for part in change.parts}
        held = self._read.held_bytes(self.adapter.tensors[part] for part in factors)
        widest = max((prod(change.spec.shape[1:]) for change in changes if change.low_rank), default=0)
        products = 3 * 8 * (CHUNK + 2 * widest)  # of the rows that a chunk touches
        return self.base.working_bytes() + held + products

    def block(self, tensor: str) -> int:
        change = self.changes.get(tensor)
        own = change.own if change else tensor
        return self.base.block(own) if own else super().block(tensor)

    # ---- weights

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        change = self.changes.get(tensor)
        if change is None:
            self.base.read_into(tensor, out, start)
        elif not (change.low_rank or change.shift or change.rows):
            self._read_origin(change, out, start)
        else:
            self._in_pieces(tensor, out, start, lambda piece, at: self._read_changed(tensor, change, piece, at))

    def read_change_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        """What the adapter adds to the base's entries: B A alone, or the difference where it is no sum of that kind."""
        change = self.changes.get(tensor)
        if change is None or not change.alters:
            out.zero_()
        elif change.is_sum:
            self._in_pieces(tensor, out, start, lambda piece, at: self._add_parts(change, piece.zero_(), at))
        else:
            self._in_pieces(tensor, out, start, lambda piece, at: self._read_difference(tensor, change, piece, at))

    def factors(self, low: LowRank, expert: int) -> tuple[Tensor, Tensor]:
        """B (outputs, rank) and A (rank, inputs) of one of a parameter's matrices, as the adapter stores them."""
        a, b = self._read(low.a), self._read(low.b)
        a = a.reshape(low.experts, low.rank, -1)[expert]
        return b.reshape(b.shape[0], low.rank, low.experts)[:, :, expert], a

    def _in_pieces(self, tensor: str, out: Tensor, start: int, fill: Callable[[Tensor, int], object]) -> None:
        """Fill `out` block by block in float64, whatever its dtype."""
        step = self.block(tensor)
        for begin in range(0, out.numel(), step):
            piece = out[begin : begin + step]
            exact = piece if out.dtype == torch.float64 else torch.empty_like(piece, dtype=torch.float64)
            fill(exact, start + begin)
            if exact is not piece:
                piece.copy_(exact)

    def _read_difference(self, tensor: str, change: Change, out: Tensor, start: int) -> None:
        self._read_changed(tensor, change, out, start)
        before = torch.empty_like(out)
        self.base.read_into(change.own or tensor, before, start)
        out -= before

    def _read_origin(self, change: Change, out: Tensor, start: int) -> None:
        """What the adapter's changes are added to."""
        if change.stored:
            name, first = change.stored
            self.adapter.read_into(name, out, first + start)
        else:
            assert change.own is not None
            self.base.read_into(change.own, out, start)

    def _add_parts(self, change: Change, out: Tensor, start: int) -> None:
        if change.low_rank:
            self._add(change, change.low_rank, out, start)
        if change.shift:
            vector, scale = change.shift
            out += self._read(vector).view(-1)[start : start + out.numel()].double() * scale

    def _read_changed(self, tensor: str, change: Change, out: Tensor, start: int) -> None:
        self._read_origin(change, out, start)
        low, columns = change.low_rank, prod(change.spec.shape[1:])
        self._add_parts(change, out, start)
        if low and low.magnitude:  # of a matrix, which has no shift
            out *= self._dora(tensor, change, low)[_outputs(change, low, start, out.numel())]
        if change.rows:
            table, first = self._read(change.rows[0]).view(-1, columns), start // columns
            rows = change.rows[1][bisect_left(change.rows[1], (first,)) :]
            for row, place in takewhile(lambda pair: pair[0] * columns < start + out.numel(), rows):
                begin, end = row * columns - start, (row + 1) * columns - start
                out[max(begin, 0) : end].copy_(table[place][max(-begin, 0) : columns - max(end - out.numel(), 0)])

    def _add(self, change: Change, low: LowRank, out: Tensor, start: int) -> None:
        """Add the entries of B A: those of all rows that the piece touches."""
        shape = change.spec.shape
        columns = shape[-1] if low.experts > 1 and low.expert is None else prod(shape[1:])
        first, end = start // columns, -(-(start + out.numel()) // columns)
        rows = low.rows(self._read, first, end, shape[-2] if len(shape) > 1 else 1)
        out += rows.reshape(-1)[start - first * columns :][: out.numel()]

    def _dora(self, tensor: str, change: Change, low: LowRank) -> Tensor:
        """What each output is multiplied by: its magnitude over its norm, in a pass of its own over the tensor."""
        if tensor not in self._factors:
            assert low.magnitude is not None
            magnitude = self._read(low.magnitude).view(-1).double()
            squares, step = torch.zeros_like(magnitude), self.block(tensor)
            for start in range(0, change.spec.numel, step):
                piece = torch.empty(min(step, change.spec.numel - start), dtype=torch.float64)
                self._read_origin(change, piece, start)
                self._add(change, low, piece, start)
                squares.index_add_(0, _outputs(change, low, start, piece.numel()), piece.square_())
            self._factors[tensor] = magnitude / squares.sqrt()
        return self._factors[tensor]


def _outputs(change: Change, low: LowRank, start: int, count: int) -> Tensor:
    """Which output each of the entries from `start` on belongs to."""
    columns = prod(change.spec.shape[1:])
    places = torch.arange(start, start + count)
    return places % columns if low.transposed else places // columns


def open_adapter(ref: ModelRef) -> FileCheckpoint:
    """The tensors of an adapter, with adapter_config.json for a config. Raises CheckpointError or HubError."""
    listing, snapshot = listed(ref)
    file = next((file for file in _WEIGHTS if file in listing), None)
    if ADAPTER_CONFIG not in listing or file is None:
        found = ", ".join(sorted(listing)[:8]) or "nothing"
        raise CheckpointError(
            f"{ref} is no adapter: it has no {ADAPTER_CONFIG if file else _WEIGHTS[0]}; it has: {found}. "
            "An adapter is what PEFT's save_pretrained writes"
        )
    folder = with_files(ref, snapshot, lambda path: path in (ADAPTER_CONFIG, "README.md"))
    return open_files(ref, folder, [file], listing, snapshot, ADAPTER_CONFIG)


def adapted_alone(ref: ModelRef) -> AdaptedCheckpoint:
    """An adapter on the model that its own config names. Raises CheckpointError or HubError."""
    folder = with_files(ref, listed(ref)[1], lambda path: path == ADAPTER_CONFIG)
    settings = parse_adapter_config(read_json(folder / ADAPTER_CONFIG, str(ref)), str(ref))
    named = settings.base_model_name_or_path or ""
    try:
        base = named_base(ref, named, settings.revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"{ref} is an adapter, and its base cannot be found by what its config says ({error}): write "
            f"model+{ref} with the model that it was trained on"
        ) from None
    return AdaptedCheckpoint(ref, open_checkpoint(base, complete=True), ref)


def named_base(ref: ModelRef, named: str, revision: str | None) -> ModelRef:
    """A folder, as seen from the adapter's or from here; else a repository. On the Hub, a repository alone."""
    if ref.folder is not None and named.strip():
        places = (ref.folder / named, ref.folder.parent / named, Path(named))
        found = list(dict.fromkeys(place.resolve() for place in places if place.is_dir()))
        if len(found) > 1:
            raise CheckpointError(f"{named!r} may be {' or '.join(map(str, found))}")
        if found:
            written = str(found[0]) if os.path.isabs(ref.text) else os.path.relpath(found[0])  # as the adapter is
            return ModelRef(written, folder=found[0])
    return ModelRef.on_hub(f"{named}@{revision}" if revision else named)


def last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
