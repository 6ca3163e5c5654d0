"""The vocabularies of the models that are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.companions import companions
from ctl_merge.errors import MismatchError
from ctl_merge.recipe import Recipe
from ctl_merge.reference import ModelRef
from ctl_merge.stored import companion_folder, read_json
from ctl_merge.token_rows import Input
from ctl_merge.tokenizer import TokenizerFiles, Vocabulary, compare, completed


@dataclass(frozen=True)
class Table:
    """A tensor with one row a token: each model's part in it, and how many rows of `width` entries that has."""

    name: str
    parts: Mapping[ModelRef, Input]
    rows: Mapping[ModelRef, int]
    width: int


class SourceVocabularies:
    """Vocabularies and tokenizer files of the models that are merged, and of one more that gives its tokenizer."""

    def __init__(
        self, recipe: Recipe, checkpoints: Mapping[ModelRef, FileCheckpoint], tables: Sequence[Table]
    ) -> None:  # fmt: skip
        self.recipe, self.tables, self.refs = recipe, tables, recipe.refs
        self.first = self.refs[0]
        self.deciding = tuple(ref for ref in self.refs if ref not in recipe.onlookers)
        source = recipe.tokenizer.source
        self.source = source if isinstance(source, ModelRef) else self.first
        self._checkpoints = checkpoints

    @cached_property
    def folders(self) -> dict[ModelRef, Path]:
        folders = {ref: self._checkpoints[ref].folder for ref in self.refs}
        return folders if self.source in folders else {**folders, self.source: companion_folder(self.source)}

    @cached_property
    def files(self) -> dict[ModelRef, TokenizerFiles]:
        return {ref: TokenizerFiles(companions(folder), str(ref)) for ref, folder in self.folders.items()}

    @cached_property
    def vocabularies(self) -> dict[ModelRef, Vocabulary]:
        """Those of models that have the same tokenizer files are one object."""
        known: dict[tuple[tuple[str, bytes], ...], Vocabulary] = {}
        found = {}
        for ref, files in self.files.items():
            key = files.identity()
            if key not in known:
                known[key] = files.vocabulary()
            found[ref] = known[key]
        distinct = list(known.values())
        whole = {id(before): after for before, after in zip(distinct, completed(distinct), strict=True)}
        return {ref: whole[id(vocabulary)] for ref, vocabulary in found.items()}

    def config(self, ref: ModelRef, file: str = "config.json") -> dict[str, Any] | None:
        path = self.folders[ref] / file
        return read_json(path, str(ref)) if path.is_file() else None

    def rows(self, ref: ModelRef) -> int:
        """The most rows that a model has for its tokens."""
        return max((table.rows[ref] for table in self.tables), default=0)

    def with_rows(self, ref: ModelRef) -> Vocabulary:
        """The tokens of a model that have a row."""
        return self._with_rows[self.source if ref in self.taken_as_source else ref]

    @cached_property
    def _with_rows(self) -> dict[ModelRef, Vocabulary]:
        beyond = {ref for ref in self.refs if max(self.vocabularies[ref].tokens, default=-1) >= self.rows(ref)}
        return {ref: v.below(self.rows(ref)) if ref in beyond else v for ref, v in self.vocabularies.items()}

    @cached_property
    def taken_as_source(self) -> frozenset[ModelRef]:
        """Models whose tokens cannot be compared with those of the tokenizer's source."""
        source = self.vocabularies[self.source]
        others = (ref for ref in self.refs if ref != self.source)
        return frozenset(ref for ref in others if not compare(source, self.vocabularies[ref]).compared)

    def check_unknown(self) -> list[str]:
        """A model without a readable tokenizer has the source's tokens if it has as many rows; warnings of those."""
        warnings = []
        for ref in (ref for ref in self.refs if ref in self.taken_as_source):
            if self.source not in self.refs or any(t.rows[ref] != t.rows[self.source] for t in self.tables):
                raise MismatchError(
                    f"the embedding rows of {ref} cannot be matched with those of {self.source}: its tokenizer is "
                    "unknown. Save a fast tokenizer beside the weights of each "
                    "(transformers: AutoTokenizer.from_pretrained(…).save_pretrained(folder))."
                )
            if self.vocabularies[ref].known or self.vocabularies[self.source].known:
                warnings.append(_cannot_be_compared(self.source, ref))
        return warnings

    def refuse_differences(self) -> list[str]:
        """Without a setting all vocabularies must agree; returns warnings where that cannot be seen."""
        warnings = []
        ours = self._with_rows[self.first]
        for ref in (r for r in self.refs if r != self.first):
            theirs = self._with_rows[ref]
            difference = compare(ours, theirs)
            if not difference.compared and (ours.known or theirs.known):
                warnings.append(_cannot_be_compared(self.first, ref))
            sizes = [(t.name, t.rows[self.first], t.rows[ref]) for t in self.tables]
            name, own, other = next((s for s in sizes if s[1] != s[2]), sizes[0])
            if own == other and not difference.conflicting:
                continue
            what = f"{own} rows in {self.first}, {other} in {ref}"
            if own == other:
                i = difference.conflicting[0]
                what = (
                    f"{len(difference.conflicting)} ids stand for other tokens in {ref} than in {self.first}, such as "
                    f"{i} for {theirs.tokens[i]!r} and {ours.tokens[i]!r}"
                )
            raise MismatchError(
                f"different vocabularies ({name}): {what}. Set `tokenizer_source: base` to keep the vocabulary of "
                f"{self.first}: rows and tokens that only {ref} has are then left out. Or `tokenizer_source: union`, "
                "to have all tokens, or a model's name."
            )
        return warnings


def _cannot_be_compared(one: ModelRef, other: ModelRef) -> str:
    return f"the tokenizers of {one} and {other} cannot be compared: taken to be the same"
