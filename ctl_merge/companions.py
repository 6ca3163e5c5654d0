"""The files that belong to a model beside its weights."""

from __future__ import annotations

from fnmatch import fnmatchcase

_TAKEN = (
    "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken", "*.txt", "vocab*", "merges*",
    "*.py", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# Indexes belong to the weights; the rest are traces of a training run or of an earlier merge.
_LEFT = (
    "*.index.json", "trainer_state.json", "training_args.*", "*_results.json", "adapter_config.json",
    "merge_manifest.json", "requirements*.txt", "*.safetensors", "*.bin", "README*",
)  # fmt: skip


def is_companion(path: str) -> bool:
    """Whether the file at `path` (relative, with slashes) belongs to the model beside its weights."""
    nested = "/" in path and not path.startswith("additional_chat_templates/")
    return not nested and _any(path, _TAKEN) and not _any(path, _LEFT)


def is_tokenizer(path: str) -> bool:
    """Whether the file decides which id a token has."""
    return path in ("tokenizer.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt") or _any(
        path, ("*.model", "*.tiktoken")
    )


def _any(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
