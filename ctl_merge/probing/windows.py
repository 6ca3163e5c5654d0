"""The windows of tokens that a probe runs over."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

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
    model, _ = open_model(base, trust_remote_code=options.trust_remote_code)
    find_blocks(model, options.blocks)
    length = options.length or min(LENGTH, context(model) or LENGTH)
    check_text(model, length)
    with tempfile.TemporaryDirectory() as folder:
        opened.write_companions(Path(folder))
        tokenizer = load_tokenizer(Path(folder), str(opened.recipe.refs[0]), options.trust_remote_code)
    specs = [DataSpec.parse(text) for text in ([data] if isinstance(data, str) else data)]
    twice = sorted({spec.name for spec in specs if [other.name for other in specs].count(spec.name) > 1})
    if twice:
        raise DataError(f"several data sets are called {twice[0]}: name them, as in {twice[0]}2=FILE")
    size = options.sequences, length
    if not specs:
        ids = {name: tokenizer(t, add_special_tokens=False)["input_ids"] for name, t in default_texts().items()}
        return [cut(name, own, tokenizer, *size, special=options.special_tokens) for name, own in ids.items()]
    return [load_tokens(spec, tokenizer, *size, options.chat, options.special_tokens) for spec in specs]
