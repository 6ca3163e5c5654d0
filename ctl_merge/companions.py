"""The files that belong to a model beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

from ctl_merge.errors import CheckpointError

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
    """The files beside a model's weights by path: those of its folder, and what is changed (None: left out).

    Raises CheckpointError where one is a link that leads elsewhere.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {path.relative_to(folder).as_posix(): path for path in paths}
    for path in filter(is_companion, found):
        if _leads_out(found[path], folder):
            raise CheckpointError(f"{found[path]} is a link that leads out of the model's folder: put the file there")
    kept: dict[str, Path | bytes] = {p: path for p, path in found.items() if is_companion(p) and p not in changes}
    return kept | {path: content for path, content in changes.items() if content is not None}


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether a link leads to what is neither of the folder nor of a Hub cache, and would be copied unasked."""
    target = path.resolve()
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return not cached and not target.is_relative_to(folder.resolve())


def _any(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
