"""Vocabularies that differ: whose tokens the output has, and which rows of which models they get."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import recipe_text, write_checkpoint
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ctl_merge
from ctl_merge.chat_template import TEMPLATES
from ctl_merge.compare import compare
from ctl_merge.errors import MismatchError, RecipeError
from ctl_merge.merging import Merge, MergeResult
from ctl_merge.recipe_tokenizer import TokenizerSetting
from ctl_merge.roles import roles

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Merged = Callable[..., MergeResult]


@pytest.fixture
def merged(tmp_path: Path) -> Merged:
    """Merge the experts with half of each one's task vector; the keywords are further keys of the recipe."""

    def run(base: Path, *experts: Path, output: str = "merged", machine: Any = None, **keys: Any) -> MergeResult:
        recipe = recipe_text("task_arithmetic", [(path, {"weight": 0.5}) for path in experts], base, **keys)
        return ctl_merge.merge(ctl_merge.parse_recipe(recipe), tmp_path / output, **(machine or {}))

    return run


def state(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def configure(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**read_json(folder / "config.json"), **changes}))


