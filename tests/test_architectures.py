"""Laws of every architecture: a merge loads in transformers as its inputs do, and its blocks are found by name."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import recipe_text
from safetensors.torch import load_file
from tiny_architectures import ARCHITECTURES, build, finetune, load_whole
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import ctl_merge
from ctl_merge.architecture import ModuleMap
from ctl_merge.layers import block_index, layer_places

WEIGHTS = "model.safetensors"
WEIGHT = (0.6, 0.3)  # of the two experts
DENSITY = 0.3
State = dict[str, Tensor]

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@dataclass(frozen=True)
class Family:
    """A saved model and two finetunes of it; `blocks` has the depth of each list of layers of the loaded model."""

    base: Path
    experts: tuple[Path, Path]
    blocks: Mapping[str, int]
    parameters: frozenset[str]

    @property
    def config(self) -> dict:
        return json.loads((self.base / "config.json").read_text())

    def states(self) -> tuple[State, State, State]:
        base, one, two = ({k: v.double() for k, v in state(p).items()} for p in (self.base, *self.experts))
        return base, one, two


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    folder = tmp_path_factory.mktemp("architectures")

    @cache
    def make(name: str) -> Family:
        base, *experts = (folder / name / model for model in ("base", "one", "two"))
        model = build(name)
        model.save_pretrained(base)
        for seed, path in enumerate(experts, 1):
            finetune(model, seed)
            model.save_pretrained(path)
        return Family(base, tuple(experts), transformer_blocks(model), frozenset(model.state_dict()))

    return make


def state(folder: Path) -> State:
    return load_file(folder / WEIGHTS)


def transformer_blocks(model: nn.Module) -> dict[str, int]:
    """Outermost lists of nothing but layers."""
    lists = {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and all(isinstance(m, GradientCheckpointingLayer) for m in module)
    }
    return {path: depth for path, depth in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}


def task_arithmetic(base: Tensor, one: Tensor, two: Tensor) -> Tensor:
    return base + WEIGHT[0] * (one - base) + WEIGHT[1] * (two - base)


def linear(base: Tensor, one: Tensor, two: Tensor) -> Tensor:
    return (WEIGHT[0] * one + WEIGHT[1] * two) / sum(WEIGHT)


def ties(base: Tensor, one: Tensor, two: Tensor) -> Tensor:
    trimmed = []
    for delta in (one - base, two - base):
        kept = max(1, int(DENSITY * delta.numel()))
        cut = delta.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(delta.abs() >= cut, delta, 0.0))
    votes = [weight * delta for weight, delta in zip(WEIGHT, trimmed, strict=True)]
    positive = sum(votes) >= 0
    agree = [torch.where(positive, vote > 0, vote < 0).double() for vote in votes]
    total = sum(vote * a for vote, a in zip(votes, agree, strict=True))
    share = sum(weight * a for weight, a in zip(WEIGHT, agree, strict=True))
    return base + torch.where(share > 0, total / share, 0.0)


DEFINITIONS = {"task_arithmetic": task_arithmetic, "linear": linear, "ties": ties}


def merge(method: str, family: Family, output: Path) -> None:
    own = {"density": DENSITY} if method == "ties" else {}
    models = [(path, {"weight": w, **own}) for path, w in zip(family.experts, WEIGHT, strict=True)]
    base = None if method == "linear" else family.base
    ctl_merge.merge(ctl_merge.parse_recipe(recipe_text(method, models, base)), output)


def assert_is_the_definition(method: str, family: Family, output: Path) -> None:
    """Equal to the definition in float64, but for one rounding to float32."""
    base, one, two = family.states()
    merged = state(output)
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        expected = DEFINITIONS[method](base[name], one[name], two[name])
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(
            tensor.double(), expected, rtol=2**-23, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_architecture
def test_a_merge_loads_whole_and_is_its_definition(name: str, family: Callable[[str], Family], tmp_path: Path) -> None:
    models, output = family(name), tmp_path / "merged"
    merge("task_arithmetic", models, output)
    assert_is_the_definition("task_arithmetic", models, output)
    load_whole(name, output)
    for file in ("config.json", "generation_config.json"):
        if (models.base / file).exists():
            assert (output / file).read_bytes() == (models.base / file).read_bytes()


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "jamba", "t5", "gemma3", "swin"])
def test_other_methods_are_their_definitions_on_any_architecture(
    method: str, name: str, family: Callable[[str], Family], tmp_path: Path
) -> None:
    models, output = family(name), tmp_path / "merged"
    merge(method, models, output)
    assert_is_the_definition(method, models, output)
    load_whole(name, output)


@every_architecture
def test_blocks_found_by_name_are_those_of_the_model(name: str, family: Callable[[str], Family]) -> None:
    models = family(name)
    names = list(state(models.base))
    found = block_index(names, models.config)
    stacks: dict[str, str] = {}  # the file's name of a list -> the model's
    for tensor, parameter in ModuleMap(models.config).parameters(names).items():
        lists = [path for path in models.blocks if parameter.startswith(f"{path}.")]
        assert (tensor in found) == bool(lists)
        if lists:
            stack, index, depth = found[tensor]
            assert stacks.setdefault(stack, lists[0]) == lists[0]
            assert index == int(parameter.removeprefix(f"{lists[0]}.").partition(".")[0])
            assert depth == models.blocks[lists[0]]
    assert sorted(stacks.values()) == sorted(models.blocks)


@every_architecture
def test_every_stored_name_leads_to_the_models_parameters(name: str, family: Callable[[str], Family]) -> None:
    """One to one, but for experts that the file stores apart and the model stacked."""
    models = family(name)
    modules = ModuleMap(models.config)
    assert modules.model is not None
    found = modules.parameters(state(models.base))
    apart = [tensor for tensor, parameter in found.items() if parameter not in models.parameters]
    assert all(".experts." in tensor for tensor in apart)
    assert len(set(found.values())) == len(found)


def test_places_run_from_the_first_to_the_last_block_of_each_stack(family: Callable[[str], Family]) -> None:
    models = family("t5")
    places = layer_places(state(models.base), models.config)
    assert [places[f"encoder.block.{i}.layer.0.layer_norm.weight"] for i in range(3)] == [0, 0.5, 1]
    assert [places[f"decoder.block.{i}.layer.0.layer_norm.weight"] for i in range(2)] == [0, 1]
    assert "shared.weight" not in places and "encoder.final_layer_norm.weight" not in places


def test_a_single_block_is_the_last_one() -> None:
    assert layer_places(["model.layers.0.mlp.weight"], {"num_hidden_layers": 1}) == {"model.layers.0.mlp.weight": 1}


def test_extra_prediction_layers_count_as_the_last_block() -> None:
    """DeepSeek-V3 stores its multi-token prediction layer as one layer more than its config states."""
    names = [f"model.layers.{i}.mlp.weight" for i in range(5)]
    found = block_index(names, {"num_hidden_layers": 4})
    assert [found[name][1:] for name in names] == [(0, 4), (1, 4), (2, 4), (3, 4), (3, 4)]


def test_numbered_lists_of_other_lengths_are_no_blocks() -> None:
    names = ["classifier.0.weight", "classifier.2.weight", *(f"bert.encoder.layer.{i}.weight" for i in range(6))]
    assert block_index(names, {"num_hidden_layers": 6}).keys() == set(names[2:])


def test_a_text_model_whose_depth_is_its_types_default_has_blocks() -> None:
    """The configs of vision-language models leave out what their text model has by default, its depth too."""
    parts = ["input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    text = [f"language_model.model.layers.{i}.{part}.weight" for i in range(32) for part in parts]
    vision = [f"vision_tower.vision_model.encoder.layers.{i}.layer_norm1.weight" for i in range(24)]
    head = [f"bbox_predictor.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    config = {"text_config": {"model_type": "llama"}, "vision_config": {"num_hidden_layers": 24}}
    found = block_index([*text, *vision, *head], config)
    assert found.keys() == {*text, *vision}
    assert found["language_model.model.layers.31.mlp.up_proj.weight"] == ("language_model.model.layers", 31, 32)
