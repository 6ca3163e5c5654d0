"""Which token each embedding row belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ctl_merge.bounded import MOST_TOKENIZER, parse_bounded, read_bounded
from ctl_merge.errors import CheckpointError


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model by id; `sentencepiece` is the hash of a tokenizer.model, whose tokens are not read."""

    core: Mapping[int, str] = field(default_factory=dict)  # of the tokenizer's model
    added: Mapping[int, str] = field(default_factory=dict)  # looked for in the text before the model sees it
    complete: bool = False  # all tokens are known, not only the added ones
    sentencepiece: str | None = None

    @property
    def known(self) -> bool:
        return self.complete or self.sentencepiece is not None

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        return {**self.core, **self.added}

    @cached_property
    def ids(self) -> Mapping[str, int]:
        return {token: i for i, token in self.tokens.items()}

    def below(self, rows: int) -> Vocabulary:
        """The tokens that have a row: tokenizers also list some that the model does not know."""
        core, added = ({i: t for i, t in part.items() if i < rows} for part in (self.core, self.added))
        return replace(self, core=core, added=added)


_DECIDING = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "vocab.json", "vocab.txt")
_MOST_ROWS = 2**22  # of an embedding: ten times as many tokens as any model has
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerFiles:
    """The files that define a model's tokenizer, read as they are needed. Raises CheckpointError for broken ones."""

    def __init__(self, files: Mapping[str, Path | bytes], name: str) -> None:
        self.files, self.name = files, name

    def __contains__(self, path: str) -> bool:
        return path in self.files

    def content(self, path: str) -> bytes:
        found = self.files[path]
        try:
            return found if isinstance(found, bytes) else read_bounded(found, MOST_TOKENIZER)
        except (OSError, ValueError) as error:
            raise self._broken(path, error) from None

    def json(self, path: str) -> dict[str, Any]:
        """A JSON object; an empty one where there is no such file."""
        try:
            found = parse_bounded(self.content(path)) if path in self.files else {}
            return {**found}
        except (ValueError, TypeError) as error:
            raise self._broken(path, error) from None

    def text(self, path: str) -> str:
        try:
            return self.content(path).decode()
        except UnicodeDecodeError as error:
            raise self._broken(path, error) from None

    def identity(self) -> tuple[tuple[str, bytes], ...]:
        """What the vocabulary depends on: equal for equal files."""
        return tuple((p, hashlib.sha256(self.content(p)).digest()) for p in _DECIDING if p in self.files)

    def _broken(self, path: str, error: Exception) -> CheckpointError:
        what = f"{path}: {type(error).__name__}: {error}"
        return CheckpointError(f"{self.name}: its tokenizer files cannot be read ({what})")

    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the files define; an empty one where there are none."""
        with self._understood("the vocabulary"):
            found = self._vocabulary()
            for i, token in (*found.core.items(), *found.added.items()):
                if type(i) is not int or not 0 <= i < _MOST_ROWS:
                    raise ValueError(f"a token has the id {str(i)[:40]}")
                if not isinstance(token, str):
                    raise ValueError(f"the token {i} is no text")
        return found

    @contextmanager
    def _understood(self, what: str) -> Iterator[None]:
        """Files that are JSON, and not what a tokenizer's are, are an error in words."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise self._broken(what, error) from None

    def _vocabulary(self) -> Vocabulary:
        pieces = self.content("tokenizer.model") if "tokenizer.model" in self.files else None
        digest = hashlib.sha256(pieces).hexdigest() if pieces is not None else None
        added = {int(i): str(t) for t, i in self.json("added_tokens.json").items()}
        if "tokenizer.json" in self.files:
            whole = self.json("tokenizer.json")
            added |= {int(entry["id"]): entry["content"] for entry in whole.get("added_tokens", [])}
            return Vocabulary(model_vocabulary(whole["model"]), added, True, digest)
        if "vocab.json" in self.files:
            return Vocabulary({int(i): str(t) for t, i in self.json("vocab.json").items()}, added, True, digest)
        if "vocab.txt" in self.files:
            lines = self.text("vocab.txt").splitlines()
            return Vocabulary(dict(enumerate(lines)), added, True, digest)
        return Vocabulary({}, added, False, digest)

    def entries(self, whole: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The added tokens with all of their flags, as tokenizer.json (`whole`) has them: content -> entry."""
        with self._understood("the added tokens"):
            listed = whole.get("added_tokens")
            if listed is None:
                decoder = self.json("tokenizer_config.json").get("added_tokens_decoder") or {}
                plain = [{"content": token} for token in self.json("added_tokens.json")]
                listed = [*plain, *decoder.values()]
            return {entry["content"]: added_entry(entry) for entry in listed}

    def merges(self, whole: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The merges of a BPE in their order, of tokenizer.json (`whole`) if there is one; none for other kinds."""
        with self._understood("the merges"):
            listed = whole.get("model", {}).get("merges")
            if listed is None and not whole and "merges.txt" in self.files:
                lines = self.text("merges.txt").splitlines()
                listed = [line for line in lines if line and not line.startswith("#version")]
            pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in listed or []]
            if any(len(pair) != 2 or not all(isinstance(part, str) for part in pair) for pair in pairs):
                raise ValueError("a merge is no pair of texts")
            return pairs  # type: ignore[return-value]


def written(data: Mapping[str, Any]) -> bytes:
    """JSON as the files beside a model's weights have it."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def added_entry(given: Mapping[str, Any]) -> dict[str, Any]:
    """An added token with all of its flags; one without any is found in the text as it is written."""
    return {"content": given["content"], **{flag: bool(given.get(flag)) for flag in _FLAGS}}


def model_vocabulary(model: Mapping[str, Any]) -> dict[int, str]:
    """The tokens of the `model` of a tokenizer.json by id: a table, or a list of tokens with their scores."""
    core = model.get("vocab", {})
    return {i: t for t, i in core.items()} if isinstance(core, dict) else {i: e[0] for i, e in enumerate(core)}


def completed(vocabularies: Iterable[Vocabulary]) -> list[Vocabulary]:
    """Vocabularies of which only a tokenizer.model is there get the tokens from another model that has the same one."""
    found = list(vocabularies)
    cores = {v.sentencepiece: v.core for v in found if v.complete and v.sentencepiece}
    return [
        replace(v, core=cores[v.sentencepiece], complete=True) if not v.complete and v.sentencepiece in cores else v
        for v in found
    ]


@dataclass(frozen=True)
class Difference:
    """How a model's vocabulary differs from the base's; ids are embedding rows."""

    compared: bool  # False: one of them has no tokenizer files, or files of different kinds
    conflicting: tuple[int, ...] = ()  # both have a token there, and not the same


def compare(base: Vocabulary, other: Vocabulary) -> Difference:
    """Where `other` gives another meaning to an id that `base` uses."""
    same_core = base.sentencepiece is not None and base.sentencepiece == other.sentencepiece
    if not (base.complete and other.complete) and not same_core:
        return Difference(compared=False)
    if base.tokens == other.tokens:
        return Difference(compared=True)
    differing = [i for i, token in other.tokens.items() if base.tokens.get(i, token) != token]
    return Difference(True, tuple(sorted(differing)))
