"""config.json of the output: the base's, patched where needed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_DTYPE_KEYS = ("dtype", "torch_dtype")
_TOKEN_IDS = re.compile(r"\w+_token_(id|ids|index)|(begin_)?suppress_tokens|bad_words_ids|forced_decoder_ids")
ABSENT = object()  # as a change: the config goes without the key


def patch_config(
    original: bytes, dtype: str | None, untie: bool, fit: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> bytes:
    """The config with the weights' dtype (torch name; None: as it is) and, if `untie`, embeddings not tied.

    `fit` is what else changes, before that.

    Only keys that the config uses already are set, in its sub-configs too, so that old and new readers find what they
    look for. Unchanged bytes where nothing changes.
    """
    config = json.loads(original)
    patched = _patched(fit(config), dtype, untie)
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


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """The number of rows that a config states for its vocabulary."""
    text = config.get("text_config")
    size = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, Mapping) else None)
    return size if isinstance(size, int) else None


def fit_vocabulary(
    config: Mapping[str, Any], size: tuple[int, int] | None, special: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A config with another vocabulary, in its sub-configs too.

    `size`: vocab_size before and after; None: as it is. `special`: the config that gives the ids of special tokens,
    of which those that it does not state are left to the model type's defaults; None: as they are.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            theirs = special.get(key) if special else None
            result[key] = fit_vocabulary(value, size, theirs if isinstance(theirs, Mapping) else None)
        elif key == "vocab_size" and size and value == size[0]:
            result[key] = size[1]
        elif special is None or not _TOKEN_IDS.fullmatch(key) or key in special:
            result[key] = special[key] if special is not None and _TOKEN_IDS.fullmatch(key) else value
    stated = {key: value for key, value in (special or {}).items() if _TOKEN_IDS.fullmatch(key)}
    return {**result, **stated}
