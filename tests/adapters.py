"""Adapters of every kind on tiny models, made and merged by PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_architectures import auto_class, build
from torch import Tensor

UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# Adapter -> architecture, changes of its config, what PEFT's LoraConfig is told.
KINDS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("llama", UNTIED, {"target_modules": "all-linear"}),
    "rslora": ("llama", UNTIED, {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("llama", UNTIED, {"target_modules": "all-linear", "use_dora": True}),
    "patterns": (
        "llama", UNTIED,
        {
            "target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 7},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 32, "down_proj": 1},
        },
    ),
    "patterns of rslora": (
        "llama", UNTIED, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 9}}
    ),
    "whole modules": ("llama", UNTIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "tokens": ("llama", UNTIED, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 100]}),
    "tokens of two tables": (
        "llama", UNTIED,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 5], "embed_tokens": [127, 0]}},
    ),
    "tokens, tied": ("llama", TIED, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "embedding": ("llama", UNTIED, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding by dora": ("llama", UNTIED, {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True}),
    "head": ("llama", UNTIED, {"target_modules": ["lm_head", "q_proj"]}),
    "conv1d": ("gpt2", {}, {"target_modules": ["c_attn", "c_fc", "c_proj"]}),  # c_proj of the attention is square
    "conv1d by dora": (
        "gpt2", {}, {"target_modules": ["c_attn", "c_fc", "c_proj"], "use_dora": True, "bias": "lora_only"}
    ),
    "biases": ("gpt2", {}, {"target_modules": ["c_attn"], "bias": "all", "lora_bias": True}),
    "kernels": ("vit", {}, {"target_modules": ["projection", "q_proj"]}),
    "kernels by dora": ("vit", {}, {"target_modules": ["projection", "q_proj"], "use_dora": True}),
    "experts": ("mixtral", {}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts of one kind": (
        "mixtral", {},
        {"target_modules": [], "target_parameters": EXPERTS[1:], "rank_pattern": {"experts.down_proj": 2}},
    ),
    "square experts": ("mixtral", {"intermediate_size": 64}, {"target_modules": [], "target_parameters": EXPERTS}),
    "whole experts": ("mixtral", {}, {"target_modules": ["gate"], "modules_to_save": ["experts"]}),
    "experts of qwen3_moe": ("qwen3_moe", {}, {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
    "stacked experts": ("gpt_oss", {}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "square stacked experts": (
        "gpt_oss", {"intermediate_size": 64}, {"target_modules": [], "target_parameters": EXPERTS}
    ),
    "stacked experts of llama4": ("llama4_text", {}, {"target_modules": [], "target_parameters": EXPERTS}),
    "parameters of layers": (
        "llama", UNTIED,
        {
            "target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"],
            "rank_pattern": {"q_proj.weight": 3},
        },
    ),
    "renamed head": (
        "gpt_neox", {}, {"target_modules": "all-linear", "modules_to_save": ["lm_head"], "bias": "all"}
    ),
    "renamed tower": ("llava", {}, {"target_modules": r".*language_model.*\.(q_proj|down_proj)"}),
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A base, an adapter on it, and where PEFT's float64 merge of both is written when it is asked for."""

    name: str
    base: Path
    adapter: Path
    arguments: Mapping[str, Any]

    @property
    def both(self) -> str:
        return f"{self.base}+{self.adapter}"

    def load(self, dtype: torch.dtype = torch.float64) -> PeftModel:
        """The model with its adapter beside it, as PEFT runs it."""
        model = auto_class(self.name).from_pretrained(self.base, dtype=dtype)
        adapted = PeftModel.from_pretrained(model, self.adapter, autocast_adapter_dtype=False)
        return adapted.to(dtype).eval()

    def merged(self, folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """PEFT's merge, written into the folder: its tensors by their names there."""
        self.load(dtype).merge_and_unload().save_pretrained(folder)
        return load_file(folder / "model.safetensors")


def train(
    folder: Path, name: str, changes: Mapping[str, Any], arguments: Mapping[str, Any], *, base: Path | None = None,
    seed: int = 0, dtype: torch.dtype = torch.float32,
) -> Trained:  # fmt: skip
    """A random model of the architecture (or `base`) and an adapter with random weights on it, both written."""
    if base is None:
        base = folder / "base"
        build(name, **changes).to(dtype).save_pretrained(base)
    model = auto_class(name).from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied weights and square layers
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **arguments}))
        generator = torch.Generator().manual_seed(seed)
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        adapter = folder / f"adapter-{seed}"
        adapted.save_pretrained(adapter)
    return Trained(name, base, adapter, arguments)


def change_config(adapter: Path, **changes: Any) -> None:
    """Set keys of an adapter's config."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(adapter: Path, change: Any) -> None:
    """Write what `change` makes of an adapter's tensors."""
    path = adapter / "adapter_model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
