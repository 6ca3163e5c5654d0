"""Tiny checkpoints in the Hugging Face layout, and recipes over them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

Model = tuple[Path, Mapping[str, Any]]  # a model's folder and its own parameters


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, shards: int = 1
) -> Path:
    """Write the tensors and a config.json (`model_type` llama unless `config` says otherwise) into `folder`.

    One shard is `model.safetensors`; more are numbered files, the tensors dealt out in turn, and an index. Returns
    the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}, indent=2))
    if shards == 1:
        _save(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == shard}
        _save(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # safetensors refuses views and shared memory, which tests hand over freely.
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def recipe_text(
    method: str, models: Sequence[Model], base: Path | None = None, parameters: Mapping[str, Any] | None = None,
    **keys: Any,
) -> str:  # fmt: skip
    """A recipe as YAML: models with their own parameters, shared `parameters`, other top-level `keys`."""
    listed = [{"model": str(folder), **({"parameters": dict(own)} if own else {})} for folder, own in models]
    recipe: dict[str, Any] = {"merge_method": method, "models": listed, **keys}
    if base is not None:
        recipe["base_model"] = str(base)
    if parameters:
        recipe["parameters"] = dict(parameters)
    return yaml.safe_dump(recipe, sort_keys=False)
