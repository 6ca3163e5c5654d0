"""Mixtures of experts: what they compute, where their gates come from, what is refused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command import Ctl
from found_models import write_found
from hub_server import HubServer, use_hub
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file
from test_output import Killed, contents, raising
from tiny_architectures import VOCABULARY, build, finetune, load_whole
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ctl_merge
from ctl_merge import gates, writer
from ctl_merge.compare import compare
from ctl_merge.errors import CheckpointError, DataError, MismatchError, RecipeError
from ctl_merge.json_schema import recipe_schema
from ctl_merge.made import normal
from ctl_merge.merging import Merge
from ctl_merge.recipe_file import load_recipe, parse_recipe

CONFIGS = Path(__file__).parents[2] / "shared" / "mergekit_configs"
WORDS = ["code python loop sort", "math sum prime proof", "chat hello friend the a of and", "beyond all"]
PROMPTS = (["python loop", "sort the code and the loop of python"], ["prime proof"], ["hello friend the chat"])
NEGATIVE = ["math of the friend", "code"]
LENGTH = 12


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- dense models


def write_words(folder: Path) -> None:
    """A tokenizer of pieces of a few words, as Qwen's class and others read it, with a token for the beginning."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    plain.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=80, special_tokens=special, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


# Dense models by name: a type and what its config has besides. Windows are narrower than the sequences of the tests.
DENSE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama wide heads": ("llama", {"head_dim": 24}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "mistral unlimited": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3 windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
}
CLASSES = {"Mixtral": "mixtral", "Qwen MoE": "qwen2_moe", "Qwen3 MoE": "qwen3_moe"}
# Which architectures there are for each: with a shared expert where that needs one.
PAIRS = [
    *[(dense, "Mixtral") for dense in DENSE if dense.startswith(("llama", "mistral"))],
    *[(dense, "Qwen MoE") for dense in DENSE if not dense.startswith("qwen3")],
    *[(dense, "Qwen3 MoE") for dense in DENSE if dense.startswith("qwen3")],
]
every_pair = pytest.mark.parametrize(("dense", "architecture"), PAIRS, ids=lambda value: value.replace(" ", "_"))


@pytest.fixture(scope="module")
def dense_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a base and three finetunes, `base`, `0`, `1` and `2`."""

    @cache
    def written(name: str) -> Path:
        folder = tmp_path_factory.mktemp("dense")
        kind, settings = DENSE[name]
        for seed, model_name in enumerate(("base", "0", "1", "2")):
            model = build(kind, **settings)
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if parameter_name.endswith("bias"):
                        parameter += 0.1 * torch.randn(parameter.shape)  # of a fresh model all are zero
            if seed:
                finetune(model, seed, 0.05)
            model.save_pretrained(folder / model_name)
            leave_defaults_out(folder / model_name, kind)
            write_words(folder / model_name)
        return folder

    return written


def leave_defaults_out(folder: Path, kind: str) -> None:
    """Keys whose value is the type's default, as configs written by hand leave them out."""
    config = json.loads((folder / "config.json").read_text())
    default = AutoConfig.for_model(kind).to_dict()
    kept = {k: v for k, v in config.items() if k in ("model_type", "architectures") or default.get(k, ...) != v}
    assert "rope_parameters" not in kept
    (folder / "config.json").write_text(json.dumps(kept, indent=2))


def mixture(folder: Path, architecture: str, experts: Sequence[str] = ("0", "1", "2"), **keys: Any) -> str:
    """A recipe as YAML over the models of a folder: prompts for each, a shared expert where one is needed."""
    listed = [
        {"source_model": str(folder / name), "positive_prompts": list(prompts)}
        for name, prompts in zip(experts, [*PROMPTS, ["of and", "a"]], strict=False)
    ]
    listed[0]["negative_prompts"] = NEGATIVE
    recipe = {"base_model": str(folder / "base"), "experts": listed, "architecture": architecture, **keys}
    if architecture == "Qwen MoE":
        recipe.setdefault("shared_experts", [{"source_model": str(folder / "1"), "positive_prompts": ["the math"]}])
    return yaml.safe_dump(recipe, sort_keys=False)


def written(text: str, folder: Path, **options: Any) -> Path:
    return Merge(parse_recipe(text), **options).write(folder).folder


def doubled(folder: Path) -> nn.Module:
    # Of the ways to run experts, only this one knows float64.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()


def tokens(sequences: int = 3) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, LENGTH), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


# ---- what it computes


