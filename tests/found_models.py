"""Stand-ins of the models that mergekit files found in public repositories name: their shapes, as the Hub states them.

Models that exist nowhere (`model_a`) or whose page is gone are taken for what their names say, 32 layers of Mistral
where they say nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stand_ins import (
    LLAMA_2_13B,
    LLAMA_3_1_8B,
    LLAMA_3_1_70B,
    Config,
    Tensors,
    llama_tensors,
    write_llama_3_tokenizer,
    write_stand_in,
    write_tokenizer,
)

from ctl_merge.header import TensorSpec, build_header

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
NEMO_12B = MISTRAL_7B | {
    "head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40, "rope_theta": 1e6, "sliding_window": None,
    "vocab_size": 131072,
}  # fmt: skip
SMALL_24B = NEMO_12B | {"intermediate_size": 32768}
LLAMA_2_7B = LLAMA_2_13B | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32,
}  # fmt: skip
TINY_1_1B = LLAMA_2_7B | {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4,
}  # fmt: skip
DEEPSEEK_1_3B = TINY_1_1B | {
    "intermediate_size": 5504, "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16,
    "vocab_size": 32256,
}  # fmt: skip
SOLAR = LLAMA_2_7B | {"intermediate_size": 14336, "num_hidden_layers": 48, "num_key_value_heads": 8}
LLAMA_2_20B = LLAMA_2_13B | {"num_hidden_layers": 62}
PHI_3 = MISTRAL_7B | {
    "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192, "model_type": "phi3",
    "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000, "sliding_window": 2047,
    "max_position_embeddings": 4096, "rope_scaling": None, "vocab_size": 32064,
}  # fmt: skip
MIXTRAL = MISTRAL_7B | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8,
    "rope_theta": 1e6, "sliding_window": None,
}  # fmt: skip


def phi3_tensors(config: Config) -> Tensors:
    """A Llama whose queries, keys and values are one matrix, and gate and up another."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    fused = {"q_proj": ("qkv_proj", 3 * hidden), "gate_proj": ("gate_up_proj", 2 * inner)}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in llama_tensors(config).items():
        part = name.split(".")[-2]
        if part in fused:
            found[name.replace(part, fused[part][0])] = dtype, (fused[part][1], hidden)
        elif part not in ("k_proj", "v_proj", "up_proj"):
            found[name] = dtype, shape
    return found


def mixtral_tensors(config: Config) -> Tensors:
    """A Mistral with eight feed-forward networks a layer, as Mixtral's files name them."""
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in llama_tensors(config).items():
        part, count = name.split(".")[-2], config["num_local_experts"]
        if part in names:
            layer = name.partition(".mlp.")[0]
            experts = (f"{layer}.block_sparse_moe.experts.{i}.{names[part]}.weight" for i in range(count))
            found |= dict.fromkeys(experts, (dtype, shape))
            found[f"{layer}.block_sparse_moe.gate.weight"] = dtype, (count, config["hidden_size"])
        else:
            found[name] = dtype, shape
    return found


# By the first pattern that is found in a model's name.
CONFIGS: Mapping[str, Config] = {
    "(?i)Mixtral": MIXTRAL,
    "Chocolatine-3B|Phi-3-mini": PHI_3,
    "YuisekinAI-mistral-1.1B": MISTRAL_7B | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
    "TinyLlama|karasu": TINY_1_1B,
    "deepseek-coder-1.3b": DEEPSEEK_1_3B,
    "SOLAR": SOLAR,
    "L2-Chat-20B": LLAMA_2_20B,
    "24B": SMALL_24B,
    "(?i)12B|Nemo": NEMO_12B,
    "(?i)13b": LLAMA_2_13B,
    "70B|nemotron": LLAMA_3_1_70B,
    "8B|L3.1-Noraian|PT-GL|Eggs|SuperNova-Lite": LLAMA_3_1_8B,
    "(?i)Llama-2-7b|Orca-2-7b|Patent|TAIDE|WizardLM-7B|Platypus-7B|medalpaca|finance-LLM": LLAMA_2_7B,
    "": MISTRAL_7B,
}
# Tokens that finetunes added: names, and rows where there are more than tokens.
CHATML = ("<|im_end|>", "<|im_start|>")
ADDED: Mapping[str, tuple[tuple[str, ...], int]] = {
    "teknium/OpenHermes-2.5-Mistral-7B": (CHATML, 32002),
    "cognitivecomputations/dolphin-2.6-mistral-7b": (CHATML, 32002),
    "NousResearch/Hermes-2-Pro-Mistral-7B": (CHATML, 32032),
    "WizardLM/WizardMath-7B-V1.1": (("[PAD]",), 32001),
    "WizardLM/WizardMath-13B-V1.0": (("[PAD]",), 32001),
    "microsoft/Orca-2-7b": (("[PAD]", *CHATML), 32003),
    "Rakuten/RakutenAI-7B-instruct": ((), 48000),
    "taide/TAIDE-LX-7B": (tuple(f"字{i}" for i in range(24064)), 56064),
}
# The tokens to which the names of Llama 3 gave way.
RENAMED = {
    128000: "<｜begin▁of▁sentence｜>", 128001: "<｜end▁of▁sentence｜>", 128011: "<｜User｜>", 128012: "<｜Assistant｜>",
    128013: "<think>", 128014: "</think>",
}  # fmt: skip
_TENSORS: Mapping[str, Callable[[Config], Tensors]] = {"mixtral": mixtral_tensors, "phi3": phi3_tensors}


def write_found(name: str, folder: Path) -> Path:
    """Write the stand-in of a model or, if its name says so, of a LoRA adapter."""
    if "-LORA" in name:
        return _write_adapter(folder, LLAMA_3_1_70B if "70B" in name else NEMO_12B)
    tokens, rows = ADDED.get(name, ((), 0))
    config = next(config for pattern, config in CONFIGS.items() if re.search(pattern, name))
    config = {**config, "vocab_size": rows or config["vocab_size"]}
    write_stand_in(folder, config, _TENSORS.get(config["model_type"], llama_tensors)(config))
    plain = config["vocab_size"] if not tokens else 32000
    if config["vocab_size"] == LLAMA_3_1_8B["vocab_size"]:
        write_llama_3_tokenizer(folder, RENAMED if "DeepSeek-R1" in name else {})
    else:
        write_tokenizer(folder, plain, {0: "<unk>", 1: "<s>", 2: "</s>", **dict(enumerate(tokens, plain))})
    return folder


def _write_adapter(folder: Path, config: Config) -> Path:
    """A LoRA of rank 16 on all queries."""
    hidden, rank = config["hidden_size"], 16
    queries = config.get("head_dim", hidden // config["num_attention_heads"]) * config["num_attention_heads"]
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(config["num_hidden_layers"]):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{module}.lora_A.weight": (rank, hidden), f"{module}.lora_B.weight": (queries, rank)}
    specs = {name: TensorSpec("BF16", shape) for name, shape in tensors.items()}
    header, _ = build_header(specs, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * sum(a * b for a, b in tensors.values()))
    made: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**made, "bias": "none", "task_type": "CAUSAL_LM"}))
    return folder
