"""Families of checkpoints in the Llama layout: a base and finetunes of it, tiny and of odd sizes, or real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# hidden size, heads, key-value heads, intermediate size, vocabulary, layers, tied head
SHAPES = {
    "odd": (36, 3, 1, 71, 67, 5, False),
    "tied": (20, 2, 2, 33, 41, 3, True),
    "wide": (136, 2, 1, 150, 1031, 2, False),  # an embedding of more than the 2¹⁷ entries that are merged at a time
}
# Size of a finetune's task vectors relative to the weights, and the share of its rows that training did not touch.
TUNES = {"a": (0.05, 0.0), "b": (0.3, 0.0), "c": (0.005, 0.0), "d": (0.05, 0.5)}
# Finetunes of the family "vocab" have tokens that the base lacks, or lack some that it has.
EXTRA_TOKENS = {"a": 2, "b": -3}
# Rank of the adapters of the family "lora", and the matrices that they are on.
RANK, ADAPTED = 4, ("q_proj", "v_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """Checkpoints of one base. `models`: their tensors by the names that configurations give them; `base+adapter` is a
    model of its own, whose tensors are the sum in float64."""

    name: str
    folder: Path
    base: str
    tunes: tuple[str, ...]
    depth: int
    dtype: str  # in which the weights are stored; the base's where they are mixed
    models: Mapping[str, Mapping[str, Tensor]]
    vocabularies_differ: bool = False

    def path(self, model: str) -> str:
        """A model as a configuration names it."""
        return "+".join(str(self.folder / part) for part in model.split("+"))


def make_families(folder: Path) -> dict[str, Family]:
    """Write every synthetic family below `folder`."""
    made = [make(folder, shape, dtype) for shape in SHAPES for dtype in TORCH]
    made += [make(folder, "tied", "mixed"), make(folder, "tied", "bfloat16", vocab=True), make_adapted(folder)]
    return {family.name: family for family in made}


def make(folder: Path, shape: str, dtype: str, vocab: bool = False) -> Family:
    """One family. `mixed`: a float32 base with bfloat16 and float16 finetunes; `vocab`: of differing vocabularies."""
    kind = "vocab" if vocab else shape
    hidden, _, _, _, words, depth, _ = SHAPES[shape]
    name = f"{kind}-{dtype}"
    generator = torch.Generator().manual_seed(len(name) * 1000 + hidden)
    stored = {"base": "float32" if dtype == "mixed" else dtype}
    models = {"base": _draw(_shapes(*SHAPES[shape]), generator)}
    for number, (tune, (spread, frozen)) in enumerate(TUNES.items()):
        models[tune] = {n: _tuned(t, spread, frozen, generator) for n, t in models["base"].items()}
        stored[tune] = ("bfloat16", "float16")[number % 2] if dtype == "mixed" else dtype
    extra = EXTRA_TOKENS if vocab else {}
    for model, tensors in models.items():
        rows = words + extra.get(model, 0)
        tensors = {n: _resized(t, rows, generator) if "embed" in n or "head" in n else t for n, t in tensors.items()}
        models[model] = {n: t.to(TORCH[stored[model]]) for n, t in tensors.items()}
        config = config_of(shape, rows, stored[model])
        write(folder / name / model, models[model], config)
        if vocab:
            write_tokenizer(folder / name / model, rows)
    return Family(name, folder / name, "base", tuple(TUNES), depth, stored["base"], models, vocab)


def make_adapted(folder: Path) -> Family:
    """A float32 family of which two finetunes are adapters on the base."""
    plain = make(folder / "plain", "odd", "float32")
    base, generator = plain.models["base"], torch.Generator().manual_seed(1)
    models = dict(plain.models)
    for name, alpha in (("low", 8), ("high", 16)):
        factors, sums = {}, dict(base)
        for tensor, weight in base.items():
            if tensor.split(".")[-2] in ADAPTED:
                a = 0.02 * torch.randn(RANK, weight.shape[1], generator=generator)
                b = 0.02 * torch.randn(weight.shape[0], RANK, generator=generator)
                stem = f"base_model.model.{tensor.removesuffix('.weight')}"
                factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
                sums[tensor] = weight.double() + b.double() @ a.double() * (alpha / RANK)
        models[f"base+{name}"] = sums
        write_adapter(plain.folder / name, factors, alpha, plain.folder / "base")
    tunes = ("base+low", "a", "base+high")
    return replace(plain, name="lora-float32", tunes=tunes, models=models)


def write_adapter(folder: Path, factors: Mapping[str, Tensor], alpha: int, base: Path) -> None:
    """An adapter as peft writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": alpha, "bias": "none",
        "target_modules": list(ADAPTED), "base_model_name_or_path": str(base),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(factors), folder / "adapter_model.safetensors", {"format": "pt"})


def config_of(shape: str, words: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model of that shape."""
    hidden, heads, kv, inner, _, depth, tied = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "torch_dtype": dtype,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": words,
        "num_hidden_layers": depth, "tie_word_embeddings": tied,
    }  # fmt: skip


def _shapes(
    hidden: int, heads: int, kv: int, inner: int, words: int, depth: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    keys = kv * (hidden // heads)
    for layer in range(depth):
        own = {
            "input_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,), "mlp.up_proj": (inner, hidden), "mlp.gate_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if tied else {**shapes, "lm_head.weight": (words, hidden)}


def _draw(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    drawn = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor + 1.0 if tensor.ndim == 1 else tensor for name, tensor in drawn.items()}


def _tuned(base: Tensor, spread: float, frozen: float, generator: torch.Generator) -> Tensor:
    delta = spread * 0.02 * torch.randn(base.shape, generator=generator)
    touched = torch.rand(len(base), generator=generator) >= frozen
    return base + delta * touched.view(-1, *[1] * (base.ndim - 1))


def _resized(tensor: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    more = 0.02 * torch.randn(max(0, rows - len(tensor)), tensor.shape[1], generator=generator)
    return torch.cat([tensor, more])[:rows]


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """A checkpoint in one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def write_tokenizer(folder: Path, words: int) -> None:
    """A tokenizer of the words w0, w1, w2 ..."""
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(words)}, "unk_token": "w0"}
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def real_family(folder: Path, base: str) -> Family:
    """The checkpoints in the subfolders of `folder`, of which `base` is the one that the others come from."""
    found = sorted(p.parent.name for p in folder.glob("*/model.safetensors"))
    models = {name: load_file(folder / name / "model.safetensors") for name in found}
    depth = json.loads((folder / base / "config.json").read_text())["num_hidden_layers"]
    dtype = str(next(iter(models[base].values())).dtype).removeprefix("torch.")
    tunes = tuple(name for name in found if name != base)
    return Family("real", folder, base, tunes, depth, dtype, models)
