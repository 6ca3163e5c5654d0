"""The files that belong to a model beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

_TAKEN = (
    "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken", "*.txt", "vocab*", "merges*",
    "*.py", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# Indexes belong to the weights; the rest are traces of a training run or of an earlier merge.
_LEFT = (
    "*.index.json", "trainer_state.json", "training_args.*", "*_results.json", "adapter_config.json",
    "merge_manifest.json", "requirements*.txt", "*.safetensors", "*.bin", "README*",
)  # fmt: skip


_TOKENIZER = (
    "tokenizer*", "tokenization_*.py", "added_tokens.json", "special_tokens_map.json", "vocab*", "merges*", "*.model",
    "*.tiktoken", "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip


def is_companion(path: str) -> bool:
    """Whether the file at `path` (relative, with slashes) belongs to the model beside its weights."""
    nested = "/" in path and not path.startswith("additional_chat_templates/")
    return not nested and _any(path, _TAKEN) and not _any(path, _LEFT)


def is_tokenizer_file(path: str) -> bool:
    """Whether the file says how text becomes ids: the tokens, how text is split, special tokens, chat templates."""
    return is_companion(path) and _any(path, _TOKENIZER)


def companions(folder: Path, changes: Mapping[str, bytes | None] = MappingProxyType({})) -> dict[str, Path | bytes]:
    """The files beside a model's weights by path: those of its folder, and what is changed (None: left out)."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in paths}
    kept = {path: content for path, content in found.items() if is_companion(path) and path not in changes}
    return kept | {path: content for path, content in changes.items() if content is not None}


def _any(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
