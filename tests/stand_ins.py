"""Stand-ins for real models: true tensor names, shapes, dtypes, files and configs, without the weights.

A stand-in's safetensors files have a real header and, for data, a hole that takes no room on the disk; tokens other
than the special ones have made-up names. So a recipe over models of any size is planned in seconds. The files have
the sizes that the Hub states for the originals (`test_recipes.py` compares some).

    write_model("meta-llama/Llama-3.1-8B", folder)                        a model of MODELS
    write_stand_in(folder, config, llama_tensors(config), 5 * GB)         any other
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ctl_merge.header import TensorSpec, build_header, dtype_code, total_bytes
from ctl_merge.writer import plan_shards

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> safetensors dtype code, shape
Config = Mapping[str, Any]

GB = 10**9


def write_stand_in(folder: Path, config: Config, tensors: Tensors, shard_bytes: int = 5 * GB) -> Path:
    """Write config, index and headers of a model into `folder`; `tensors` are in the order of the modules.

    Files are cut as transformers cuts them: in order, at most `shard_bytes` of data each. Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    specs = {name: TensorSpec(dtype, shape) for name, (dtype, shape) in tensors.items()}
    shards = plan_shards(specs, shard_bytes)
    for shard in shards:
        header, _ = build_header(shard.specs, {"format": "pt"})
        with (folder / shard.file).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + shard.nbytes)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total_bytes(specs.values())},
            "weight_map": {name: shard.file for shard in shards for name in shard.specs},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# ---- tensors of an architecture


def llama_tensors(config: Config, *, rotary: bool = False) -> Tensors:
    """A Llama; `rotary`: with the frequencies that checkpoints of 2023 store in every layer."""
    frequencies = {"self_attn.rotary_emb.inv_freq": (_head_dim(config) // 2,)} if rotary else {}
    return _decoder(config, {"o_proj": frequencies})


def qwen2_tensors(config: Config) -> Tensors:
    """A Qwen2 or Qwen2.5: a Llama with biases on queries, keys and values."""
    queries, keys = _widths(config)
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return _decoder(config, {name: {f"self_attn.{name}.bias": (size,)} for name, size in sizes.items()})


def qwen3_tensors(config: Config) -> Tensors:
    """A dense Qwen3: a Llama with norms on queries and keys."""
    return _decoder(
        config, {"o_proj": {f"self_attn.{name}.weight": (_head_dim(config),) for name in ("q_norm", "k_norm")}}
    )


def _decoder(config: Config, after: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Tensors:
    """The decoder that these families share; `after` an attention projection come a layer's further tensors."""
    hidden, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = _widths(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    projections = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden),
                   "o_proj": (hidden, queries)}  # fmt: skip
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        for name, shape in projections.items():
            shapes[f"{layer}self_attn.{name}.weight"] = shape
            shapes |= {layer + more: size for more, size in after.get(name, {}).items()}
        shapes |= {f"{layer}mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (rows, hidden)
    dtype = dtype_code(config["torch_dtype"])
    return {name: (dtype, shape) for name, shape in shapes.items()}


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _widths(config: Config) -> tuple[int, int]:
    """Of queries, and of keys or values."""
    return _head_dim(config) * config["num_attention_heads"], _head_dim(config) * config["num_key_value_heads"]


# ---- tokenizers


def write_tokenizer(folder: Path, plain: int, special: Mapping[int, str]) -> None:
    """A tokenizer.json with `plain` tokens of made-up names from 0 on and the `special` ones at their ids."""
    (folder / "tokenizer.json").write_text(_tokenizer_json(plain, tuple(sorted(special.items()))))


@cache
def _tokenizer_json(plain: int, special: tuple[tuple[int, str], ...]) -> str:
    taken = dict(special)
    vocabulary = {f"t{i}": i for i in range(plain) if i not in taken}
    added = [{"id": i, "content": token, "special": True} for i, token in special]
    whole = {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    return json.dumps(whole)


def write_sentencepiece(folder: Path, added: Mapping[str, int] | None = None) -> None:
    """The same tokenizer.model for every Llama 2, and an added_tokens.json if tokens were `added`."""
    (folder / "tokenizer.model").write_bytes(b"stands for the 32,000 pieces of Llama 2")
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added, indent=2))


def write_llama_3_tokenizer(folder: Path, added: Mapping[int, str] = MappingProxyType({})) -> None:
    """The 128,256 tokens of Llama 3.1, and those that were `added`."""
    named = {
        128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128004: "<|finetune_right_pad_id|>",
        128006: "<|start_header_id|>", 128007: "<|end_header_id|>", 128008: "<|eom_id|>", 128009: "<|eot_id|>",
        128010: "<|python_tag|>",
    }  # fmt: skip
    free = (i for i in range(128000, 128256) if i not in named)
    reserved = {i: f"<|reserved_special_token_{number}|>" for number, i in enumerate(free)}
    write_tokenizer(folder, 128000, {**named, **reserved, **added})


# ---- configs

LLAMA_2_13B = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 13824, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 40,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.32.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip

LLAMA_3_1_70B = LLAMA_3_1_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80
}  # fmt: skip

QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip

QWEN3_4B_2507 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
    "intermediate_size": 9728, "max_position_embeddings": 262144, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 5000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


# ---- models, as recipes name them


def write_model(name: str, folder: Path) -> Path:
    """Write the stand-in of a model of MODELS into `folder`, and return that."""
    MODELS[name](folder)
    return folder


def _llama_2(folder: Path, *, rows: int = 32000, dtype: str = "float16", rotary: bool, pad: str | None) -> None:
    config = LLAMA_2_13B | {"vocab_size": rows, "torch_dtype": dtype}
    write_stand_in(folder, config, llama_tensors(config, rotary=rotary), 10 * GB)
    write_sentencepiece(folder, {pad: 32000} if pad else None)


def _llama_3(folder: Path, *, rows: int = 128256, pad: str | None = None) -> None:
    config = LLAMA_3_1_8B | {"vocab_size": rows}
    write_stand_in(folder, config, llama_tensors(config))
    write_llama_3_tokenizer(folder, {128256: pad} if pad else {})


def _qwen_3(folder: Path) -> None:
    write_stand_in(folder, QWEN3_4B_2507, qwen3_tensors(QWEN3_4B_2507), 4 * GB)
    special = """
        <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
        <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
        <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
        <tool_response> </tool_response> <think> </think>
    """
    write_tokenizer(folder, 151643, dict(enumerate(special.split(), 151643)))


MODELS: Mapping[str, Callable[[Path], None]] = {
    "meta-llama/Llama-2-13b-hf": partial(_llama_2, rotary=True, pad=None),
    "vanillaOVO/WizardMath-13B-V1.0@refs/pr/1": partial(
        _llama_2, rows=32001, dtype="float32", rotary=True, pad="[PAD]"
    ),
    "layoric/llama-2-13b-code-alpaca@refs/pr/2": partial(_llama_2, rotary=False, pad="<pad>"),
    "meta-llama/Llama-3.1-8B": _llama_3,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": partial(_llama_3, rows=128264, pad="<pad>"),
    "nvidia/OpenMath2-Llama3.1-8B": _llama_3,
    "Qwen/Qwen3-4B-Instruct-2507": _qwen_3,
    "Qwen/Qwen3-4B-Thinking-2507": _qwen_3,
}
