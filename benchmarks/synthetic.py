"""Llama-shaped families of checkpoints of a chosen size: a base and finetunes near it, made in the time of a copy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.header import TensorSpec
from ctl_merge.writer import ShardWriter, plan_shards, write_index

_HEAD = 64  # width of an attention head
# hidden size, blocks, intermediate size, vocabulary, width of the key-value heads
SIZES = {
    "20M": (256, 8, 688, 32000, 64),
    "125M": (768, 12, 2048, 32000, 256),
    "350M": (1024, 20, 2816, 32000, 256),
    "1.1B": (2048, 22, 5632, 32000, 256),
    "3B": (2560, 34, 8704, 32000, 640),
}
_BLOCK = 1 << 20  # values are drawn once and laid out again and again: making them afresh would take minutes


def llama_specs(size: str, dtype: str = "BF16", blocks: int | None = None) -> dict[str, TensorSpec]:
    """The tensors of a Llama of that size, or of its width with as many blocks as given."""
    hidden, usual, intermediate, vocabulary, heads = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for block in range(blocks or usual):
        prefix = f"model.layers.{block}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (heads, hidden),
            f"{prefix}.self_attn.v_proj.weight": (heads, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return {name: TensorSpec(dtype, shape) for name, shape in shapes.items()}


class Synthetic(Checkpoint):
    """Model 0 is the base, N(0, 0.02²); model i is the base plus a task vector of a tenth of that size."""

    def __init__(self, size: str, model: int, blocks: int | None = None) -> None:
        self.name, self.tensors = f"{size}-{model}", llama_specs(size, blocks=blocks)
        hidden, usual, intermediate, vocabulary, heads = SIZES[size]
        self.config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": blocks or usual,
            "hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": vocabulary,
            "num_attention_heads": hidden // _HEAD, "num_key_value_heads": heads // _HEAD, "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,  # as Llama configs say: else transformers would be asked
        }  # fmt: skip
        base = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
        own = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(model)) * 0.002 if model else 0.0
        self._values = (base + own).bfloat16()

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        at = (int(hashlib.md5(tensor.encode()).hexdigest(), 16) + start) % _BLOCK
        filled = 0
        while filled < out.numel():
            count = min(_BLOCK - at, out.numel() - filled)
            out[filled : filled + count].copy_(self._values[at : at + count])
            filled, at = filled + count, 0


def write_family(
    folder: Path, size: str, models: int, max_shard_bytes: int = 2 * 10**9, blocks: int | None = None
) -> list[Path]:
    """Write a base and `models` finetunes; folders that are there already are kept."""
    name = size if blocks is None else f"{size}-{blocks}-blocks"
    paths = []
    for model in range(models + 1):
        path = folder / f"{name}-{model}"
        paths.append(path)
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        checkpoint = Synthetic(size, model, blocks)
        shards = plan_shards(checkpoint.tensors, max_shard_bytes)
        ShardWriter(path, shards, checkpoint).write(workers=2)
        write_index(path, shards)
        (path / "journal").unlink()
        (path / "config.json").write_text(json.dumps(checkpoint.config))
    return paths


def write_tokenizer(folder: Path, size: str) -> None:
    """Beside a checkpoint, a tokenizer of its vocabulary: the words w0, w1, w2 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZES[size][3])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
