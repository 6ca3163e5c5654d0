"""Models by headers, configs, cards: what they are, whence."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctl_merge.adapter import AdaptedCheckpoint, last_part, named_base
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.companions import companions
from ctl_merge.errors import CheckpointError, CtlMergeError, RecipeError
from ctl_merge.front_matter import CARD, stated_bases
from ctl_merge.header import TensorSpec
from ctl_merge.output import MANIFEST
from ctl_merge.pedigree import Common, Statement, common_base
from ctl_merge.probing.parents import RECIPES, found_again, recipes_in
from ctl_merge.reference import ModelRef
from ctl_merge.stored import listed, open_checkpoint, read_json, with_files
from ctl_merge.tokenizer import TokenizerFiles, Vocabulary

_GENERATIONS = 4  # of cards that are followed on the Hub


@dataclass(frozen=True, eq=False)
class Member:
    """A model as its headers, config and tokenizer have it. `key`: the same for every name of it, whatever revision.

    `written`: how a recipe names it, with the commit where it is on the Hub; `branch`: what that was of. `adapted`: it
    is a model with an adapter.
    """

    name: str
    key: str
    written: str
    tensors: Mapping[str, TensorSpec] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)
    branch: str | None = None
    adapted: bool = False


class Family:
    """Models that are opened for a recipe in `folder`, and what they state of each other.

    `notes`: what could not be found out. Opening raises CheckpointError or HubError; statements that lead nowhere do
    not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints: dict[ModelRef, FileCheckpoint] = {}
        self.notes: list[str] = []
        self.names: dict[str, str] = {}
        self._stated: dict[str, list[Statement]] = {}
        self._ancestors: dict[str, ModelRef] = {}  # whose own cards are not read yet
        self._stated_refs: dict[str, ModelRef] = {}
        self._given: dict[str, ModelRef] = {}

    def open_all(self, texts: Sequence[str]) -> list[Member]:
        """Open models by the names that a user gives them, seen from the working directory; each once."""
        refs = dict.fromkeys(map(ModelRef.parse, texts))
        short = Counter(ref.short for ref in refs)
        members = (self.open(t, n if short[n := ModelRef.parse(t).short] == 1 else t) for t in texts)
        found: dict[str, Member] = {}
        for text, member in zip(texts, members, strict=True):
            if member.key in found:
                self.notes.append(f"{text} is given twice: it goes in once")
            found.setdefault(member.key, member)
        return list(found.values())

    def open(self, text: str, name: str | None = None) -> Member:
        """Open one more model; messages call it `name`, or by its short name if no other has that."""
        ref = ModelRef.parse(text)
        name = name or (text if ref.short in self.names.values() else ref.short)
        checkpoint = open_checkpoint(ref)
        written = self._written(checkpoint)
        self.checkpoints[ModelRef.parse(written, self.folder)] = checkpoint
        key = _key(checkpoint)
        self.names[key] = name
        self._given[key] = checkpoint.ref
        return Member(
            name, key, written, checkpoint.tensors, checkpoint.config,
            TokenizerFiles(companions(checkpoint.folder), text).vocabulary(),
            branch=_branch(checkpoint), adapted=isinstance(checkpoint, AdaptedCheckpoint),
        )  # fmt: skip

    def checkpoint(self, member: Member) -> FileCheckpoint:
        return self.checkpoints[ModelRef.parse(member.written, self.folder)]

    def common_base(self, members: Sequence[Member]) -> Common:
        """What the members state that they come from; cards on the Hub are followed until one base is found."""
        for member in members:
            self._read(self.checkpoint(member))
        keys = list(dict.fromkeys(member.key for member in members))
        found = common_base(keys, self._stated, self.names)
        for _ in range(_GENERATIONS):
            if found.base is not None or not self._ancestors:
                break
            for key, ref in list(self._ancestors.items()):
                del self._ancestors[key]
                self._follow(key, ref)
            found = common_base(keys, self._stated, self.names)
        return found

    def open_stated(self, key: str) -> Member:
        """Open a base that others name."""
        return self.open(self._stated_refs[key].text, self.names[key])

    # ---- statements

    def _read(self, checkpoint: FileCheckpoint) -> None:
        """Note what a model that is open states."""
        if not isinstance(checkpoint, AdaptedCheckpoint):
            self._note(_key(checkpoint), checkpoint.ref, checkpoint.folder)
            return
        below = _key(checkpoint.base)
        self._name(below, checkpoint.base.ref)
        self._given.setdefault(below, checkpoint.base.ref)
        source = "own name" if checkpoint.ref.adapter else "adapter_config.json"
        self._stated[_key(checkpoint)] = [Statement(below, source)]
        self._read(checkpoint.base)

    def _name(self, key: str, ref: ModelRef) -> None:
        """Remember a model that is named by others; a short name is for one model."""
        self._stated_refs.setdefault(key, ref)
        if key not in self.names:
            self.names[key] = ref.text if ref.short in self.names.values() else ref.short

    def _follow(self, key: str, ref: ModelRef) -> None:
        """Read the card of a model that others name, without opening it."""
        try:
            files = (CARD, "config.json", *RECIPES)
            folder = with_files(ref, listed(ref)[1], lambda path: path in files)
        except CtlMergeError as error:
            self.notes.append(f"the card of {self.names[key]} cannot be read: {error}")
            return
        self._note(key, ref, folder)

    def _note(self, key: str, ref: ModelRef, folder: Path) -> None:
        if key in self._stated:
            return
        self._stated[key] = []
        for named, source, firm in self._statements(ref, folder):
            try:
                parent = self._parent(ref, named)
            except CheckpointError:
                if firm:
                    self.notes.append(f"{self.names[key]}: its {source} names {named[:100]!r}, which is no model here")
                continue
            at = _of_ref(parent)
            if at == key:
                continue
            self._name(at, parent)
            if at not in self._stated:
                self._ancestors[at] = parent
            self._stated[key].append(Statement(at, source, firm))

    def _parent(self, ref: ModelRef, named: str) -> ModelRef:
        """The model that a statement names: a folder that is given stands in for a repository of its name."""
        parent = named_base(ref, named, None)
        folders = [given for given in self._given.values() if given.folder and not given.adapter]
        near = [given for given in folders if given.short.lower() == last_part(named)]
        if parent.folder or _of_ref(parent) in self._given or len(near) != 1 or near[0] == ref:
            return parent
        self.notes.append(f"{named} is taken to be the folder {near[0]}, by its name")
        return near[0]

    def _statements(self, ref: ModelRef, folder: Path) -> Iterator[tuple[str, str, bool]]:
        """Names of parents, the file that has them, whether that is meant as such: the best source alone."""
        unread: list[str] = []
        for source, recipe in recipes_in(folder, unread):
            parents = [recipe.base] if recipe.base else [s.ref for s in recipe.models]
            named = [found_again(parent.bare) for parent in parents if not parent.step]
            yield from ((name, f"recipe in {source}", True) for name in named)
            return
        try:
            bases = stated_bases(folder)
        except RecipeError as error:
            self.notes.append(f"{ref}: {error}")
            bases = []
        if bases:
            yield from ((name, "card", True) for name in bases)
            return
        sources = _manifest_sources(folder)
        if sources:
            yield from ((name, MANIFEST, True) for name in sources)
            return
        trace = _json(folder / "config.json").get("_name_or_path")
        if isinstance(trace, str) and trace.strip():
            yield trace, "config.json", False

    # ---- names

    def _written(self, checkpoint: FileCheckpoint) -> str:
        """A name by which a recipe in the folder finds exactly this model."""
        if not isinstance(checkpoint, AdaptedCheckpoint):
            return self._place(checkpoint)
        both = f"{self._written(checkpoint.base)}+{self._place(checkpoint.adapter)}"
        try:
            parsed = ModelRef.parse(both, self.folder)
            return both if parsed.adapter is not None else self._place(checkpoint)
        except CheckpointError:  # folders with a + in their names
            return self._place(checkpoint.adapter if checkpoint.ref.adapter is None else checkpoint)

    def _place(self, checkpoint: FileCheckpoint) -> str:
        ref = checkpoint.ref
        if checkpoint.snapshot is not None:
            return f"{checkpoint.snapshot.repo_id}@{checkpoint.snapshot.commit}"
        if ref.folder is None or ref.adapter is not None:
            return ref.text
        near = ref.text
        if not os.path.isabs(os.path.expanduser(near)) and self.folder.resolve() != Path.cwd():
            near = os.path.relpath(ref.folder, self.folder.resolve())
        try:
            far = near.count("../") > 2  # nobody reads those
            return near if not far and ModelRef.parse(near, self.folder).folder == ref.folder else str(ref.folder)
        except CheckpointError:
            return str(ref.folder)


def _key(checkpoint: FileCheckpoint) -> str:
    if isinstance(checkpoint, AdaptedCheckpoint):
        return f"{_key(checkpoint.base)}+{_of_ref(checkpoint.adapter.ref)}"
    return _of_ref(checkpoint.ref)


def _of_ref(ref: ModelRef) -> str:
    return str(ref.folder) if ref.folder else (ref.repo_id or ref.text).lower()


def _branch(checkpoint: FileCheckpoint) -> str | None:
    """The revision that a commit was taken of."""
    snapshot = checkpoint.snapshot
    return snapshot.revision if snapshot is not None and snapshot.revision != snapshot.commit else None


def _manifest_sources(folder: Path) -> list[str]:
    """What an earlier merge was made from, if the folder holds one."""
    try:
        sources = _json(folder / MANIFEST).get("sources") or []
        return [source["model"] for source in sources if isinstance(source["model"], str)]
    except (TypeError, KeyError):
        return []


def _json(path: Path) -> dict[str, Any]:
    """What a file states; nothing where there is none that can be read: models below those that are merged."""
    try:
        return read_json(path, path.parent.name)
    except CheckpointError:
        return {}
