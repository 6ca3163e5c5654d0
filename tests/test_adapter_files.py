"""Where adapters come from, what they name, and which are refused: folders, the Hub, older names, new tokens."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import EXPERTS, KINDS, TIED, UNTIED, Trained, change_config, change_tensors, train
from checkpoints import recipe_text
from hub_server import HubServer, use_hub
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ctl_merge
from ctl_merge.adapter import AdaptedCheckpoint
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.errors import CheckpointError, HubError, MismatchError
from ctl_merge.merging import Merge
from ctl_merge.reference import ModelRef
from ctl_merge.stored import open_checkpoint

WEIGHTS = "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path)
        yield server


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return train(tmp_path, "llama", UNTIED, {"target_modules": ["q_proj", "up_proj"]})


def opened(text: object) -> FileCheckpoint:
    return open_checkpoint(ModelRef.parse(str(text)))


def everything(checkpoint: FileCheckpoint) -> dict[str, Tensor]:
    checkpoint.fetch()
    return {name: checkpoint.read(name) for name in checkpoint}


def same_weights(one: FileCheckpoint, other: FileCheckpoint) -> bool:
    ours, theirs = everything(one), everything(other)
    return set(ours) == set(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# ---- the base that an adapter names


@pytest.mark.parametrize("named", ["base", "../base", "./base/"])
def test_an_adapter_alone_is_on_the_model_that_it_names(named: str, trained: Trained) -> None:
    change_config(trained.adapter, base_model_name_or_path=named)
    alone = opened(trained.adapter)
    assert same_weights(alone, opened(trained.both))
    assert [ref.folder for ref in alone.sources()] == [trained.base, trained.adapter]


def test_an_adapter_alone_whose_base_is_a_repository(server: HubServer, trained: Trained) -> None:
    server.add("org/base", trained.base, revision="v1")
    change_config(trained.adapter, base_model_name_or_path="org/base", revision="v1")
    alone = opened(trained.adapter)
    assert same_weights(alone, opened(trained.both))
    assert next(iter(alone.sources())) == ModelRef.parse("org/base@v1")


def test_an_adapter_alone_that_cannot_find_its_base_says_what_to_write(
    server: HubServer, trained: Trained, tmp_path: Path
) -> None:
    for named, reason in {
        None: "'' is no Hub repository",
        "/home/somebody/llama": "'/home/somebody/llama' is no Hub repository",
        "../adapter-0": "is an adapter: name it after a model that has weights",
        ".": "'.' may be",
    }.items():
        change_config(trained.adapter, base_model_name_or_path=named)
        with pytest.raises(CheckpointError, match=re.escape(reason)):
            opened(trained.adapter)
    change_config(trained.adapter, base_model_name_or_path="org/gone")
    with pytest.raises(HubError, match="org/gone@main"):
        opened(trained.adapter)
    shutil.copytree(trained.base, trained.adapter / "base")
    change_config(trained.adapter, base_model_name_or_path="base")
    with pytest.raises(CheckpointError, match=r"'base' may be .*base or .*base\): write model\+"):
        opened(trained.adapter)


def test_an_adapter_on_the_hub_cannot_point_into_this_machine(server: HubServer, trained: Trained) -> None:
    """A folder of that name here is not what its author meant, and none of the author's business."""
    for named in (str(trained.base), "../base", "..", "base/../../base"):
        change_config(trained.adapter, base_model_name_or_path=named)
        server.add("org/lora", trained.adapter)
        with pytest.raises(
            CheckpointError, match=r"org/lora is an adapter, and its base cannot be found .*no Hub repo"
        ):
            opened("org/lora")
    assert same_weights(opened(f"{trained.base}+org/lora"), opened(trained.both))


def test_another_base_than_the_one_it_was_trained_on_is_told(trained: Trained, tmp_path: Path) -> None:
    def warnings() -> tuple[str, ...]:
        return Merge(ctl_merge.parse_recipe(recipe_text("passthrough", [(trained.both, {})]))).plan.warnings

    for named in (str(trained.base), "somewhere/else/Base", "org/base", "", None):
        change_config(trained.adapter, base_model_name_or_path=named)
        assert warnings() == ()
    change_config(trained.adapter, base_model_name_or_path="org/other")
    assert warnings() == (f"{trained.adapter} says that it was trained on org/other; it is applied to base",)


# ---- the Hub


