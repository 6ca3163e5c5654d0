"""The output's tokens, and their rows in every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ctl_merge import chat_template
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.companions import is_tokenizer_file
from ctl_merge.errors import MismatchError
from ctl_merge.model_config import fit_vocabulary
from ctl_merge.recipe import Recipe
from ctl_merge.reference import ModelRef
from ctl_merge.source_vocabularies import SourceVocabularies, Table
from ctl_merge.token_rows import MEAN, NONE, PADDING, ZERO, RowMap, align
from ctl_merge.tokenizer import TokenizerFiles, added_entry, written
from ctl_merge.tokenizer_files import TOKENIZER, NewTokens, check_cores, extended

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class OutputVocabulary:
    """The output's vocabulary, as far as it is not the first model's as it stands.

    `rows`: for each table each model's map, None where its rows stay. `sizes`: the tables' rows. `files`: those beside
    the weights that differ from the first model's, None for those that are left out (config.json is for `fit`).
    `config`: of the model whose special ids are used. `vocab_size`: before and after.
    """

    rows: Mapping[str, Mapping[ModelRef, RowMap | None]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, bytes | None] = field(default_factory=dict, repr=False)
    config: Mapping[str, Any] | None = field(default=None, repr=False)
    vocab_size: tuple[int, int] | None = None
    decisions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def fit(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The first model's config with the output's vocabulary."""
        return fit_vocabulary(config, self.vocab_size, self.config)


def plan_vocabulary(
    recipe: Recipe, checkpoints: Mapping[ModelRef, FileCheckpoint], tables: Sequence[Table], vocab_size: int | None
) -> OutputVocabulary:
    """Decide tokens, rows and tokenizer files; `vocab_size` is the first model's.

    Raises MismatchError where vocabularies differ and the recipe does not say what to do, or it cannot be done.
    """
    models = SourceVocabularies(recipe, checkpoints, tables)
    if recipe.tokenizer.source is None:
        found = OutputVocabulary(warnings=tuple(models.refuse_differences()) if tables else ())
    else:
        found = _Planner(recipe, models, tables).result(vocab_size)
    return _with_template(recipe.tokenizer.chat_template, found, models)


