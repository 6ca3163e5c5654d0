"""How a recipe names a model: folder, repository, adapter."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ctl_merge.errors import CheckpointError
from ctl_merge.problems import nearest

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)

_MOST_SIGNS = 20  # in a name; more of them would only take time


@dataclass(frozen=True)
class ModelRef:
    """A model as the recipe wrote it (`text`): a local folder, a Hub repository, or an earlier step of the file.

    With an `adapter`, the other fields are the model's that it is applied to; the text is that of both.
    """

    text: str = field(compare=False)  # `./math` and `math` are one model
    folder: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    step: str | None = None  # the name of a merge in the same file
    layers: tuple[int, int] | None = None  # [first, end): a part of the model, as if it were one
    adapter: ModelRef | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # plans of large models ask for it millions of times
        return hash((self.folder, self.repo_id, self.revision, self.step, self.layers, self.adapter))

    def __reduce__(self) -> Any:  # without the hash, which another process has otherwise
        return ModelRef, tuple(getattr(self, each.name) for each in fields(self))

    def __str__(self) -> str:
        return self.text if self.layers is None else f"{self.text}[{self.layers[0]}:{self.layers[1]}]"

    @property
    def short(self) -> str:
        """A name that does not depend on where the model lies: of the repository, or the folder's own."""
        own = self.repo_id or (self.folder.name if self.folder else self.step or self.text)
        return own if self.adapter is None else f"{own}+{self.adapter.short}"

    @property
    def bare(self) -> ModelRef:
        """The model without its adapter."""
        if self.adapter is None:
            return self
        return replace(self, text=self.text.removesuffix(f"+{self.adapter.text}"), adapter=None)

    def with_adapter(self, adapter: ModelRef) -> ModelRef:
        """The model with an adapter applied to it. Raises CheckpointError if there is one already."""
        if self.adapter is not None or adapter.adapter is not None:
            raise CheckpointError(f"{self}+{adapter}: one adapter on a model; merge the others in steps of their own")
        return replace(self, text=f"{self.text}+{adapter.text}", adapter=adapter)

    @classmethod
    def parse(cls, text: str, relative_to: Path | None = None) -> ModelRef:
        """Read `folder`, `org/name` or `org/name@revision`, with or without `+` and an adapter in the same form.

        A relative folder is looked for in the working directory, then beside the recipe (`relative_to`).
        Raises CheckpointError where the text is neither an existing folder nor a repository's name.
        """
        if not text.strip() or any(ord(c) < 32 for c in text):
            raise CheckpointError(f"{text!r} names no model: write a folder, org/name or org/name@revision")
        folder = _find_folder(text, relative_to)
        if folder is not None:
            return cls(text, folder=folder)
        if os.path.isfile(os.path.expanduser(text)):
            raise CheckpointError(f"{text!r} is a file: a model is a folder, org/name or org/name@revision")
        pairs = list(_with_adapters(text, relative_to))
        if len(pairs) > 1:
            raise CheckpointError(
                f"{text!r} can be cut into a model and its adapter in {len(pairs)} ways: write model and lora apart"
            )
        if pairs:
            model, adapter = (cls.parse(part, relative_to) for part in pairs[0])
            return model.with_adapter(adapter)
        if _repository(text)[0] is None:
            both = ", nor one of these with one adapter after a `+`" if "+" in text else ""
            raise CheckpointError(
                f"{text!r} is neither a folder that exists nor a Hub repository (org/name or org/name@revision){both}"
                f"{near_folder(text, relative_to)}"
            )
        return cls.on_hub(text)

    @classmethod
    def on_hub(cls, text: str) -> ModelRef:
        """Read `org/name` or `org/name@revision`, whatever folders there are. Raises CheckpointError."""
        repo_id, revision = _repository(text)
        if repo_id is None:
            raise CheckpointError(f"{text!r} is no Hub repository (org/name or org/name@revision)")
        return cls(text, repo_id=repo_id, revision=revision or "main")


def near_folder(text: str, relative_to: Path | None = None) -> str:
    """` (did you mean 'x'?)` where a folder of nearly this name exists, or nothing."""
    path = Path(os.path.expanduser(text))
    for place in (path, *([relative_to / path] if relative_to else [])):
        try:
            names = [entry.name for entry in os.scandir(place.parent) if entry.is_dir()]
        except (OSError, ValueError):
            continue
        if found := nearest(path.name, names, str(path.parent)):
            return found
    return ""


def _repository(text: str) -> tuple[str | None, str]:
    """The repository and the revision that the text may stand for."""
    repo_id, _, revision = text.removeprefix("hf://").partition("@")
    named = _REPOSITORY.fullmatch(repo_id) and ".." not in repo_id and "--" not in repo_id
    return (repo_id, revision) if named else (None, "")


def _with_adapters(text: str, relative_to: Path | None) -> Iterator[tuple[str, str]]:
    """Every way to read the text as a model and an adapter on it: folders may have a `+` in their names."""
    for at in [i for i, character in enumerate(text) if character == "+"][:_MOST_SIGNS]:
        pair = text[:at], text[at + 1 :]
        if all(part.strip() and (_find_folder(part, relative_to) or _repository(part)[0]) for part in pair):
            yield pair


def _find_folder(text: str, relative_to: Path | None) -> Path | None:
    """The existing folder that the text names; CheckpointError where two different ones answer to it."""
    path = Path(os.path.expanduser(text))
    places = [path] if path.is_absolute() or relative_to is None else [path, relative_to / path]
    found = list(dict.fromkeys(place.resolve() for place in places if os.path.isdir(place)))
    if len(found) > 1:
        raise CheckpointError(
            f"{text!r} is a folder in the working directory and another one beside the recipe: write the absolute "
            "path of the one that is meant"
        )
    return found[0] if found else None