def test_a_plan_needs_headers_alone_and_a_merge_says_what_went_in(server: HubServer, tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", UNTIED, {"target_modules": "all-linear", "r": 512})
    (trained.adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    commits = [server.add("org/base", trained.base), server.add("org/lora", trained.adapter, revision="v2")]
    size = (trained.adapter / WEIGHTS).stat().st_size
    model = "org/base+org/lora@v2"
    recipe = ctl_merge.parse_recipe(recipe_text("task_arithmetic", [(model, {"weight": 0.5})], "org/base"))
    merge = Merge(recipe)
    summary = merge.summary()
    assert 0 < server.sent(WEIGHTS) < size / 4
    assert summary["bytes"]["download"] >= size
    assert summary["models"][1]["model"] == model
    assert summary["models"][1]["commit"] == commits[0]
    adapter = summary["models"][1]["adapter"]
    assert (adapter["model"], adapter["on"], adapter["commit"]) == ("org/lora@v2", "org/base", commits[1])
    result = merge.write(tmp_path / "merged")
    assert size <= server.sent(WEIGHTS) < 1.3 * size
    source = result.manifest["sources"][1]
    published = {file.path: file.sha256 for file in merge.sources[ModelRef.parse("org/lora@v2")].snapshot.files}
    assert (source["model"], source["adapter_on"], source["revision"], source["commit"]) == (
        "org/lora", "org/base", "v2", commits[1]
    )  # fmt: skip
    assert {f["file"]: f["sha256"] for f in source["files"]}[WEIGHTS] == published[WEIGHTS]
    card = (tmp_path / "merged" / "README.md").read_text()
    where = f"https://huggingface.co/org/lora/tree/{commits[1]}"
    assert f"| [org/lora]({where}) at `{commits[1][:12]}` | merged, adapter on `org/base` | 0.5 |" in card
    merged, whole = load_file(tmp_path / "merged" / "model.safetensors"), trained.merged(tmp_path / "whole")
    base = load_file(trained.base / "model.safetensors")
    for name, tensor in merged.items():
        expected = 0.5 * base[name].double() + 0.5 * whole[name]
        assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-9)


def test_what_is_under_an_adapter_has_a_row_of_its_own(trained: Trained, tmp_path: Path) -> None:
    recipe = ctl_merge.parse_recipe(recipe_text("linear", [(trained.both, {"weight": 1.0})]))
    ctl_merge.merge(recipe, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| `base` | under an adapter |  |\n| `adapter-0` | merged, adapter on `base` | 1.0 |" in card
    assert str(tmp_path) not in card.replace(recipe.text, "")
    files = json.loads((tmp_path / "merged" / "merge_manifest.json").read_text())["sources"][1]["files"]
    assert [file["file"] for file in files] == ["adapter_config.json", WEIGHTS]
    assert all(len(file["sha256"]) == 64 for file in files)


def test_adapters_that_are_gone_or_none(server: HubServer, trained: Trained) -> None:
    with pytest.raises(HubError, match="org/gone@main"):
        opened(f"{trained.base}+org/gone")
    with pytest.raises(CheckpointError, match=r"base is no adapter: it has no adapter_model.safetensors; it has: conf"):
        opened(f"{trained.base}+{trained.base}")
    (trained.adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="is no adapter: it has no adapter_config.json"):
        opened(trained.both)


def test_pickled_adapters_are_read_without_running_them(trained: Trained, server: HubServer) -> None:
    read = everything(opened(trained.both))
    torch.save(load_file(trained.adapter / WEIGHTS), trained.adapter / "adapter_model.bin")
    (trained.adapter / WEIGHTS).unlink()
    server.add("org/lora", trained.adapter)
    for adapter in (trained.adapter, "org/lora"):
        checkpoint = opened(f"{trained.base}+{adapter}")
        checkpoint.fetch()
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in read.items())
    torch.save({"x": Path("x")}, trained.adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin holds more than tensors"):
        opened(trained.both)


# ---- names of other versions


def low_rank(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, shape[1], generator=generator), torch.randn(shape[0], 4, generator=generator)


def test_modules_by_the_names_of_older_transformers(tmp_path: Path) -> None:
    """Experts were layers of their own once, and their names are those in the files."""
    trained = train(tmp_path, *KINDS["experts"])
    base = load_file(trained.base / "model.safetensors")
    names = [f"model.layers.1.block_sparse_moe.{name}" for name in ("experts.2.w1", "experts.0.w2", "gate")]
    parts = {name: low_rank(tuple(base[f"{name}.weight"].shape), i) for i, name in enumerate(names)}
    keys = {
        f"base_model.model.{name}.lora_{letter}.weight": part
        for name, pair in parts.items()
        for letter, part in zip("AB", pair, strict=True)
    }
    change_tensors(trained.adapter, lambda _: keys)
    change_config(trained.adapter, target_modules=["w1", "w2", "gate"], target_parameters=None, alpha_pattern={"w2": 2})
    checkpoint = opened(trained.both)
    for name in names:
        a, b = parts[name]
        scale = 0.5 if name.endswith("w2") else 1.5
        expected = base[f"{name}.weight"].double() + scale * b.double() @ a.double()
        assert torch.allclose(checkpoint.read(f"{name}.weight").double(), expected, rtol=1e-6, atol=1e-7)
    unchanged = set(base) - {f"{name}.weight" for name in names}
    assert all(torch.equal(checkpoint.read(name), base[name]) for name in unchanged)


def test_whole_modules_by_the_names_that_older_peft_gave_them(tmp_path: Path) -> None:
    trained = train(tmp_path, *KINDS["whole modules"])
    expected = everything(opened(trained.both))
    head = "base_model.model.lm_head"

    def older(old: dict[str, Tensor]) -> dict[str, Tensor]:
        before = {f"{head}.original_module.weight": torch.zeros(128, 64)}
        return {**before, **{n.replace(f"{head}.", f"{head}.modules_to_save.default."): t for n, t in old.items()}}

    change_tensors(trained.adapter, older)
    found = everything(opened(trained.both))
    assert set(found) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_an_adapter_of_the_model_without_its_head(trained: Trained) -> None:
    expected = everything(opened(trained.both))
    shorter = {n: n.replace("model.model.model", "model.model") for n in load_file(trained.adapter / WEIGHTS)}
    change_tensors(trained.adapter, lambda old: {shorter[name]: tensor for name, tensor in old.items()})
    found = everything(opened(trained.both))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_square_matrix_of_gpt2_is_transposed_whatever_the_config_says(tmp_path: Path) -> None:
    trained = train(tmp_path, *KINDS["conv1d"])
    expected = everything(opened(trained.both))
    change_config(trained.adapter, fan_in_fan_out=False)
    found = everything(opened(trained.both))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# ---- new tokens

SIZE = 132  # tokens: four more than the base has


def save_tokenizer(folder: Path, size: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def resized(tmp_path: Path, tied: dict[str, Any], arguments: dict[str, Any]) -> Trained:
    """An adapter on a model whose embedding was given more rows before it was trained, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    trained = train(tmp_path, "llama", tied, {"target_modules": ["q_proj"]})
    save_tokenizer(trained.base, 128)
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    model.resize_token_embeddings(SIZE)
    model.config._name_or_path = str(trained.base)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **arguments))
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(trained.adapter)
    save_tokenizer(trained.adapter, SIZE)
    with torch.inference_mode():
        logits = adapted.eval()(torch.arange(100, SIZE).view(1, -1)).logits
    torch.save(logits, tmp_path / "logits.pt")
    assert AutoConfig.from_pretrained(trained.base).vocab_size == 128
    return trained


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize("tied", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["saved with it", "low rank", "whole"],
)  # fmt: skip
def test_a_vocabulary_that_grew_comes_with_its_tokenizer(
    tied: dict[str, Any], arguments: dict[str, Any], tmp_path: Path
) -> None:
    trained = resized(tmp_path, tied, arguments)
    checkpoint = opened(trained.both)
    assert checkpoint.config["vocab_size"] == SIZE
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (SIZE, 64)
    recipe = ctl_merge.parse_recipe(recipe_text("passthrough", [(trained.both, {})]))
    result = ctl_merge.merge(recipe, tmp_path / "merged")
    tokenizer = json.loads((result.folder / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == SIZE
    model, report = AutoModelForCausalLM.from_pretrained(result.folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.inference_mode():
        logits = model(torch.arange(100, SIZE).view(1, -1)).logits
    assert torch.allclose(logits, torch.load(tmp_path / "logits.pt"), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning")
def test_models_of_different_vocabularies_are_merged_as_the_recipe_says(tmp_path: Path) -> None:
    trained = resized(tmp_path, UNTIED, {"target_modules": ["q_proj"]})
    text = recipe_text("linear", [(trained.base, {"weight": 1}), (trained.both, {"weight": 1})])
    with pytest.raises(MismatchError, match="different vocabularies"):
        Merge(ctl_merge.parse_recipe(text))
    merged = ctl_merge.open_merge(ctl_merge.parse_recipe(text + "tokenizer_source: union\n"))
    assert merged.tensors["lm_head.weight"].shape == (SIZE, 64)


def test_an_adapter_that_leaves_tokens_alone_has_the_tokenizer_of_its_base(trained: Trained) -> None:
    """Trainers save one beside every adapter, often with a padding token that no row belongs to."""
    save_tokenizer(trained.base, 128)
    save_tokenizer(trained.adapter, 129)
    assert opened(trained.both).folder == trained.base


def test_an_adapter_with_rows_of_tokens_has_its_own_tokenizer(server: HubServer, tmp_path: Path) -> None:
    trained = train(tmp_path, *KINDS["tokens"])
    save_tokenizer(trained.base, 128)
    assert opened(trained.both).folder == trained.base
    save_tokenizer(trained.adapter, 127)
    server.add("org/lora", trained.adapter)
    for text in (trained.both, f"{trained.base}+org/lora"):
        checkpoint = opened(text)  # its folder lives as long as it does
        folder = checkpoint.folder
        assert (folder / "tokenizer.json").read_text() == (trained.adapter / "tokenizer.json").read_text()
        assert (folder / "config.json").read_bytes() == (trained.base / "config.json").read_bytes()
        assert not (folder / "adapter_config.json").exists()


def test_modules_that_the_base_lacks_are_brought_and_told(trained: Trained) -> None:
    score = torch.ones(3, 64)
    change_tensors(trained.adapter, lambda old: {**old, "base_model.model.score.weight": score})
    change_config(trained.adapter, modules_to_save=["score"])
    checkpoint = opened(trained.both)
    assert torch.equal(checkpoint.read("score.weight"), score)
    assert any("brings tensors that base lacks: score.weight" in warning for warning in checkpoint.warnings)
    base = recipe_text("linear", [(trained.base, {"weight": 1}), (trained.both, {"weight": 1})])
    with pytest.raises(MismatchError, match=r"has 1 tensors that .*base lacks: score.weight"):
        Merge(ctl_merge.parse_recipe(base))


# ---- what is refused

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({"peft_type": None}, "does not say of which kind it is (peft_type)"),
    **{
        kind: ({"peft_type": kind}, f"the adapter is of the kind {kind}; only LORA can be read: merge it into its base")
        for kind in ("IA3", "LOHA", "LOKR", "ADALORA", "OFT", "PREFIX_TUNING", "TRAINABLE_TOKENS", "lora")
    },
    "alora": ({"alora_invocation_tokens": [1, 2]}, "Activated LoRA, which acts on some tokens only"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "Arrow"),
    "kasa": ({"kasa_config": {}, "use_qalora": True}, "QA-LoRA (use_qalora)"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 3]]}, "stack the layers with `slices` instead"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which takes a part out"),
    "olora": ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    "rank of zero": ({"r": 0}, "adapter_config.json: r: Input should be greater than or equal to 1 (it is 0)"),
    "rank below zero": ({"rank_pattern": {"q_proj": -1}}, "rank_pattern of 'q_proj' is -1"),
    "rank is text": ({"r": "8"}, "r: Input should be a valid integer"),
    "another rank than the tensors'": ({"r": 5}, "asks for rank 5 of base_model.model.model.layers.0"),
    "an absurd rank": ({"r": 10**30}, f"asks for rank {10**30} of"),
    "an absurd rank for some": ({"rank_pattern": {"up_proj": 2**62}}, f"asks for rank {2**62} of"),
    "alpha is infinite": ({"lora_alpha": float("inf")}, "lora_alpha: Input should be a finite number"),
    "alpha of some is not a number": ({"alpha_pattern": {"x": float("nan")}}, "alpha_pattern of 'x' is nan"),
    "a pattern that is none": ({"rank_pattern": {"(": 4}}, "rank_pattern: '(': missing ), unterminated subpattern"),
    "patterns are a list": ({"alpha_pattern": [1]}, "alpha_pattern: Input should be a valid dictionary"),
    "dora without magnitudes": ({"use_dora": True}, "lacks its lora_magnitude_vector"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_cannot_be_followed_is_refused(what: str, trained: Trained) -> None:
    changes, message = CONFIGS[what]
    change_config(trained.adapter, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)) as refused:
        opened(trained.both)
    assert str(trained.adapter) in str(refused.value)


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda old: {name: tensor for name, tensor in old.items() if part not in name}


def with_(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda old: {**old, name: tensor}


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no B": (without("0.self_attn.q_proj.lora_B"), "the adapter of model.layers.0.self_attn.q_proj has only lora_A"),
    "nothing": (lambda old: {}, "the adapter holds no tensors"),
    "a layer too many": (
        lambda old: {name.replace("layers.2", "layers.9"): tensor for name, tensor in old.items()},
        "4 tensors of the adapter belong to nothing in",
    ),
    "another prefix": (with_("model.layers.0.mlp.x", torch.ones(2)), "1 tensors of the adapter belong to nothing in"),
    "another kind beside it": (with_(f"{Q_PROJ}.ia3_l", torch.ones(2)), "belong to nothing in"),
    "another part of a kind": (with_(f"{Q_PROJ}.lora_diag", torch.ones(2)), f"{Q_PROJ}.lora_diag"),
    "tokens that the config does not name": (
        with_("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(2, 64)),
        "embed_tokens.token_adapter.trainable_tokens_delta",
    ),
    "inputs that do not fit": (with_(f"{Q_PROJ}.lora_A.weight", torch.ones(4, 65)), "has shape [64, 65] and does not"),
    "outputs that do not fit": (with_(f"{Q_PROJ}.lora_B.weight", torch.ones(63, 4)), "does not fit model.layers.0"),
    "a rank that does not fit": (with_(f"{Q_PROJ}.lora_B.weight", torch.ones(64, 3)), "asks for rank 4 of"),
    "a vector": (with_(f"{Q_PROJ}.lora_B.weight", torch.ones(64)), "and B [64]"),
    "a number": (with_(f"{Q_PROJ}.lora_A.weight", torch.tensor(1.0)), "does not fit"),
    "no rows": (with_(f"{Q_PROJ}.lora_A.weight", torch.ones(0, 64)), "asks for rank 4 of"),
    "a module of another shape": (
        with_("base_model.model.model.layers.0.input_layernorm.weight", torch.ones(65)), "has shape [65] and does not"
    ),
    "a bias that the layer lacks": (
        with_(f"{Q_PROJ}.lora_B.bias", torch.ones(64)), "PEFT cannot merge it either (lora_bias)"
    ),
    "whole numbers": (
        lambda old: {name: t.to(torch.int8) for name, t in old.items()}, "is I8: save the adapter in floating point"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(what: str, trained: Trained) -> None:
    change, message = TENSORS[what]
    change_tensors(trained.adapter, change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        opened(trained.both)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([7, 3], "has shape [3, 64] and does not fit 2 rows of"), ([7, 3, 3], "names rows twice"),
        ([7, 3, 128], "or rows that model.embed_tokens.weight with its 128 rows does not have"),
        ([7, 3, -1], "names rows twice, or rows that"), ({"lm_head": [1, 2, 3]}, "belong to nothing"),
        ("all", "trainable_token_indices"),
    ],
)  # fmt: skip
def test_rows_that_are_not_there_are_refused(indices: Any, message: str, tmp_path: Path) -> None:
    trained = train(tmp_path, *KINDS["tokens"])
    change_config(trained.adapter, trainable_token_indices=indices)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        opened(trained.both)


def test_a_resized_table_without_the_head_that_is_tied_to_it(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", TIED, {"target_modules": ["q_proj"]})
    key = "base_model.model.model.embed_tokens.weight"
    change_tensors(trained.adapter, with_(key, torch.ones(SIZE, 64)))
    with pytest.raises(CheckpointError, match=r"does not hold lm_head.weight, which is tied to it: save both"):
        opened(trained.both)


def test_tables_of_different_sizes(trained: Trained) -> None:
    tables = {"model.embed_tokens": SIZE, "lm_head": SIZE + 1}
    for name, rows in tables.items():
        change_tensors(trained.adapter, with_(f"base_model.model.{name}.weight", torch.ones(rows, 64)))
    with pytest.raises(CheckpointError, match="its tables have different numbers of rows"):
        opened(trained.both)


def test_experts_are_matched_by_the_parameters_that_the_config_names(tmp_path: Path) -> None:
    arguments = {"target_modules": [], "target_parameters": EXPERTS[1:]}
    trained = train(tmp_path, "mixtral", {"intermediate_size": 64}, arguments)
    change_config(trained.adapter, target_parameters=["experts.up_proj"])
    with pytest.raises(CheckpointError, match="belong to nothing"):
        opened(trained.both)


def test_a_corrupt_adapter_is_refused(trained: Trained) -> None:
    path = trained.adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="corrupt"):
        opened(trained.both)
    (trained.adapter / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json is not valid JSON"):
        opened(trained.adapter)


def test_what_is_opened_is_an_adapted_checkpoint(trained: Trained) -> None:
    checkpoint = opened(trained.both)
    assert isinstance(checkpoint, AdaptedCheckpoint)
    assert checkpoint.decisions == (f"{trained.both}: LoRA of rank 4, which changes 6 of 30 tensors",)