class _Planner:
    """Carries out the recipe's `tokenizer` setting."""

    def __init__(self, recipe: Recipe, models: SourceVocabularies, tables: Sequence[Table]) -> None:
        self.recipe, self.models, self.tables = recipe, models, tables
        self.setting, self.source, self.first = recipe.tokenizer, models.source, models.first
        self.warnings = models.check_unknown()
        self.decisions: list[str] = []
        self.new = NewTokens()
        self._known_ids: dict[tuple[ModelRef, int], np.ndarray] = {}
        self.tokens = dict(models.vocabularies[self.source].tokens)  # of the output, by id
        if self.setting.source == "union":
            self._unite()
        self.ids = {token: i for i, token in self.tokens.items()}
        self._add_configured()

    def result(self, vocab_size: int | None) -> OutputVocabulary:
        changes = self.new or self.setting.pad_to_multiple_of or self.source != self.first
        if changes and not self.tables:
            raise MismatchError(
                f"{self.first} has no table of as many rows as the `vocab_size` of its config.json states: its "
                "vocabulary cannot be changed. Remove `tokenizer_source` and `tokenizer`."
            )
        sizes = {table.name: self._size(table) for table in self.tables}
        rows = {table.name: self._maps(table, sizes[table.name]) for table in self.tables}
        fitting = [sizes[table.name] for table in self.tables if table.rows[self.first] == vocab_size]
        size = max(fitting or sizes.values(), default=vocab_size)
        resized = vocab_size is not None and size is not None and size != vocab_size
        if changes or resized or any(m for of_table in rows.values() for m in of_table.values()):
            self._tell(rows, sizes)
        return OutputVocabulary(
            rows=rows, sizes=sizes, files=self._files(),
            config=self.models.config(self.source) if self.source != self.first else None,
            vocab_size=(vocab_size, size) if resized else None,  # type: ignore[arg-type]
            decisions=tuple(self.decisions), warnings=tuple(self.warnings),
        )  # fmt: skip

    # ---- tokens

    def _unite(self) -> None:
        """Tokens that only other models have, in the order of models and ids."""
        known, place = set(self.tokens.values()), max(self.tokens, default=-1) + 1
        for ref in self.models.deciding:
            theirs, files = self.models.with_rows(ref), self.models.files[ref]
            missing = [theirs.tokens[i] for i in sorted(theirs.tokens) if theirs.tokens[i] not in known]
            if not missing:
                continue
            whole, before = files.json(TOKENIZER), len(self.new.core)
            entries = files.entries(whole)
            for token in dict.fromkeys(missing):
                self.tokens[place] = token
                if token in entries:
                    self.new.added.append({"id": place, **entries[token]})
                else:
                    self.new.core[token] = place
                place += 1
            known.update(missing)
            if len(self.new.core) > before:
                own = self.models.files[self.source]
                warning = check_cores(own.json(TOKENIZER), whole, (own.name, files.name))
                self.warnings += [warning] if warning else []
                self.new.merges += files.merges(whole)
            self.decisions.append(f"{len(set(missing)):,} tokens that only {ref} has are added to the vocabulary")

    def _add_configured(self) -> None:
        """Check `tokens`; those that the output lacks are added to it."""
        problems, place = [], max(self.tokens, default=-1) + 1
        for token, setting in self.setting.tokens.items():
            wanted = token if setting.token is None else setting.token
            if setting.model and isinstance(wanted, str) and wanted not in self.models.with_rows(setting.model).ids:
                problems.append(f"{setting.model} has no token {wanted!r}, which {token!r} is to be taken from")
            if token in self.ids:
                continue
            owners = [ref for ref in self.models.deciding if token in self.models.with_rows(ref).ids]
            if setting.model is None and not setting.zero and not owners:
                problems.append(f"no model has the token {token!r}: give it a `source`, such as {{kind: zero}}")
            donors = (self.models.files[ref] for ref in owners)
            flags = (files.entries(files.json(TOKENIZER)).get(token) for files in donors)
            entry = next((found for found in flags if found), added_entry({"content": token}))
            self.new.added.append({"id": place, **entry})
            self.decisions.append(f"the token {token!r} is added to the vocabulary")
            self.tokens[place], self.ids[token] = token, place
            place += 1
        if problems:
            raise MismatchError("`tokenizer: tokens` does not fit the models:\n  " + "\n  ".join(problems))

    # ---- rows

    def _source_rows(self, table: Table) -> int:
        if self.source in table.rows:
            return table.rows[self.source]
        return max(self.models.vocabularies[self.source].tokens, default=-1) + 1  # not merged itself

    @cached_property
    def _required(self) -> int:
        """The rows that tokens need which the source's own tables may not have."""
        needed = [*self.new.core.values(), *(entry["id"] for entry in self.new.added)]
        needed += [self.ids[token] for token in self.setting.tokens]
        if self.setting.source == "union":
            beyond = {token for i, token in self.tokens.items() if i >= self.models.rows(self.source)}
            owned = (token for ref in self.models.deciding for token in beyond & self.models.with_rows(ref).ids.keys())
            needed += [self.ids[token] for token in owned]
        return max(needed, default=-1) + 1

    def _size(self, table: Table) -> int:
        own, multiple = self._source_rows(table), self.setting.pad_to_multiple_of
        if not multiple:
            return max(own, self._required)
        vocabulary = self.models.vocabularies[self.source]
        used = max((i for i in vocabulary.tokens if i < own), default=-1) + 1 if vocabulary.complete else own
        return -(-max(used, self._required) // multiple) * multiple

    def _maps(self, table: Table, size: int) -> dict[ModelRef, RowMap | None]:
        refs = self.models.refs
        owners = [table.parts[ref].model for ref in refs]  # the base, for a model that lacks the table (missing: base)
        sources = tuple((table.parts[ref].model, table.parts[ref].tensor) for ref in refs)
        ids = np.stack([self._ids(owner, size) for owner in owners])
        ids[ids >= np.array([table.rows[ref] for ref in refs])[:, None]] = -1
        stand_ins, forced = self._stand_ins(table, size)
        own = self._source_rows(table)
        tokens = max(own, max((i for i in self.tokens if i < size), default=-1) + 1)
        base = refs.index(self.recipe.base) if self.recipe.base else None
        deciding = [owner == ref and ref in self.models.deciding for ref, owner in zip(refs, owners, strict=True)]
        maps = align(sources, ids, deciding, base, stand_ins, forced, tokens, table.width)
        found = zip(refs, maps, strict=True)
        return {ref: None if m.is_identity(i, table.rows[ref]) else m for i, (ref, m) in enumerate(found)}

    def _ids(self, ref: ModelRef, size: int) -> np.ndarray:
        """The row of each of the output's rows in a model's own tables: its token's, or the same where none has one."""
        if (ref, size) in self._known_ids:
            return self._known_ids[ref, size]
        vocabulary = self.models.vocabularies[self.source if ref in self.models.taken_as_source else ref]
        found = np.arange(size)
        if vocabulary.tokens != self.tokens:
            get, free = vocabulary.ids.get, self._free(size)
            found = np.fromiter((get(self.tokens.get(i, ""), -1) for i in range(size)), np.int64, size)
            found[free] = [-1 if i in vocabulary.tokens else i for i in free]
        self._known_ids[ref, size] = found
        return found

    def _free(self, size: int) -> list[int]:
        """Rows without a token."""
        return [i for i in range(size) if i not in self.tokens]

    def _stand_ins(self, table: Table, size: int) -> tuple[np.ndarray, list[int]]:
        """What the recipe says of single tokens, (2, size) sources and rows, and the rows that take it everywhere.

        A row without a token is the source's own.
        """
        found = np.full((2, size), NONE)
        own = min(self._source_rows(table), size)
        free = self._free(size)
        found[0, free] = self.models.refs.index(self.source) if self.source in table.rows else ZERO
        found[1, free] = free
        found[0, [i for i in free if i >= own]] = ZERO
        forced = []
        for token, setting in self.setting.tokens.items():
            place = self.ids[token]
            forced += [place] if setting.force else []
            if setting.zero:
                found[:, place] = ZERO, 0
            elif setting.model is not None:
                wanted = token if setting.token is None else setting.token
                row = wanted if isinstance(wanted, int) else self.models.with_rows(setting.model).ids[wanted]
                if row >= table.rows[setting.model]:
                    raise MismatchError(
                        f"{table.name} of {setting.model} has {table.rows[setting.model]} rows: there is no row {row}, "
                        f"which {token!r} is to be taken from"
                    )
                found[:, place] = self.models.refs.index(setting.model), row
        return found, forced

    # ---- files and words

    def _files(self) -> dict[str, bytes | None]:
        first, files = self.models.files[self.first], self.models.files[self.source]
        changes: dict[str, bytes | None] = {}
        if self.source != self.first:
            changes |= {path: None for path in first.files if is_tokenizer_file(path)}
            changes |= {path: files.content(path) for path in files.files if is_tokenizer_file(path)}
            generation = self.models.config(self.first, GENERATION)
            if generation is not None:
                theirs = self.models.config(self.source, GENERATION) or self.models.config(self.source) or {}
                fitted = fit_vocabulary(generation, None, theirs)
                changes |= {GENERATION: written(fitted)} if fitted != generation else {}
        return changes | extended(files, self.new) if self.new else changes

    def _tell(self, rows: Mapping[str, Mapping[ModelRef, RowMap | None]], sizes: Mapping[str, int]) -> None:
        """What happens to rows, in words, of the largest table."""
        table = max(self.tables, key=lambda t: sizes[t.name])
        kind = f"vocabulary of {self.source}"
        kind = f"union of the vocabularies, {self.source}'s first" if self.setting.source == "union" else kind
        complete = self.models.vocabularies[self.source].complete  # else only the added tokens are known
        number = f"{len(self.tokens):,} tokens, " if complete else ""
        self.decisions.insert(0, f"{kind}: {number}{sizes[table.name]:,} rows ({table.name})")
        unmade = 0
        for at, ref in enumerate(self.models.refs):
            found, stored = rows[table.name][ref], table.rows[ref]
            if found is None:
                self.decisions.append(f"{ref}: all of its {stored:,} rows are used as they are")
                continue
            own, same = found.table == at, found.row == np.arange(len(found.row))
            used = len(np.unique(found.row[own]))
            counts = {"kept": (own & same).sum(), "moved": (own & ~same).sum()}
            others = {f"taken from {r}": (found.table == i).sum() for i, r in enumerate(self.models.refs) if i != at}
            counts |= {**others, "the mean of the models that have the token": (found.table == MEAN).sum()}
            counts |= {"zero": (found.table == ZERO).sum(), "padding, its mean row": (found.table == PADDING).sum()}
            told = [f"{number:,} rows {what}" for what, number in counts.items() if number]
            told += [f"{stored - used:,} of its own left out"] if stored > used else []
            self.decisions.append(f"{ref}: {', '.join(told)}")
            unmade = max(unmade, int((found.table == ZERO).sum()))
        zeros = sum(setting.zero for setting in self.setting.tokens.values())
        if unmade > zeros:
            self.warnings.append(f"{unmade - zeros} tokens have a row in no model: their rows are zeros")


def _with_template(template: str | None, found: OutputVocabulary, models: SourceVocabularies) -> OutputVocabulary:
    """The vocabulary with the recipe's chat template in its files."""
    if template is None:
        return found
    files = models.files[models.first].files
    present = {**{p: f for p, f in files.items() if is_tokenizer_file(p)}, **found.files}
    output = TokenizerFiles({p: f for p, f in present.items() if f is not None}, str(models.source))
    if not any(
        path in output
        for path in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", chat_template.CONFIG)
    ):
        raise MismatchError(f"`chat_template`: {models.source} has no tokenizer files that could hold one")
    own = chat_template.template_of(output)
    told = "the chat template is the recipe's"
    if template == "auto":
        templates = [chat_template.template_of(models.files[ref]) for ref in models.deciding]
        chosen = chat_template.most_common(templates)
        if chosen is None:
            return replace(found, decisions=(*found.decisions, "no model has a chat template: none is written"))
        number = sum(t is not None and t.strip() == chosen.strip() for t in templates)
        told = f"the chat template is that of {number} of {len(templates)} models"
        template = chosen
    changes = chat_template.placed(output, template) if own is None or own.strip() != template.strip() else {}
    return replace(found, files={**found.files, **changes}, decisions=(*found.decisions, told))
