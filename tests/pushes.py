"""Merges that tests push, and what the loopback Hub has of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import recipe_text, write_checkpoint
from hub_server import HubServer

from ctl_merge.destination import Destination

REPO = "org/merged"
SHARDS = 3
SHARD_SIZE = "17KB"  # holds one tensor


def write_model(folder: Path, seed: int) -> Path:
    """A local model with one tensor of 16 kB for each of the shards."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"model.layers.{i}.mlp.w": torch.randn(64, 64, generator=generator) for i in range(SHARDS)}
    return write_checkpoint(folder, tensors)


def write_recipe(place: Path, weight: float = 1.0) -> Path:
    """The weighted average of two such models, `a` and `b`."""
    models = [write_model(place / name, seed) for seed, name in enumerate("ab")]
    path = place / "recipe.yaml"
    path.write_text(recipe_text("linear", [(model, {"weight": weight + i}) for i, model in enumerate(models)]))
    return path


def to(repo_id: str = REPO, **options: Any) -> Destination:
    return replace(Destination(repo_id), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def remote(hub: HubServer, revision: str = "main", repo_id: str = REPO) -> dict[str, bytes]:
    """What the branch holds, but for the file that every repository begins with."""
    files = hub.repos[repo_id].head(revision)
    return {path: bytes(file.data) for path, file in files.items() if path != ".gitattributes"}


def commits(hub: HubServer, revision: str = "main", repo_id: str = REPO) -> int:
    """Commits on a branch after the repository's first."""
    return sum(ref == revision for ref, _, _ in hub.repos[repo_id].log) - (revision == "main")
