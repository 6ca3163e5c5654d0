"""Tokenizer files with more tokens: edited as JSON.

Everything that the first tokenizer says stays: ids, flags, special tokens, how text is split. A token that is *added*
is found in the text before the tokenizer's own model sees it. Tokens of another model's *core* become part of the
core: in BPE, this core's merges come first and then those of the other, so that tokens of the other are reached where
the first merges leave their parts. Text is then encoded with tokens of both, not always as one of the tokenizers alone
would do it. (mergekit adds such tokens as literal text, `Ġword`, which no text contains: none of them is ever used.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctl_merge.errors import MismatchError
from ctl_merge.tokenizer import TokenizerFiles, model_vocabulary, written

TOKENIZER, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
# Of files that hold the core in another form; what cannot be written anew would contradict tokenizer.json.
_OTHER_FORMS = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "vocab.txt")

Changes = dict[str, bytes | None]  # path -> content, None: to be left out


@dataclass
class NewTokens:
    """What a tokenizer is to get: ids of core tokens, entries of added ones, merges in their order."""

    core: dict[str, int] = field(default_factory=dict)
    added: list[dict[str, Any]] = field(default_factory=list)
    merges: list[tuple[str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.core or self.added)


def kind_of(model: Mapping[str, Any]) -> str:
    """BPE, WordPiece, WordLevel or Unigram; old files do not say."""
    if "type" in model:
        return str(model["type"])
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def check_cores(first: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str]) -> str | None:
    """Refuse to unite cores that spell words differently; a warning where only the splitting of text differs.

    Both as tokenizer.json has them, empty where there is none: of such a core only the tokens are known.
    """
    if not first or not other:
        return None
    kinds = kind_of(first.get("model", {})), kind_of(other.get("model", {}))
    advice = "Take the tokenizer of one: `tokenizer_source: base`, or a model's name."
    if kinds[0] != kinds[1]:
        raise MismatchError(f"a union of a {kinds[0]} ({names[0]}) and a {kinds[1]} ({names[1]}) is neither. {advice}")
    if kinds[0] == "Unigram":
        raise MismatchError(
            f"{names[0]} and {names[1]} have Unigram tokenizers, whose tokens have no room for others: ids are places "
            f"in a list, and scores of two vocabularies do not compare. {advice}"
        )
    spelling = [_spelling(whole) for whole in (first, other)]
    if spelling[0] != spelling[1]:
        raise MismatchError(f"{names[0]} writes tokens as {spelling[0]}, {names[1]} as {spelling[1]}. {advice}")
    differing = [key for key in ("normalizer", "pre_tokenizer") if first.get(key) != other.get(key)]
    if differing:
        return (
            f"the tokenizers of {names[0]} and {names[1]} split text differently ({', '.join(differing)}): "
            f"{names[0]}'s way is kept, and tokens that only the other way gives are never used"
        )
    return None


def _spelling(whole: Mapping[str, Any]) -> str:
    model, text = whole.get("model", {}), json.dumps([whole.get("pre_tokenizer"), whole.get("decoder")])
    marks = [f"{key} {model[key]!r}" for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    fallback = ["bytes of unknown characters"] if model.get("byte_fallback") else []
    return ", ".join(["bytes" if '"ByteLevel"' in text else "characters", *fallback, *marks])


def extended(files: TokenizerFiles, new: NewTokens) -> Changes:
    """The files that change when a tokenizer gets new tokens. Raises MismatchError where it cannot have them."""
    whole = files.json(TOKENIZER)
    if not whole:
        raise MismatchError(
            f"{files.name} has no tokenizer.json, which new tokens go into: save a fast tokenizer first "
            "(transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
        )
    whole["added_tokens"] = sorted([*whole.get("added_tokens", []), *new.added], key=lambda entry: entry["id"])
    wanted = {**{t: i for i, t in model_vocabulary(whole["model"]).items()}, **new.core}
    wanted |= {entry["content"]: entry["id"] for entry in whole["added_tokens"]}
    content = _compact(whole) if not new.core else b""
    if new.core or (_problem(content, wanted) and isinstance(whole["model"].get("vocab"), dict)):
        # Readers give ids to added tokens by counting on from the core, unless the core has them too.
        whole["model"]["vocab"] = dict(sorted(wanted.items(), key=lambda pair: pair[1]))
        _append_merges(whole["model"], new.merges)
        content = _compact(whole)
    problem = _problem(content, wanted)
    if problem:
        raise MismatchError(f"the tokenizer of {files.name} cannot take the new tokens: {problem}")
    changes: Changes = {TOKENIZER: content}
    if new.core:
        changes |= _core_in_other_forms(files, whole["model"], wanted)
    return changes | _added_for_old_readers(files, new.added)


def _append_merges(model: dict[str, Any], merges: Iterable[tuple[str, str]]) -> None:
    own = model.get("merges")
    if own is None:
        return
    as_text = all(isinstance(merge, str) for merge in own)
    prefix = model.get("continuing_subword_prefix") or ""
    known = {merge if isinstance(merge, str) else " ".join(merge) for merge in own}
    for pair in merges:
        made = pair[0] + pair[1].removeprefix(prefix)
        if " ".join(pair) not in known and {*pair, made} <= model["vocab"].keys():
            known.add(" ".join(pair))
            own.append(list(pair))
    if as_text and not any(" " in part for pair in own if isinstance(pair, list) for part in pair):
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in own]
    elif as_text:  # text cannot say where a token with a space ends
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in own]


def _compact(whole: Mapping[str, Any]) -> bytes:
    return json.dumps(whole, ensure_ascii=False).encode()  # on one line: indented, it takes five times as long


def _problem(content: bytes, wanted: Mapping[str, int]) -> str | None:
    """Read the tokenizer as its users will: does every token have the id of its row?"""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # what the library raises has no type of its own
        return str(error)
    wrong = next((token for token, i in wanted.items() if found.get(token) != i), None)
    if wrong is None:
        return None
    return f"readers would give {wrong!r} the id {found.get(wrong)}, and its row is {wanted[wrong]}"


def _core_in_other_forms(files: TokenizerFiles, model: Mapping[str, Any], wanted: Mapping[str, int]) -> Changes:
    changes: Changes = {path: None for path in _OTHER_FORMS if path in files.files}
    changes |= {path: None for path in files.files if path.endswith(".tiktoken")}
    if "vocab.json" in files.files:
        changes["vocab.json"] = json.dumps(model["vocab"], ensure_ascii=False).encode()
    if "merges.txt" in files.files:
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
        changes["merges.txt"] = ("#version: 0.2\n" + "".join(f"{line}\n" for line in lines)).encode()
    in_order = sorted(wanted, key=wanted.__getitem__)
    if "vocab.txt" in files.files and [wanted[token] for token in in_order] == list(range(len(wanted))):
        changes["vocab.txt"] = "".join(f"{token}\n" for token in in_order).encode()
    return changes


def _added_for_old_readers(files: TokenizerFiles, added: Sequence[Mapping[str, Any]]) -> Changes:
    """tokenizer_config.json and added_tokens.json, which readers without tokenizer.json look at."""
    changes: Changes = {}
    config, table = files.json(CONFIG), files.json(ADDED)
    if added and "added_tokens_decoder" in config:
        entries = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added}
        config["added_tokens_decoder"] = {**config["added_tokens_decoder"], **entries}
        changes[CONFIG] = written(config)
    if added and ADDED in files.files:
        table |= {entry["content"]: entry["id"] for entry in added}
        changes[ADDED] = written(table)
    return changes