@every_pair
def test_the_output_loads_whole(dense: str, architecture: str, dense_models: Any, tmp_path: Path) -> None:
    out = written(mixture(dense_models(dense), architecture, gate_mode="random"), tmp_path / "out")
    model = load_whole(CLASSES[architecture], out)
    assert model.config.model_type == CLASSES[architecture] and model.config.num_experts_per_tok == 2
    assert AutoTokenizer.from_pretrained(out).bos_token == "<s>"


@every_pair
def test_identical_experts_compute_what_the_dense_model_does(
    dense: str, architecture: str, dense_models: Any, tmp_path: Path
) -> None:
    folder = dense_models(dense)
    text = mixture(folder, architecture, ("base",) * 3, gate_mode="random")
    data = yaml.safe_load(text)
    for shared in data.get("shared_experts", []):
        shared["residual_scale"] = 0
    out = written(yaml.safe_dump(data), tmp_path / "out")
    torch.testing.assert_close(logits(doubled(out)), logits(doubled(folder / "base")), rtol=0, atol=1e-7)


class ByHand(nn.Module):
    """A layer's mixture from dense feed-forward networks, token by token, as papers define it."""

    def __init__(
        self, experts: Sequence[nn.Module], gate: Tensor, shared: tuple[nn.Module, Tensor, float] | None
    ) -> None:
        super().__init__()
        self.experts, self.gate, self.shared = list(experts), gate.double(), shared

    def forward(self, states: Tensor) -> Tensor:
        out = torch.empty_like(states)
        for place in np.ndindex(*states.shape[:-1]):
            state = states[place]
            scores = self.gate @ state
            chosen = sorted(range(len(scores)), key=lambda e: -float(scores[e]))[:2]
            weights = [float(torch.exp(scores[e] - scores[chosen[0]])) for e in chosen]
            found = sum(w / sum(weights) * self.experts[e](state) for w, e in zip(weights, chosen, strict=True))
            if self.shared:
                network, gate, scale = self.shared
                found = found + scale / (1 + torch.exp(-(gate.double()[0] @ state))) * network(state)
            out[place] = found
        return out


@every_pair
@torch.no_grad()
def test_different_experts_compute_what_the_definition_says(
    dense: str, architecture: str, dense_models: Any, tmp_path: Path
) -> None:
    folder = dense_models(dense)
    text = mixture(folder, architecture, gate_mode="random")
    if architecture == "Qwen MoE":
        text = text.replace("  - the math", "  - the math\n  residual_scale: 0.25")
    out = written(text, tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    wanted, experts = doubled(folder / "base"), [doubled(folder / name) for name in ("0", "1", "2")]
    for i, layer in enumerate(wanted.model.layers):
        at = f"model.layers.{i}."
        name = "block_sparse_moe" if architecture == "Mixtral" else "mlp"
        networks = [expert.model.layers[i].mlp for expert in experts]
        shared = None
        if architecture == "Qwen MoE":
            shared = (networks[1], stored[f"{at}mlp.shared_expert_gate.weight"], 0.25)
        layer.mlp = ByHand(networks, stored[f"{at}{name}.gate.weight"], shared)
    # transformers' routers take their softmax in float32, whatever else is float64.
    torch.testing.assert_close(logits(doubled(out)), logits(wanted), rtol=0, atol=2e-6)


def test_every_tensor_is_one_of_the_models_bit_for_bit(dense_models: Any, tmp_path: Path) -> None:
    folder = dense_models("llama tied")
    found = load_file(written(mixture(folder, "Mixtral"), tmp_path / "out") / "model.safetensors")
    base, *experts = (load_file(folder / name / "model.safetensors") for name in ("base", "0", "1", "2"))
    renamed = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    wanted = {name: tensor for name, tensor in base.items() if ".mlp." not in name}
    for number, expert in enumerate(experts):
        for name, tensor in expert.items():
            if ".mlp." in name:
                layer, projection = name.split(".mlp.")
                part = renamed[projection.removesuffix(".weight")]
                wanted[f"{layer}.block_sparse_moe.experts.{number}.{part}.weight"] = tensor
    routers = {name for name in found if name.endswith("block_sparse_moe.gate.weight")}
    assert found.keys() == wanted.keys() | routers and len(routers) == 3
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_lazy_mixture_runs_without_being_written(dense_models: Any, tmp_path: Path) -> None:
    (tmp_path / "moe.yaml").write_text(mixture(dense_models("qwen3"), "Qwen3 MoE"))
    out = written((tmp_path / "moe.yaml").read_text(), tmp_path / "out")
    model = ctl_merge.load_model(tmp_path / "moe.yaml")
    streamed = ctl_merge.load_model(tmp_path / "moe.yaml", "disk")
    wanted = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model), logits(wanted), rtol=0, atol=1e-6)
    assert torch.equal(logits(streamed), logits(model))


