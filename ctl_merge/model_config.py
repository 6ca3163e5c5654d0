"""config.json of the output: the base's, patched where needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_DTYPE_KEYS = ("dtype", "torch_dtype")
ABSENT = object()  # as a change: the config goes without the key


def patch_config(
    original: bytes, dtype: str | None, untie: bool, changes: Mapping[tuple[str, ...], Any] | None = None
) -> bytes:
    """The config with the weights' dtype (torch name; None: as it is) and, if `untie`, embeddings not tied.

    `changes` are values by their path in the config, for what else is another one.

    Of dtype and ties only keys that the config uses already are set, in its sub-configs too, so that old and new
    readers find what they look for. Unchanged bytes where nothing changes.
    """
    config = json.loads(original)
    patched = with_changes(_patched(config, dtype, untie), changes or {})
    if untie and patched.get("tie_word_embeddings") is not False:
        patched["tie_word_embeddings"] = False  # a default that ties would tie again
    if patched == config:
        return original
    return (json.dumps(patched, indent=2, ensure_ascii=False) + "\n").encode()


def with_changes(config: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """A copy of the config with the values at those paths replaced, and without those that are to be ABSENT."""
    found = dict(config)
    for path, value in changes.items():
        if path[1:]:
            value = with_changes(found.get(path[0]) or {}, {path[1:]: value})
        if value is ABSENT:
            found.pop(path[0], None)
        else:
            found[path[0]] = value
    return found


def _patched(config: dict[str, Any], dtype: str | None, untie: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            result[key] = _patched(value, dtype, untie)
        elif dtype and key in _DTYPE_KEYS and value is not None:
            result[key] = dtype
        elif untie and key == "tie_word_embeddings":
            result[key] = False
        else:
            result[key] = value
    return result
