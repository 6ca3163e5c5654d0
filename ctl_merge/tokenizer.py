"""Which token each embedding row belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ctl_merge.errors import CheckpointError


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model by id; `sentencepiece` is the hash of a tokenizer.model, whose tokens are not read."""

    tokens: Mapping[int, str] = field(default_factory=dict)
    complete: bool = False  # `tokens` are all tokens, not only the added ones
    sentencepiece: str | None = None

    @property
    def known(self) -> bool:
        return self.complete or self.sentencepiece is not None


def read_vocabulary(folder: Path, name: str) -> Vocabulary:
    """The vocabulary that the tokenizer files in a model's folder define; an empty one where there are none."""
    try:
        return _read(folder)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{name}: its tokenizer files cannot be read ({type(error).__name__}: {error})") from None


def _read(folder: Path) -> Vocabulary:
    sentencepiece = folder / "tokenizer.model"
    digest = hashlib.sha256(sentencepiece.read_bytes()).hexdigest() if sentencepiece.is_file() else None
    added = {int(i): str(t) for t, i in _json(folder / "added_tokens.json", {}).items()}
    whole = _json(folder / "tokenizer.json", None)
    if whole is not None:
        core = whole["model"].get("vocab", {})
        pairs = ((i, t) for t, i in core.items()) if isinstance(core, dict) else enumerate(entry[0] for entry in core)
        added |= {int(entry["id"]): str(entry["content"]) for entry in whole.get("added_tokens", [])}
        return Vocabulary(dict(pairs) | added, True, digest)
    table = _json(folder / "vocab.json", None)
    if isinstance(table, dict):
        return Vocabulary({int(i): str(t) for t, i in table.items()} | added, True, digest)
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text("utf-8").splitlines()
        return Vocabulary(dict(enumerate(lines)) | added, True, digest)
    return Vocabulary(added, False, digest)


def _json(path: Path, default: object) -> dict:
    return json.loads(path.read_text("utf-8")) if path.is_file() else default  # type: ignore[return-value]


@dataclass(frozen=True)
class Difference:
    """How a model's vocabulary differs from the base's; ids are embedding rows."""

    compared: bool  # False: one of them has no tokenizer files, or files of different kinds
    conflicting: tuple[int, ...] = ()  # both have a token there, and not the same
    moved: tuple[str, ...] = ()  # tokens that both have, at different ids


def compare(base: Vocabulary, other: Vocabulary) -> Difference:
    """Where `other` gives another meaning to an id that `base` uses."""
    same_core = base.sentencepiece is not None and base.sentencepiece == other.sentencepiece
    if not (base.complete and other.complete) and not same_core:
        return Difference(compared=False)
    if base.tokens == other.tokens:
        return Difference(compared=True)
    ids = {token: i for i, token in base.tokens.items()}
    differing = [i for i, token in other.tokens.items() if base.tokens.get(i, token) != token]
    moved = tuple(token for i, token in other.tokens.items() if ids.get(token, i) != i)
    return Difference(True, tuple(sorted(differing)), moved)
