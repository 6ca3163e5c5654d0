"""Documents and files that are right, for the fuzzer to damage."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import write_checkpoint
from safetensors.torch import save_file

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
RECIPE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": 0.5, "density": [0.2, 0.8]}},
        {"model": "b+adapter", "parameters": {"weight": [{"filter": "mlp", "value": 0.3}, {"value": 1.0}]}},
    ],
    "parameters": {"lambda": 1.0, "normalize": True},
    "dtype": "bfloat16",
    "tokenizer": {"source": "union", "tokens": {"<bos>": {"source": "a"}}, "pad_to_multiple_of": 8},
    "chat_template": "auto",
    "probe": {"data": ["wiki=a.txt"], "sequences": 4, "length": 16},
}
SLICES: dict[str, Any] = {
    "name": "one",
    "merge_method": "slerp",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 1]}, {"model": "base", "layer_range": [0, 1]}],
         "parameters": {"t": [0, 1]}},
    ],
    "base_model": "base",
    "out_dtype": "float16",
    "missing": "base",
    "seed": 3,
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "base",
    "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 8}, "use_rslora": False, "fan_in_fan_out": False,
    "bias": "none", "task_type": "CAUSAL_LM", "modules_to_save": None,
}  # fmt: skip


CARD = "---\nlicense: mit\nbase_model: [org/a, org/b]\nmodel-index: [{name: x}]\n---\n# A model\n"
ROWS = b'{"text": "a b c", "answer": ["d", 1]}\n{"text": "\xc3\xa9", "answer": null}\n'
SITE = "block 0"
STATISTICS: dict[str, Any] = {
    "format": 1, "ctl_merge": "0", "base": "base", "parents": ["a", "b"], "merges": {"m": {"main": True}},
    "patches": {"m": {}}, "settings": {"sequences": 2}, "warnings": ["careful"], "tensors": ["w"], "scaled": {},
    "sets": {"wiki": {"strata": ["all"], "skipped": 0,
                      "sites": {SITE: {"sources": ["base", "a", "b", "m"], "massive": [3]}},
                      "losses": {"models": ["base", "a", "b", "m"], "riders": ["m"]}}},
}  # fmt: skip


def archived(head: Any) -> bytes:
    """A probe's statistics with this header: two sequences, one site."""
    shapes = {"tokens": (2, 1), f"{SITE}/gram": (2, 1, 4, 4), f"{SITE}/robust": (2, 1, 4, 4),
              f"{SITE}/cosines": (2, 1, 1), f"{SITE}/tokens": (2, 1), f"{SITE}/coefficients": (1, 2),
              f"{SITE}/explained": (1,), "losses/tokens": (2,), "losses/nll": (4, 2), "losses/ensemble": (1, 2),
              "losses/kl": (1, 2), "losses/agree": (1, 2)}  # fmt: skip
    arrays = {f"sets/wiki/{name}": np.ones(shape) for name, shape in shapes.items()}
    text = np.array(json.dumps(head).encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
    file = io.BytesIO()
    np.savez_compressed(file, header=text, **{"weights/grams": np.eye(4)[None]}, **arrays)
    return file.getvalue()


def simple(model: str) -> dict[str, Any]:
    """A recipe for the base and a model."""
    return {"merge_method": "linear", "tokenizer_source": "base", "base_model": "base",
            "models": [{"model": m, "parameters": {"weight": 1}} for m in ("base", model)]}  # fmt: skip


def write_models(folder: Path) -> None:
    """Tiny models `base`, `a`, `b`, an adapter, a finished merge of `a`, a probe's statistics, rows of text."""
    torch.manual_seed(0)
    config = json.loads((QUICKSTART / "base" / "config.json").read_text())
    config |= {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": True}
    layer = "model.layers.0."
    shapes = {"model.embed_tokens": (config["vocab_size"], 8), "model.norm": (8,)}
    shapes |= {f"{layer}self_attn.{name}_proj": (8, 8) for name in "qkvo"}
    shapes |= {f"{layer}mlp.gate_proj": (16, 8), f"{layer}mlp.up_proj": (16, 8), f"{layer}mlp.down_proj": (8, 16)}
    shapes |= {f"{layer}input_layernorm": (8,), f"{layer}post_attention_layernorm": (8,)}
    for name in ("base", "a", "b"):
        tensors = {f"{key}.weight": torch.randn(shape) for key, shape in shapes.items()}
        write_checkpoint(folder / name, tensors, config, shards=2)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (folder / name / file).write_bytes((QUICKSTART / "base" / file).read_bytes())
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text(json.dumps(config))
    (folder / "pickled" / "pytorch_model.bin").touch()
    (folder / "adapter").mkdir()
    prefix = f"base_model.model.{layer}self_attn.q_proj."
    factors = {f"{prefix}lora_A.weight": torch.randn(2, 8), f"{prefix}lora_B.weight": torch.randn(8, 2)}
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (folder / "a" / "README.md").write_text(CARD)
    (folder / "statistics.npz").write_bytes(archived(STATISTICS))
    (folder / "rows.jsonl").write_bytes(ROWS)
