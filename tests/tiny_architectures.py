"""Models of 41 architectures, each of some hundred thousand weights, built from configs: nothing is downloaded.

>>> build("llama").save_pretrained(folder)              # doctest: +SKIP
>>> model = load_whole("llama", folder)                 # doctest: +SKIP
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

VOCABULARY = 128
WIDTH = 64

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, **_TOKENS,
}  # fmt: skip
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_WIDE_HEADS = {**_DECODER, "head_dim": 16}
_FOUR_LAYERS = {**_DECODER, "num_hidden_layers": 4}  # as many as a pattern of different layers takes
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_SEQ2SEQ = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
_STATE_SPACE = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "state_size": 8}

# Model type -> arguments of its config.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    # decoders of one kind of layer
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _WIDE_HEADS,
    "gemma2": _WIDE_HEADS,
    "gemma3_text": _WIDE_HEADS,
    "phi": _DECODER,
    "phi3": _DECODER,
    "olmo2": _DECODER,
    "granite": _DECODER,
    "cohere2": _DECODER,
    "stablelm": _DECODER,
    "glm4": _WIDE_HEADS,
    "falcon": _DECODER,
    "gpt_neox": _ENCODER,
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 64, **_TOKENS},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 3, "n_head": 4},
    "opt": {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64, **_TOKENS,
    },
    # mixtures of experts: stored expert by expert, or (gpt_oss, llama4) stacked
    "mixtral": {**_DECODER, **_LOCAL_EXPERTS},
    "olmoe": {**_DECODER, **_EXPERTS},
    "qwen2_moe": {**_DECODER, **_EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_WIDE_HEADS, **_EXPERTS, "moe_intermediate_size": 32},
    "gpt_oss": {**_WIDE_HEADS, **_LOCAL_EXPERTS},
    "llama4_text": {
        **_WIDE_HEADS, "num_local_experts": 2, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1,
    },
    "deepseek_v3": {
        **_DECODER, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
        "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    },
    # state spaces, linear attention, and mixtures of layers
    "mamba": _STATE_SPACE,
    "mamba2": {**_STATE_SPACE, "num_heads": 8, "head_dim": 16, "n_groups": 1},
    "jamba": {
        **_FOUR_LAYERS, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {
        **_FOUR_LAYERS, **_EXPERTS, "head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    # encoders
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "modernbert": _ENCODER,
    "distilbert": {
        "vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": 96, "n_layers": 3, "n_heads": 4,
        "max_position_embeddings": 64,
    },
    # encoders with decoders
    "t5": {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2,
        "num_heads": 4, "decoder_start_token_id": 0,
    },
    "bart": {
        **_SEQ2SEQ, "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 3, "decoder_layers": 2,
        "max_position_embeddings": 64,
    },
    "whisper": {
        **_SEQ2SEQ, "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
        "max_source_positions": 30, "max_target_positions": 32, "num_mel_bins": 8, "decoder_start_token_id": 1,
        **_TOKENS,
    },
    # images
    "vit": {**_VISION, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    "swin": {
        "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4,
    },
    # images and text
    "clip": {
        "text_config": {**_ENCODER, "max_position_embeddings": 32}, "vision_config": _VISION, "projection_dim": 16,
    },
    "gemma3": {
        "text_config": _WIDE_HEADS, "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 100,
        "boi_token_index": 101, "eoi_token_index": 102,
    },
    "llava": {
        "text_config": {"model_type": "llama", **_DECODER}, "image_token_index": 100,
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
    },
}  # fmt: skip

# Those that are no causal language models.
_AUTO_CLASSES = {
    "bert": "AutoModelForMaskedLM", "roberta": "AutoModelForMaskedLM", "modernbert": "AutoModelForMaskedLM",
    "distilbert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM", "bart": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq", "vit": "AutoModelForImageClassification",
    "swin": "AutoModelForImageClassification", "clip": "AutoModel", "gemma3": "AutoModelForImageTextToText",
    "llava": "AutoModelForImageTextToText",
}  # fmt: skip


def auto_class(name: str) -> Any:
    """The Auto class that users load the architecture with."""
    return getattr(transformers, _AUTO_CLASSES.get(name, "AutoModelForCausalLM"))


def build(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of the architecture with random weights; `changes` go into its config."""
    arguments: dict[str, Any] = {**ARCHITECTURES[name], **changes}
    torch.manual_seed(seed)
    return auto_class(name).from_config(AutoConfig.for_model(name, **arguments)).eval()


@torch.no_grad()
def finetune(model: nn.Module, seed: int, scale: float = 0.01) -> None:
    """Shift every weight of a model a little, as a training run would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise: Tensor = torch.randn(parameter.shape, generator=generator)
        parameter += scale * noise.to(parameter.dtype)


def load_whole(name: str, folder: Path) -> PreTrainedModel:
    """Load a model as users do, and assert that its files have every weight, no other, and give no cause to warn."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        model, report = auto_class(name).from_pretrained(folder, output_loading_info=True)
    finally:
        logger.removeHandler(handler)
    assert not any(report.values()), report
    assert not heard, heard
    return model.eval()
