"""Statistics of models on text, and the merges that are made by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from definitions_evidence import fisher, lot, regmean
from tiny_architectures import build
from tokenizers import Tokenizer, models, pre_tokenizers

import ctl_merge
from ctl_merge.errors import DataError, RecipeError
from ctl_merge.evidence import TextEvidence, Texts
from ctl_merge.merging import Merge
from ctl_merge.probing.rows import DataSpec
from ctl_merge.reference import ModelRef
from ctl_merge.stored import open_checkpoint

WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
MODELS = {"base": 0, "a": 1, "b": 2}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 16 words, which a test can undo by hand."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="zero"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def tokens(model: str) -> torch.Tensor:
    """The text of a model as ids (sequences, length)."""
    return torch.randint(16, (5, 12), generator=torch.Generator().manual_seed(MODELS[model]))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with base, a and b of an architecture, their tokenizer, and a text for each."""
    root = tmp_path_factory.mktemp("families")

    def made(kind: str) -> Path:
        folder = root / kind
        for model, seed in MODELS.items():
            if not (folder / model).exists():
                build(kind, seed).save_pretrained(folder / model)
                write_tokenizer(folder / model)
                text = " ".join(WORDS[i] for i in tokens(model).flatten().tolist())
                (folder / f"{model}.txt").write_text(text)
        return folder

    return made


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(model: Any, ids: torch.Tensor, path: str) -> np.ndarray:
    """What a module reads, (tokens, width), by a plain hook on transformers' own model."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0].double().flatten(0, -2).numpy()


def merge_of(folder: Path, method: str, **keys: Any) -> Any:
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": m, "data": str(folder / f"{m}.txt"), "parameters": {"weight": 1.0}} for m in "ab"],
        "data": {"sequences": 5, "length": 12, **keys.pop("data", {})},
        **keys,
    }
    return ctl_merge.open_merge(ctl_merge.parse_recipe(json.dumps(recipe), relative_to=folder))


LAYERS = {
    "llama": ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "lm_head"],
    "gpt_neox": ["gpt_neox.layers.0.attention.query_key_value", "gpt_neox.layers.1.mlp.dense_4h_to_h"],
    "qwen3_moe": ["model.layers.0.self_attn.o_proj"],
}


@pytest.mark.parametrize("kind", LAYERS)
def test_regmean_is_least_squares_on_what_each_model_reads(kind: str, families: Callable[[str], Path]) -> None:
    folder = families(kind)
    merged, own = merge_of(folder, "regmean"), {m: load(folder / m) for m in "ab"}
    for path in LAYERS[kind]:
        weights = np.stack([own[m].get_submodule(path).weight.detach().double().numpy() for m in "ab"])
        inputs = [inputs_of(own[m], tokens(m), path) for m in "ab"]
        grams = np.stack([x.T @ x / len(x) for x in inputs])
        wanted = regmean(None, weights, grams, weight=(1.0, 1.0))
        stored = {"lm_head": "lm_head.weight"}.get(path, f"{path}.weight")
        found = merged.read(stored).double().numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    for name in ("norm", "embed"):
        tensor = next(n for n in merged.tensors if name in n and n in own["a"].state_dict())
        mean = sum(m.state_dict()[tensor].double() for m in own.values()) / 2
        torch.testing.assert_close(merged.read(tensor).double(), mean, rtol=0, atol=1e-7)


def test_a_linear_layer_that_is_stored_transposed(families: Callable[[str], Path]) -> None:
    folder = families("gpt2")
    merged, own = merge_of(folder, "lot", base_model="base"), {m: load(folder / m) for m in MODELS}
    path = "transformer.h.1.mlp.c_fc"
    weights = {m: own[m].get_submodule(path).weight.detach().double().numpy().T for m in MODELS}
    inputs = [inputs_of(own[m], tokens(m), path) for m in "ab"]
    grams = np.stack([x.T @ x / len(x) for x in inputs])
    wanted = lot(weights["base"], np.stack([weights[m] for m in "ab"]), grams, weight=(1.0, 1.0)).T
    found = merged.read("transformer.h.1.mlp.c_fc.weight").double().numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_inputs_may_be_those_of_the_base(families: Callable[[str], Path]) -> None:
    folder = families("llama")
    merged = merge_of(folder, "lot", base_model="base", data={"inputs": "base"})
    own, path = {m: load(folder / m) for m in MODELS}, "model.layers.1.mlp.up_proj"
    weights = {m: own[m].get_submodule(path).weight.detach().double().numpy() for m in MODELS}
    inputs = [inputs_of(own["base"], tokens(m), path) for m in "ab"]
    grams = np.stack([x.T @ x / len(x) for x in inputs])
    wanted = lot(weights["base"], np.stack([weights[m] for m in "ab"]), grams, weight=(1.0, 1.0))
    np.testing.assert_allclose(merged.read(f"{path}.weight").double().numpy(), wanted, rtol=0, atol=2e-6)


def test_inputs_may_come_out_of_the_merge_itself(families: Callable[[str], Path]) -> None:
    """RegMean++, by hand: block after block is measured in both models, merged, and put into both."""
    folder = families("llama")
    merged = merge_of(folder, "regmean", data={"inputs": "merged"})
    own = {m: load(folder / m) for m in "ab"}
    models = list(own.values())
    for name, parameter in models[0].named_parameters():
        if "layers" not in name and "lm_head" not in name:
            other = models[1].get_parameter(name)
            parameter.data = other.data = (parameter.data.double() + other.data.double()).div(2).float()
    for layer in (*(f"model.layers.{i}" for i in range(3)), ""):
        paths = [p for p, m in models[0].named_modules() if isinstance(m, torch.nn.Linear) and p.startswith(layer)]
        done: dict[str, torch.Tensor] = {}
        for path in [p for p in paths if layer or p == "lm_head"]:
            weights = np.stack([m.get_submodule(path).weight.detach().double().numpy() for m in models])
            inputs = [inputs_of(own[m], tokens(m), path) for m in "ab"]
            grams = np.stack([x.T @ x / len(x) for x in inputs])
            done[path] = torch.from_numpy(regmean(None, weights, grams, weight=(1.0, 1.0))).float()
            found = merged.read(f"{path}.weight")
            torch.testing.assert_close(found, done[path], rtol=0, atol=1e-5)
        for name, parameter in models[0].named_parameters():
            if layer and name.startswith(layer):
                other = models[1].get_parameter(name)
                value = done.get(name.removesuffix(".weight"), (parameter.data + other.data) / 2)
                parameter.data = other.data = value
    late = merge_of(folder, "regmean", data={"inputs": "merged"})
    assert torch.equal(late.read("lm_head.weight"), merged.read("lm_head.weight"))  # in whatever order it is read


def test_fisher_averages_by_squared_gradients_of_each_sequence(families: Callable[[str], Path]) -> None:
    folder = families("llama")
    merged, own = merge_of(folder, "fisher"), {m: load(folder / m) for m in "ab"}
    name = "model.layers.1.mlp.gate_proj.weight"
    importance = []
    for m in "ab":
        total = torch.zeros_like(own[m].get_parameter(name), dtype=torch.float64)
        for sequence in tokens(m):
            own[m].zero_grad()
            logits = own[m](input_ids=sequence[None]).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum").backward()
            total += own[m].get_parameter(name).grad.double() ** 2
        importance.append((total / 5).numpy())
    weights = np.stack([own[m].get_parameter(name).detach().double().numpy() for m in "ab"])
    wanted = fisher(None, weights, np.stack(importance), weight=(1.0, 1.0))
    np.testing.assert_allclose(merged.read(name).double().numpy(), wanted, rtol=0, atol=1e-5)


def test_layers_that_read_the_same_share_one_gram(families: Callable[[str], Path]) -> None:
    folder = families("llama")
    ref = ModelRef("a", folder=folder / "a")
    texts = Texts({ref: (DataSpec("own", str(folder / "a.txt")),)}, 5, 12)
    evidence = TextEvidence("gram", texts, {ref: open_checkpoint(ref)})
    layer = "model.layers.0.self_attn"
    one, other = (evidence.of(ref, f"{layer}.{part}_proj.weight") for part in "qk")
    assert one is not None and other is not None and torch.equal(one, other)
    taken = evidence._taken[ref]
    assert len(taken._sums) == 4 * 3 + 1  # qkv, o, gate and up, down in each of 3 layers; the head
    assert evidence.of(ref, "model.norm.weight") is None


def test_a_written_merge_has_the_same_weights_and_says_what_it_measured(
    families: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = families("llama")
    text = f"""
        merge_method: regmean
        models:
          - {{model: a, data: {folder / "a.txt"}}}
          - {{model: b}}
        data: {{texts: b.txt, sequences: 5, length: 12}}
        """
    recipe = ctl_merge.parse_recipe(dedent(text), relative_to=folder)
    result = ctl_merge.merge(recipe, tmp_path / "out")
    found = load(result.folder)
    merged = merge_of(folder, "regmean")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(found.state_dict()[name], merged.read(name))
    assert any("5 windows of 12 tokens" in line for line in result.manifest["decisions"])


@pytest.mark.parametrize(
    ("keys", "error", "said"),
    [
        ("models: [{model: a}, {model: b}]", RecipeError, "regmean measures each model on text: give a `data: FILE"),
        ("models: [{model: a, data: nowhere.txt}]", DataError, "there is no file 'nowhere.txt'"),
        ("models: [{model: a}]\ndata: {texts: a.txt, length: 1}", RecipeError, "`data.length`"),
        ("models: [{model: a}]\ndata: {texts: a.txt, lenght: 8}", RecipeError, "unknown key 'lenght'"),
        (
            "models: [{model: a}]\ndata: {texts: a.txt, inputs: base}",
            RecipeError,
            "`inputs: base` needs a `base_model`",
        ),
        ("models: [{model: a}]\ndata: {texts: a.txt, length: 999}", DataError, "too few for one window"),
    ],
)
def test_what_is_missing_is_told(keys: str, error: type, said: str, families: Callable[[str], Path]) -> None:
    with pytest.raises(error, match=said):
        opened = Merge(ctl_merge.parse_recipe(f"merge_method: regmean\n{keys}\n", relative_to=families("llama")))
        opened.merged.read("model.norm.weight")


def test_other_methods_take_no_text(families: Callable[[str], Path]) -> None:
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\ndata: {texts: a.txt}\n"
    with pytest.raises(RecipeError, match="linear measures nothing on text: remove `data`"):
        ctl_merge.parse_recipe(text, relative_to=families("llama"))
