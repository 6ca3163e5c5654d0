"""Losses of checkpoints on texts, one model after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.errors import ProbeError
from ctl_merge.model import load_weights
from ctl_merge.probing.data import TokenSet
from ctl_merge.probing.forward import forward
from ctl_merge.probing.run import Running


@torch.inference_mode()
def text_losses(
    checkpoints: Mapping[str, Checkpoint], sets: Sequence[TokenSet], running: Running
) -> dict[str, dict[str, float]]:
    """Mean cross-entropy in nats of a predicted token: by data set, then by checkpoint.

    Weights are rounded to each checkpoint's dtype, as a reader of its files sees them. Raises ProbeError where a model
    predicts no next token.
    """
    found: dict[str, dict[str, float]] = {tokens.name: {} for tokens in sets}
    for name, checkpoint in checkpoints.items():
        model = load_weights(
            checkpoint, running.placement, as_written=True, blocks=running.blocks,
            trust_remote_code=running.trust_remote_code,
        )  # fmt: skip
        for tokens in sets:
            total, count = 0.0, 0
            for ids in tokens.ids.split(running.batch):
                run, labels = forward(model, ids)
                if labels is None:
                    raise ProbeError(f"{checkpoint.name} predicts no next token, so that no text has a loss")
                logits, wanted = run()[:, :-1].double(), labels[:, 1:]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
                total += float(loss)
                count += wanted.numel()
            found[tokens.name][name] = total / count
    return found
