"""The windows of tokens that a probe runs over."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.errors import DataError
from ctl_merge.merging import Merge
from ctl_merge.model import open_model
from ctl_merge.probing.data import TokenSet, cut, load_tokenizer, load_tokens
from ctl_merge.probing.forward import check_text, context
from ctl_merge.probing.placement import LENGTH, Options
from ctl_merge.probing.rows import DataSpec
from ctl_merge.probing.texts import default_texts
from ctl_merge.stacks import find_blocks


def token_sets(opened: Merge, base: Checkpoint, data: str | Sequence[str], options: Options) -> list[TokenSet]:
    """Windows that the base's model reads. Raises DataError and ProbeError, before any weight is read."""
    length = window_length(base, options)
    tokenizer = merge_tokenizer(opened, options.trust_remote_code)
    return cut_sets(parse_specs(data), tokenizer, options, length)


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


def parse_specs(data: str | Sequence[str]) -> list[DataSpec]:
    """Data sets by their specs, each with a name of its own. Raises DataError."""
    specs = [DataSpec.parse(text) for text in ([data] if isinstance(data, str) else data)]
    twice = sorted({spec.name for spec in specs if [other.name for other in specs].count(spec.name) > 1})
    if twice:
        raise DataError(f"several data sets are called {twice[0]}: name them, as in {twice[0]}2=FILE")
    return specs


def cut_sets(specs: Sequence[DataSpec], tokenizer: Any, options: Options, length: int) -> list[TokenSet]:
    """The windows of every data set; of the shipped tasks where none is named."""
    size = options.sequences, length
    if not specs:
        ids = {name: tokenizer(t, add_special_tokens=False)["input_ids"] for name, t in default_texts().items()}
        return [cut(name, own, tokenizer, *size, special=options.special_tokens) for name, own in ids.items()]
    return [load_tokens(spec, tokenizer, *size, options.chat, options.special_tokens) for spec in specs]
