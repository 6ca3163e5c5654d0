"""Slices and modules: stacks of layers, and parts of models that are merged in their own way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import transformers
from checkpoints import write_checkpoint
from tiny_architectures import build

import ctl_merge
from ctl_merge.errors import MismatchError, RecipeError
from ctl_merge.merging import Merge
from ctl_merge.probing.data import STRATA

LAYERS = {"llama": 3, "qwen3": 3, "gemma2": 3, "gpt2": 3, "gpt_neox": 3, "mixtral": 3, "qwen3_next": 4}
IDS = torch.arange(3, 43).view(1, -1)


def parse(text: str, folder: Path) -> ctl_merge.Recipe:
    return ctl_merge.parse_recipe(dedent(text), relative_to=folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with two models, `a` and `b`, of an architecture."""
    folder = tmp_path_factory.mktemp("models")

    def made(kind: str) -> Path:
        for number, name in enumerate("ab"):
            if not (folder / kind / name).exists():
                torch.manual_seed(number)
                build(kind).save_pretrained(folder / kind / name)
        return folder / kind

    return made


def run(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", LAYERS)
def test_a_stack_is_what_its_layers_make_by_hand(kind: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    """a's first two layers, then all but the first of b: as the models' own forward runs those modules."""
    folder, depth = models(kind), LAYERS[kind]
    recipe = parse(
        f"""
        merge_method: passthrough
        slices:
          - sources: [{{model: a, layer_range: [0, 2]}}]
          - sources: [{{model: b, layer_range: [1, {depth}]}}]
        """,
        folder,
    )
    found, told = transformers.AutoModelForCausalLM.from_pretrained(
        ctl_merge.merge(recipe, tmp_path / "out").folder, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert torch.equal(run(found), run(by_hand(folder, [("a", 0), ("a", 1), *(("b", i) for i in range(1, depth))])))


def by_hand(folder: Path, layers: list[tuple[str, int]]) -> Any:
    """Modules of loaded models put into one list; embeddings are a's, what follows the layers is b's."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    own = {name: load(folder / name) for name in "ab"}
    inner = {name: getattr(m, m.base_model_prefix) for name, m in own.items()}
    holder = "h" if hasattr(inner["a"], "h") else "layers"
    blocks = [getattr(inner[name], holder)[i] for name, i in layers]
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    result = own["a"]
    kinds = getattr(result.config, "layer_types", None)
    if kinds:
        result.config.layer_types = [kinds[i] for _, i in layers]
    setattr(inner["a"], holder, torch.nn.ModuleList(blocks))
    result.config.num_hidden_layers = len(blocks)
    for name in ("norm", "ln_f", "final_layer_norm"):
        if hasattr(inner["a"], name):
            setattr(inner["a"], name, getattr(inner["b"], name))
    if not result.config.tie_word_embeddings:
        result.lm_head = own["b"].lm_head
    return result
