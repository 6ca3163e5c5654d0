"""How a model reads a window of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ctl_merge.deferred import Tensor
from ctl_merge.errors import ProbeError


def forward(model: Any, ids: Tensor) -> tuple[Callable[[], Tensor], Tensor | None]:
    """How to run a model on ids (B, T), and the tokens that its logits predict (None: it predicts no next token).

    A window is the source and the target, half each, of an encoder-decoder.
    """
    check_text(model, ids.shape[1])
    config = model.config
    if config.is_encoder_decoder:
        half = ids.shape[1] // 2
        source, target = ids[:, :half], ids[:, half:]
        return (lambda: model(input_ids=source, decoder_input_ids=target).logits), target
    predicts = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    return (lambda: _logits(model(input_ids=ids))), ids if predicts else None


def context(model: Any) -> int | None:
    """The most tokens that the model takes, where its config says so."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 1 else None


def check_text(model: Any, length: int) -> None:
    """Refuse windows that the model does not read. Raises ProbeError."""
    if model.main_input_name != "input_ids":
        raise ProbeError(f"{type(model).__name__} does not read text: it reads {model.main_input_name}")
    limit = context(model)
    if limit is not None and length > limit:
        raise ProbeError(f"windows of {length} tokens exceed the context of {limit}: use --length {limit}")


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]
