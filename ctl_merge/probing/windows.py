"""The windows of tokens that a probe runs over."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.companions import companions
from ctl_merge.errors import DataError, MismatchError
from ctl_merge.merging import Merge
from ctl_merge.model import open_model
from ctl_merge.probing.data import SAMPLE, TokenSet, cut, load_tokenizer, load_tokens
from ctl_merge.probing.forward import check_text, context
from ctl_merge.probing.placement import LENGTH, Options
from ctl_merge.probing.rows import DataSpec
from ctl_merge.probing.texts import MOST_LINES, default_texts
from ctl_merge.stacks import find_blocks
from ctl_merge.tokenizer import TokenizerFiles


def token_sets(opened: Merge, base: Checkpoint, data: str | Sequence[str], options: Options) -> list[TokenSet]:
    """Windows that the base's model reads. Raises DataError, MismatchError and ProbeError; no weight is read."""
    length = window_length(base, options)
    tokenizer = merge_tokenizer(opened, options.trust_remote_code)
    sets = cut_sets(parse_specs(data, options), tokenizer, options, length)
    if opened.recipe.tokenizer.source is None:
        check_same_tokens(opened, tokenizer, sets, options.trust_remote_code)
    return sets


def window_length(checkpoint: Checkpoint, options: Options) -> int:
    """Tokens of a window: what was asked for, else 256 or the model's context. Raises ProbeError."""
    model, _ = open_model(checkpoint, trust_remote_code=options.trust_remote_code)
    find_blocks(model, options.blocks)
    length = options.length or min(LENGTH, context(model) or LENGTH)
    check_text(model, length)
    return length


def merge_tokenizer(opened: Merge, trust_remote_code: bool = False) -> Any:
    """The tokenizer that a merge would be written with."""
    with tempfile.TemporaryDirectory() as folder:
        opened.write_companions(Path(folder))
        return load_tokenizer(Path(folder), str(opened.recipe.refs[0]), trust_remote_code)


def parse_specs(data: str | Sequence[str], options: Options) -> list[DataSpec]:
    """Data sets by their specs, each with a name of its own, joined as the options say. Raises DataError."""
    specs = [
        replace(DataSpec.parse(text), join=options.join, end=options.end)
        for text in ([data] if isinstance(data, str) else data)
    ]
    twice = sorted({spec.name for spec in specs if [other.name for other in specs].count(spec.name) > 1})
    if twice:
        raise DataError(f"several data sets are called {twice[0]}: name them, as in {twice[0]}2=FILE")
    return specs


def cut_sets(specs: Sequence[DataSpec], tokenizer: Any, options: Options, length: int) -> list[TokenSet]:
    """The windows of every data set; of the shipped tasks where none is named."""
    size = options.sequences, length
    if not specs:
        return _shipped(tokenizer, size, options)
    return [load_tokens(spec, tokenizer, *size, options.chat, options.special_tokens) for spec in specs]


def _shipped(tokenizer: Any, size: tuple[int, int], options: Options) -> list[TokenSet]:
    """The windows of the shipped tasks, of which no more is split into tokens than these take."""
    lines, wanted = 1_000, size[0] * size[1] + 100  # a line beyond the last window, as a token may reach into it
    while True:
        texts = default_texts(lines)
        ids = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}
        if lines == MOST_LINES or min(map(len, ids.values())) >= wanted:
            break
        lines = min(4 * lines, MOST_LINES)
    special = options.special_tokens
    return [
        replace(cut(name, ids[name], tokenizer, *size, special=special), text=text[:SAMPLE])
        for name, text in texts.items()
    ]


def check_same_tokens(opened: Merge, tokenizer: Any, sets: Sequence[TokenSet], trust_remote_code: bool) -> None:
    """Refuse models that would read these texts as other tokens than they are given. Raises MismatchError.

    Their vocabularies agree, or there would be no plan, but they may still split a text in other places.
    """
    first, *others = opened.recipe.refs
    files = {ref: _deciding_files(opened.checkpoints[ref].folder, str(ref)) for ref in (first, *others)}
    ours = {tokens.name: _split(tokenizer, tokens.text) for tokens in sets}
    for ref in others:
        if not files[ref] or files[ref] == files[first]:
            continue  # a model without a tokenizer is taken to have the first one's, as the plan says
        theirs = load_tokenizer(opened.checkpoints[ref].folder, str(ref), trust_remote_code)
        for tokens in sets:
            own, other = ours[tokens.name], _split(theirs, tokens.text)
            if other != own:
                at = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), 0)
                raise MismatchError(
                    f"{ref} would read {tokens.name} as other tokens than {first}: …{_listed(other, at)}… where "
                    f"{first} has …{_listed(own, at)}…. Give it the same tokenizer files, or probe a recipe that says "
                    "by `tokenizer_source` whose tokens all models are given"
                )


def _deciding_files(folder: Path, name: str) -> dict[str, bytes]:
    files = TokenizerFiles(companions(folder), name)
    merges = {"merges.txt": files.content("merges.txt")} if "merges.txt" in files else {}
    return {**dict(files.identity()), **merges}


def _split(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


def _listed(tokens: Sequence[str], start: int) -> str:
    return " ".join(map(repr, tokens[start : start + 3]))
