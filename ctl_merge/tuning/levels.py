"""How finely coefficients are set: which tensors share one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ctl_merge.layers import block_index

# From coarse to fine, a parent's coefficients: one; one for each block; part of a block (attention, MLP, norm); tensor.
LEVELS = ("model", "block", "part", "tensor")


def groups(names: Iterable[str], config: Mapping[str, Any], level: str) -> dict[str, str]:
    """The group of each tensor, as the beginning of names that a recipe's filter has; all "" for the whole model.

    What lies outside of the blocks, such as embeddings, is a group for each tensor.
    """
    listed = list(names)
    if level == "model":
        return dict.fromkeys(listed, "")
    blocks = {} if level == "tensor" else block_index(listed, config)
    return {name: _beginning(name, blocks.get(name), level) for name in listed}


def _beginning(name: str, block: tuple[str, int, int] | None, level: str) -> str:
    if block is None:
        return name
    stack = block[0]
    rest = name[len(stack) + 1 :].split(".")
    kept = rest[: 1 if level == "block" else 2]
    return f"{stack}.{'.'.join(kept)}." if len(kept) < len(rest) else name
