"""How a recipe names a model: folder or Hub repository."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ctl_merge.errors import CheckpointError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)

MERGE_FIRST = "merge it into its base first (peft: merge_and_unload) and name the result"


@dataclass(frozen=True)
class ModelRef:
    """A model as the recipe wrote it (`text`): a local folder, a Hub repository, or an earlier step of the file."""

    text: str = field(compare=False)  # `./math` and `math` are one model
    folder: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    step: str | None = None  # the name of a merge in the same file
    layers: tuple[int, int] | None = None  # [first, end): a part of the model, as if it were one

    def __str__(self) -> str:
        return self.text if self.layers is None else f"{self.text}[{self.layers[0]}:{self.layers[1]}]"

    @property
    def short(self) -> str:
        """A name that does not depend on where the model lies: of the repository, or the folder's own."""
        return self.repo_id or (self.folder.name if self.folder else self.text)

    @classmethod
    def parse(cls, text: str, relative_to: Path | None = None) -> ModelRef:
        """Read `folder`, `org/name` or `org/name@revision`.

        A relative folder is looked for in the working directory, then beside the recipe (`relative_to`).
        Raises CheckpointError where the text is neither an existing folder nor a repository's name.
        """
        if not text.strip() or any(ord(c) < 32 for c in text):
            raise CheckpointError(f"{text!r} names no model: write a folder, org/name or org/name@revision")
        folder = _find_folder(text, relative_to)
        if folder is not None:
            return cls(text, folder=folder)
        name, _, adapter = text.partition("+")
        if adapter and (_REPOSITORY.fullmatch(name.partition("@")[0]) or _find_folder(name, relative_to)):
            raise CheckpointError(
                f"{text!r} names an adapter on a model; adapters are not supported yet: {MERGE_FIRST}"
            )
        repo_id, _, revision = text.removeprefix("hf://").partition("@")
        if not _REPOSITORY.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
            raise CheckpointError(
                f"{text!r} is neither a folder that exists nor a Hub repository (org/name or org/name@revision)"
            )
        return cls(text, repo_id=repo_id, revision=revision or "main")


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