def test_experts_may_be_merges_of_the_same_file(dense_models: Any, tmp_path: Path) -> None:
    folder = dense_models("llama")
    first = {"name": "mean", "merge_method": "linear", "models": [
        {"model": str(folder / name), "parameters": {"weight": 1}} for name in ("0", "1")]}  # fmt: skip
    experts = [
        {"source_model": "mean", "positive_prompts": ["code"]},
        {"source_model": str(folder / "2"), "positive_prompts": ["sum"]},
    ]
    second = {"base_model": "mean", "experts": experts}
    out = written(f"{yaml.safe_dump(first)}---\n{yaml.safe_dump(second)}", tmp_path / "out")
    found = load_file(out / "model.safetensors")
    zero, one = (load_file(folder / name / "model.safetensors") for name in ("0", "1"))
    name = "model.layers.1.mlp.up_proj.weight"
    mean = (zero[name].double() + one[name].double()) / 2
    assert torch.equal(found["model.layers.1.block_sparse_moe.experts.0.w3.weight"], mean.float())
    embedding = (zero["model.embed_tokens.weight"].double() + one["model.embed_tokens.weight"].double()) / 2
    row = embedding[prompt_ids(folder / "0", "code")[0, -1]]
    gate = found["model.layers.0.block_sparse_moe.gate.weight"].double()
    torch.testing.assert_close(gate[0], row / row.norm(), rtol=0, atol=1e-6)


def test_computed_buffers_of_old_checkpoints_are_left_out(dense_models: Any, tmp_path: Path) -> None:
    folder = dense_models("llama")
    for name in ("base", "0", "1", "2"):
        (tmp_path / name).mkdir()
        for path in (folder / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "base" / "model.safetensors")
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    save_file(state | old, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    opened = Merge(parse_recipe(mixture(tmp_path, "Mixtral")))
    assert not any("inv_freq" in name for name in opened.plan.tensors)
    assert any("3 stored buffers that the model computes are left out" in line for line in opened.plan.decisions)
    load_whole("mixtral", opened.write(tmp_path / "out").folder)


def test_the_dtype_is_the_recipes_and_the_config_says_so(dense_models: Any, tmp_path: Path) -> None:
    text = mixture(dense_models("llama"), "Mixtral", gate_mode="uniform_random", dtype="bfloat16")
    found = load_file(written(text, tmp_path / "out") / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_code_that_a_config_names_for_the_dense_model_is_not_named_for_the_mixture(
    dense_models: Any, tmp_path: Path
) -> None:
    folder = dense_models("llama")
    (tmp_path / "base").mkdir()
    for path in (folder / "base").iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "base" / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "code.Dense"}, "pretraining_tp": 1, "note": "kept"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    text = mixture(folder, "Mixtral", gate_mode="random").replace(str(folder / "base"), str(tmp_path / "base"))
    found = json.loads((written(text, tmp_path / "out") / "config.json").read_text())
    assert found["note"] == "kept" and not {"auto_map", "pretraining_tp"} & found.keys()
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 10000.0  # Mixtral's own default is 1e6


# ---- gates


def prompt_ids(folder: Path, prompt: str) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("<s>" + prompt, add_special_tokens=False)["input_ids"]
    assert ids[0] == 1 and len(ids) > 1 and tokenizer.decode(ids[1:]) == prompt
    return torch.tensor([ids])


@torch.no_grad()
def hidden_by_hand(folder: Path, prompts: Sequence[str], average: bool) -> np.ndarray:
    """Mean over prompts of transformers' own hidden states, each prompt run alone in float64: (layers, width)."""
    model, found = doubled(folder / "base"), []
    for prompt in prompts:
        states = model(input_ids=prompt_ids(folder / "base", prompt), output_hidden_states=True).hidden_states[:-1]
        found.append(np.stack([s[0].numpy().mean(0) if average else s[0, -1].numpy() for s in states]))
    return sum(found) / len(found)


def embeddings_by_hand(folder: Path, prompts: Sequence[str]) -> np.ndarray:
    table = load_file(folder / "base" / "model.safetensors")["model.embed_tokens.weight"].double().numpy()
    total = sum(table[i] for prompt in prompts for i in prompt_ids(folder / "base", prompt)[0])
    return np.stack([total / np.linalg.norm(total)] * 3)


def gates_by_hand(folder: Path, mode: str, sides: Sequence[tuple[Sequence[str], Sequence[str]]]) -> np.ndarray:
    """(layers, experts, width)."""
    rows = []
    for positive, negative in sides:
        if mode == "cheap_embed":
            row, less = embeddings_by_hand(folder, positive), negative and embeddings_by_hand(folder, negative)
        else:
            average = mode == "hidden_avg"
            row, less = hidden_by_hand(folder, positive, average), None
            less = negative and hidden_by_hand(folder, negative, average)
        row = row - less if negative else row
        rows.append(row / np.linalg.norm(row, axis=-1, keepdims=True))
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
@pytest.mark.parametrize("dense", ["llama", "llama tied", "mistral", "qwen2", "qwen3 windows"])
def test_gates_are_the_states_of_the_prompts(dense: str, mode: str, dense_models: Any) -> None:
    folder = dense_models(dense)
    architecture = {"qwen2": "Qwen MoE", "qwen3 windows": "Qwen3 MoE"}.get(dense, "Mixtral")
    merged = ctl_merge.open_merge(parse_recipe(mixture(folder, architecture, gate_mode=mode)))
    sides = [(PROMPTS[0], NEGATIVE), (PROMPTS[1], []), (PROMPTS[2], []), (["the math"], [])]
    wanted = gates_by_hand(folder, mode, sides)
    name = "block_sparse_moe" if architecture == "Mixtral" else "mlp"
    for layer in range(3):
        at = f"model.layers.{layer}.{name}"
        np.testing.assert_allclose(merged.read(f"{at}.gate.weight").numpy(), wanted[layer, :3], rtol=0, atol=1e-5)
        if architecture == "Qwen MoE":
            found = merged.read(f"{at}.shared_expert_gate.weight").numpy()
            np.testing.assert_allclose(found, wanted[layer, 3:], rtol=0, atol=1e-5)


def test_many_prompts_go_through_the_base_in_batches(dense_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe(mixture(dense_models("mistral"), "Mixtral"))
    name = "model.layers.2.block_sparse_moe.gate.weight"
    whole = ctl_merge.open_merge(recipe).read(name)
    monkeypatch.setattr(gates, "_TOKENS", 1)
    torch.testing.assert_close(ctl_merge.open_merge(recipe).read(name), whole, rtol=0, atol=1e-6)


def test_random_gates_are_as_stated_and_the_same_however_they_are_written(dense_models: Any, tmp_path: Path) -> None:
    folder = dense_models("llama")
    for mode in ("random", "uniform_random"):
        text = mixture(folder, "Mixtral", gate_mode=mode)
        one = load_file(written(text, tmp_path / f"one {mode}") / "model.safetensors")
        many = written(text, tmp_path / f"many {mode}", max_shard_size="20KB", num_workers=3)
        shards = [load_file(path) for path in many.glob("*.safetensors")]
        assert len(shards) > 5
        assert all(torch.equal(tensor, one[name]) for shard in shards for name, tensor in shard.items())
        drawn = torch.stack([one[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(3)]).flatten()
        assert len(drawn.unique()) == len(drawn) == 3 * 3 * 64
        bound = 1.0 if mode == "random" else 1 / (8 * 3**0.5)
        assert abs(float(drawn.mean())) < 4 * bound / len(drawn) ** 0.5
        assert float(drawn.std()) == pytest.approx(bound, rel=0.1)
        assert mode == "random" or float(drawn.abs().max()) <= 1 / 8
        other = ctl_merge.open_merge(parse_recipe(text + "seed: 1\n"))
        name = "model.layers.0.block_sparse_moe.gate.weight"
        assert not torch.equal(other.read(name), one[name])


def test_normal_noise_is_normal() -> None:
    found = np.sort(normal(0, "any")(0, 20_000).numpy())
    quantiles = torch.special.ndtri((torch.arange(20_000).double() + 0.5) / 20_000).numpy()
    assert np.abs(found - quantiles)[100:-100].max() < 0.08
    np.testing.assert_array_equal(normal(0, "any")(777, 50).numpy(), normal(0, "any")(0, 1000).numpy()[777:827])


def test_noise_and_residual_scale(dense_models: Any, tmp_path: Path) -> None:
    folder = dense_models("llama")
    data = yaml.safe_load(mixture(folder, "Mixtral", ("0", "0", "1"), gate_mode="random"))
    data["experts"][0] |= {"noise_scale": "1e-1", "residual_scale": 0.5}
    data["experts"][1] |= {"noise_scale": 0.1}
    found = load_file(written(yaml.safe_dump(data), tmp_path / "out") / "model.safetensors")
    source = load_file(folder / "0" / "model.safetensors")
    part = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    noises = []
    for expert, scale in ((0, 0.5), (1, 1.0)):
        for own, dense, factor in (("w1", "gate_proj", 1.0), ("w2", "down_proj", scale)):
            tensor = source[f"model.layers.1.mlp.{dense}.weight"].double()
            noises.append(found[part.format(expert, own)].double() / factor - tensor)
    for noise in noises:
        assert float(noise.std()) == pytest.approx(0.1, rel=0.05) and abs(float(noise.mean())) < 0.01
    assert not torch.equal(noises[0], noises[2])  # two experts of one model differ
    again = written(yaml.safe_dump(data), tmp_path / "again", max_shard_size="20KB")
    shards = [load_file(path) for path in again.glob("*.safetensors")]
    assert all(torch.equal(tensor, found[name]) for shard in shards for name, tensor in shard.items())


def test_prompts_that_hardly_differ_are_told(
    dense_models: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ctl_merge"), "propagate", True)
    text, name = mixture(dense_models("llama"), "Mixtral"), "model.layers.0.block_sparse_moe.gate.weight"
    ctl_merge.open_merge(parse_recipe(text)).read(name)
    assert caplog.text == ""
    twice = text.replace("hello friend the chat", "prime proof\n  - prime proof")
    ctl_merge.open_merge(parse_recipe(twice)).read(name)
    assert "gates of all layers hardly tell the experts apart" in caplog.text


def test_a_prompt_that_begins_as_every_prompt_does_is_told(dense_models: Any) -> None:
    text = mixture(dense_models("llama"), "Mixtral").replace("prime proof", "<s>prime proof")
    assert any("1 prompts begin with '<s>'" in line for line in Merge(parse_recipe(text)).plan.warnings)


# ---- writing


@pytest.mark.parametrize("calls", [5, 30, 60])
def test_a_mixture_killed_and_resumed_is_the_same_to_the_byte(
    calls: int, dense_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path, **options: Any) -> int:
        text = mixture(dense_models("qwen2"), "Qwen MoE", dtype="bfloat16")
        return Merge(parse_recipe(text), max_shard_size="30KB", num_workers=1).write(folder, **options).resumed_tensors

    run(tmp_path / "whole" / "out")
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_at", raising(Killed, calls, writer.write_at))
        with pytest.raises(Killed):
            run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (run(tmp_path / "out", resume=True) > 0) == (calls > 20)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_the_plan_tells_what_is_done(dense_models: Any) -> None:
    folder = dense_models("llama")
    summary = Merge(parse_recipe(mixture(folder, "Mixtral"))).summary()
    assert [m["role"] for m in summary["models"]] == ["base", "expert", "expert", "expert", "made"]
    told = "\n".join(summary["decisions"])
    assert "a Mixtral (MixtralForCausalLM): 3 experts, 2 for each token" in told
    assert "at the last token of 6 prompts" in told
    assert f"of {folder}/2, 21 tensors are not used (attention, norms, embeddings): lm_head.weight" in told
    assert f"of {folder}/base, 9 feed-forward tensors are not used" in told
    assert "3 experts, not a power of two: llama.cpp does not run such a model" in summary["warnings"]
    state = load_file(folder / "base" / "model.safetensors")
    each, network = (sum(t.nbytes for n, t in state.items() if keep(n)) for keep in (bool, lambda n: ".mlp." in n))
    assert summary["bytes"]["read"] == each + 2 * network
    assert summary["bytes"]["write"] == each + 2 * network + 3 * 3 * 64 * 4
    random = Merge(parse_recipe(mixture(folder, "Mixtral", gate_mode="random"))).summary()
    assert random["bytes"]["memory"] < summary["bytes"]["memory"]


def test_the_command_line(
    dense_models: Any, tmp_path: Path, ctl: Ctl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "moe.yaml").write_text(mixture(dense_models("llama"), "Mixtral"))
    capsys.readouterr()  # what is said when the models are made
    monkeypatch.chdir(tmp_path)
    done = ctl("moe.yaml", "--dry-run")
    assert (done.code, done.err) == (0, "") and "computed here" in done.out
    done = ctl("moe.yaml")
    assert done.code == 0, done.err
    load_whole("mixtral", tmp_path / "moe")
    assert "\n- moe\n" in (tmp_path / "moe" / "README.md").read_text()
    written = (tmp_path / "moe" / "ctl_merge_recipe.yaml").read_text()  # it names local models without their paths
    assert "experts:" in written and "./base" in written and str(tmp_path) not in written


def test_comparing_and_probing_are_refused(dense_models: Any) -> None:
    opened = Merge(parse_recipe(mixture(dense_models("llama"), "Mixtral")))
    for look in (compare, ctl_merge.probe):
        with pytest.raises(RecipeError, match="a mixture of experts has no counterpart in its parents"):
            look(opened)


# ---- recipes

SMALL = """\
base_model: org/base
experts:
  - source_model: org/a
    positive_prompts: [one]
  - source_model: org/b@v2
    positive_prompts: [two]
    negative_prompts: [three]
"""
SHARED = "shared_experts:\n  - source_model: org/c\n    positive_prompts: [four]\n"


def test_a_recipe_and_its_defaults() -> None:
    recipe = parse_recipe(SMALL)
    found = recipe.mixture
    assert found is not None
    assert [str(ref) for ref in recipe.refs] == ["org/base", "org/a", "org/b@v2"]
    assert (found.gate_mode, found.experts_per_token, found.architecture, found.shared) == ("hidden", 2, None, ())
    assert [(e.positive, e.negative, e.noise_scale, e.residual_scale) for e in found.experts] == [
        (("one",), (), 0.0, 1.0), (("two",), ("three",), 0.0, 1.0)
    ]  # fmt: skip
    assert (recipe.dtype, recipe.seed, recipe.allow_nonfinite, recipe.warnings) == (None, 0, False, ())


def test_every_key() -> None:
    keys = (
        "gate_mode: cheap_embed\nexperts_per_token: 1\narchitecture: qwen\ndtype: float16\nseed: 3\nnonfinite: allow\n"
    )
    recipe = parse_recipe(SMALL.replace("org/base", "{path: org/base, revision: v1}") + SHARED + keys)
    assert recipe.mixture is not None and recipe.base is not None and recipe.base.revision == "v1"
    assert (recipe.mixture.gate_mode, recipe.mixture.architecture) == ("cheap_embed", "qwen")
    assert (recipe.dtype, recipe.seed, recipe.allow_nonfinite) == ("float16", 3, True)
    assert [str(e.ref) for e in recipe.mixture.shared] == ["org/c"]


WRONG = {
    "unknown keys, all at once": (
        SMALL.replace("negative_prompts", "negative_prompt") + "gate_modes: random\n",
        ["7: unknown key 'negative_prompt' (did you mean 'negative_prompts'?); there are: source_model",
         "8: unknown key 'gate_modes' (did you mean 'gate_mode'?)"],
    ),
    "a gate mode that is none": (SMALL + "gate_mode: hiden\n", ["8: no gate_mode 'hiden' (did you mean 'hidden'?)"]),
    "an architecture that is none": (
        SMALL + "architecture: mixtrall\n", ["8: no architecture 'mixtrall' (did you mean 'Mixtral'?); there"]
    ),
    "deepseek": (SMALL + "architecture: deepseek\n", ["8: DeepSeek MoE of the first generation has no class in"]),
    "no prompts": (
        SMALL.replace("    positive_prompts: [two]\n", ""),
        ["5: `gate_mode: hidden` makes gates of prompts, and org/b@v2 has none: give it `positive_prompts`"],
    ),
    "a shared expert without prompts": (
        SMALL + SHARED.replace("    positive_prompts: [four]\n", ""), ["9: `gate_mode: hidden` makes gates of prompts"]
    ),
    "two shared experts": (
        SMALL + SHARED + "  - {source_model: org/d, positive_prompts: [five]}\n",
        ["11: no architecture has more than one shared expert: keep one"],
    ),
    "the same prompts": (
        SMALL.replace("two", "one").replace("    negative_prompts: [three]\n", ""),
        ["5: all experts have the same prompts"],
    ),
    "more experts a token than there are": (
        SMALL + "experts_per_token: 3\n", ["8: 3 experts per token, of 2: list as many"]
    ),
    "no experts per token": (SMALL + "experts_per_token: 0\n", ["8: `experts_per_token`: input should be gre"]),
    "one expert": (SMALL.partition("  - source_model: org/b")[0], ["1: 2 experts per token, of 1: list as many"]),
    "no experts": ("base_model: org/base\nexperts: []\n", ["2: `experts`: list should have at least 1 item"]),
    "no list": ("base_model: org/base\nexperts: ...\n", ["2: `experts`: input should be a valid list"]),
    "an expert that is a name": (
        "base_model: org/base\nexperts: [org/a]\n", ["2: an expert is a mapping with `source_model`"]
    ),
    "no base": (SMALL.partition("\n")[2], ["1: `base_model` is missing"]),
    "no model": (SMALL.replace("source_model: org/a", "source_model: 7"), ["3: `source_model` is a folder, org/"]),
    "a model that is nowhere": (SMALL.replace("org/a", "no/such/model"), ["3: 'no/such/model' is neither a folder"]),
    "an empty prompt": (SMALL.replace("[one]", "['']"), ["4: `experts.0.positive_prompts.0`: string should have"]),
    "a prompt that is no list": (SMALL.replace("[one]", "one"), ["4: `experts.0.positive_prompts`: input should be a"]),
    "noise below zero": (
        SMALL.replace("    negative", "    noise_scale: -1\n    negative"), ["7: `experts.1.noise_scale`: input should"]
    ),
    "scales that are no numbers": (
        SMALL.replace("    negative", "    residual_scale: .inf\n    noise_scale: much\n    negative"),
        ["7: `experts.1.residual_scale`: input should be a finite number", "8: `experts.1.noise_scale`: input should"],
    ),
    "a method": ("merge_method: moe\n" + SMALL, ["recipe, line 1: `experts` make a mixture of experts, which has no"]),
    "a dtype that is none": (SMALL + "dtype: bf16\n", ["8: `dtype`: input should be 'float32', 'float16', 'bfloat16'"]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_recipes_are_refused_with_their_lines(what: str) -> None:
    text, wanted = WRONG[what]
    with pytest.raises(RecipeError) as refused:
        parse_recipe(text)
    first, *lines = str(refused.value).splitlines()
    said = [line.removeprefix("  line ") for line in lines] or [first]
    assert len(said) == len(wanted)
    assert all(line.startswith(beginning) for line, beginning in zip(said, wanted, strict=True)), said


def test_what_is_allowed_with_a_warning() -> None:
    same = SMALL.replace("org/b@v2", "org/a")
    assert any("all experts are one model" in line for line in parse_recipe(same).warnings)
    noisy = same.replace("    negative", "    noise_scale: 0.1\n    negative")
    assert parse_recipe(noisy).warnings == ()
    assert parse_recipe(SMALL + "gate_mode: random\n").warnings == (
        "`gate_mode: random` draws the gates: prompts have no effect",
    )


def test_the_schema_knows_mixtures() -> None:
    schema = Draft202012Validator(recipe_schema())
    for text in (SMALL, SMALL + SHARED + "gate_mode: random\narchitecture: qwen\ndtype: float16\nseed: 3\n"):
        assert [error.message for error in schema.iter_errors(yaml.safe_load(text))] == []
    beyond = {"an architecture that is none", "deepseek", "no prompts", "a shared expert without prompts", "one expert",
              "two shared experts", "the same prompts", "more experts a token than there are",
              "a model that is nowhere", "scales that are no numbers"}  # fmt: skip
    for what in WRONG.keys() - beyond:
        assert not schema.is_valid(yaml.safe_load(WRONG[what][0])), what


# ---- models that do not fit


def planned(text: str) -> Merge:
    return Merge(parse_recipe(text))


def test_models_that_do_not_fit_each_other_or_any_architecture(dense_models: Any, tmp_path: Path) -> None:
    llama, qwen3 = dense_models("llama"), dense_models("qwen3")
    plain = mixture(llama, "Mixtral", gate_mode="random")
    with pytest.raises(MismatchError, match=r"different architectures: .*base is 'llama', .* is 'qwen3'"):
        planned(plain.replace(str(llama / "2"), str(qwen3 / "2")))
    build("llama", intermediate_size=80).save_pretrained(tmp_path / "narrow")
    with pytest.raises(MismatchError, match=r"down_proj.weight has shape \[64, 96\] in .* and \[64, 80\] in .*narrow"):
        planned(plain.replace(str(llama / "2"), str(tmp_path / "narrow")))
    with pytest.raises(MismatchError, match="Mixtral takes models of type llama, mistral; these are qwen3"):
        planned(mixture(qwen3, "Mixtral", gate_mode="random"))
    with pytest.raises(MismatchError, match=r"Qwen MoE needs one model under `shared_experts`; the recipe lists none"):
        planned(plain.replace("architecture: Mixtral", "architecture: Qwen MoE"))
    with pytest.raises(MismatchError, match=r"Mixtral has no shared experts; the recipe lists one"):
        planned(mixture(llama, "Qwen MoE", gate_mode="random").replace("Qwen MoE", "mixtral"))
    build("gemma2").save_pretrained(tmp_path / "gemma")
    gemma = {"base_model": str(tmp_path / "gemma"), "gate_mode": "random", "experts": [
        {"source_model": str(tmp_path / "gemma")}, {"source_model": str(tmp_path / "gemma")}]}  # fmt: skip
    with pytest.raises(MismatchError) as refused:
        planned(yaml.safe_dump(gemma))
    assert [line.partition(" takes")[0].strip() for line in str(refused.value).splitlines()[1:]] == list(CLASSES)


def test_tensors_that_an_architecture_has_no_place_for_are_named(tmp_path: Path) -> None:
    for name in ("base", "0", "1", "2"):
        build("llama", attention_bias=True).save_pretrained(tmp_path / name)
    with pytest.raises(MismatchError, match=r"a Mixtral has no place for 12 tensors of .*base: .*k_proj.bias"):
        planned(mixture(tmp_path, "Mixtral", gate_mode="random"))
    with pytest.raises(MismatchError, match=r"a Qwen MoE has no place for 3 tensors of .*base: .*o_proj.bias"):
        planned(mixture(tmp_path, "Qwen MoE", gate_mode="random"))
    for name in ("base", "0", "1", "2"):
        build("llama", mlp_bias=True).save_pretrained(tmp_path / name)
    with pytest.raises(MismatchError, match=r"has model.layers.0.mlp.down_proj.bias.*: experts are made of"):
        planned(mixture(tmp_path, "Mixtral", gate_mode="random"))


def test_windows_that_an_architecture_cannot_have_are_refused(tmp_path: Path) -> None:
    settings = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    for name in ("base", "0", "1", "2"):
        build("qwen3", **settings).save_pretrained(tmp_path / name)
    with pytest.raises(MismatchError, match="some of its layers have a sliding window and some have none, which Qwen3"):
        planned(mixture(tmp_path, "Qwen3 MoE", gate_mode="random"))


def test_prompts_that_cannot_be_read(dense_models: Any, tmp_path: Path) -> None:
    folder = dense_models("llama")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / "base" / name).read_bytes())
    text = mixture(folder, "Mixtral").replace(str(folder / "base"), str(tmp_path))
    name = "model.layers.0.block_sparse_moe.gate.weight"
    with pytest.raises(CheckpointError, match="its tokenizer, which the prompts are read with, cannot be loaded"):
        ctl_merge.open_merge(parse_recipe(text)).read(name)
    write_words(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([f"word{i}" for i in range(VOCABULARY)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="the prompt 'word99' has a token beyond the embedding's 128 rows"):
        ctl_merge.open_merge(parse_recipe(text.replace("prime proof", "word99"))).read(name)


def test_a_value_that_is_not_finite_is_refused(dense_models: Any, tmp_path: Path) -> None:
    folder = dense_models("llama")
    (tmp_path / "2").mkdir()
    state = load_file(folder / "2" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, tmp_path / "2" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "2" / "config.json").write_bytes((folder / "2" / "config.json").read_bytes())
    text = mixture(folder, "Mixtral", gate_mode="random").replace(str(folder / "2"), str(tmp_path / "2"))
    with pytest.raises(ctl_merge.CtlMergeError, match=r"2: model.layers.1.mlp.up_proj.weight holds nan at element 196"):
        Merge(parse_recipe(text)).write(tmp_path / "out")


# ---- documents found in the wild

FOUND = {
    "000_moe": "(?s)line 3: 'path/to/self_attn_donor' is neither .* line 15: `gate_mode: hidden` makes gates",
    "001_moe": r"line \d+: `experts`: input should be a valid list",
    "003_moe": None,
    "023_moe": r"(?s)lightblue.*deepseek-coder-1.3b-instruct has 6 tensors that|has shape \[5632, 2048\]|6 tensors",
    "025_moe": r"tensors that yuiseki|has shape \[5632, 2048\]",
    "047_moe": "line 4: `experts` make a mixture of experts, which has no `merge_method`",
}


@pytest.mark.real
@pytest.mark.skipif(not CONFIGS.is_dir(), reason="the collection of mergekit configs is not beside the project")
@pytest.mark.parametrize("name", FOUND)
def test_found_recipes_are_planned_or_refused_for_good_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = CONFIGS / f"{name}.yaml"
    reason = FOUND[name]
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        assert reason
        assert re.search(reason, str(error)), str(error)
        return
    with HubServer() as hub:
        for ref in recipe.refs:
            hub.add(str(ref.repo_id), write_found(ref.text, tmp_path / ref.text), ref.revision or "main")
        use_hub(monkeypatch, hub, tmp_path / "cache")
        if reason is None:
            opened = Merge(recipe)
            assert opened.plan.tensors["model.layers.31.block_sparse_moe.experts.3.w2.weight"].spec.shape == (
                4096,
                14336,
            )
            assert opened.plan.changes["model_type",] == "mixtral"
            attention, network, norms = 2 * 4096 * (4096 + 1024), 3 * 4096 * 14336, 2 * 4096
            layer = attention + 4 * network + norms + 4 * 4096
            assert sum(s.numel for s in opened.plan.specs.values()) == 32 * layer + 4096 + 2 * 32032 * 4096
        else:
            with pytest.raises(MismatchError, match=reason):
                Merge(recipe)


def test_every_found_recipe_is_among_them() -> None:
    if CONFIGS.is_dir():
        assert {path.stem for path in CONFIGS.glob("*_moe.yaml")} == FOUND.keys()
