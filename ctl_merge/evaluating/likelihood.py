"""How models predict passages, several models side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import NonFiniteError, ProbeError
from ctl_merge.evaluating.batches import in_batches
from ctl_merge.evaluating.metrics import binned
from ctl_merge.evaluating.passages import Passage, padded
from ctl_merge.probing.forward import forward
from ctl_merge.processes import ALONE, Ranks


@dataclass
class Predictions:
    """Sums over the counted tokens of each passage, (N,) each; float64.

    nll: nats. bins: (N, 3, B), of tokens by the confidence of the top one, as `binned` has them.
    agree, kl: by another model, how often the top tokens are equal, and KL(other ‖ this one) in nats.
    """

    nll: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    bins: list[np.ndarray] = field(default_factory=list)
    agree: dict[str, list[float]] = field(default_factory=dict)
    kl: dict[str, list[float]] = field(default_factory=dict)

    def extend(self, other: Predictions) -> None:
        """Append further passages."""
        for each in fields(self):
            own, more = getattr(self, each.name), getattr(other, each.name)
            if isinstance(own, dict):
                for name, values in more.items():
                    own.setdefault(name, []).extend(values)
            else:
                own.extend(more)


def predict(
    models: Mapping[str, Any], passages: Sequence[Passage], batch: int = 8, *,
    agreement: Mapping[str, Sequence[str]] | None = None, calibration: bool = False, device: str = "cpu",
    told: Callable[[int], object] = lambda count: None, ranks: Ranks = ALONE,
) -> dict[str, Predictions]:  # fmt: skip
    """Run models over passages, all on the same batches. `agreement`: whom each model is compared with.

    `ranks` share the batches, and all of them are given the whole.
    Raises ProbeError for a model that predicts no next token, and for rows of an encoder-decoder; NonFiniteError for
    logits that are no numbers.
    """

    def one_batch(rows: list[int]) -> list[dict[str, Predictions]]:
        own = [passages[i] for i in rows]
        ids, counted = padded(own)
        uneven = len({len(passage.ids) for passage in own}) > 1
        logits = {name: _logits(name, model, ids.to(device), uneven) for name, model in models.items()}
        found: list[dict[str, Predictions]] = [{} for _ in own]
        for name, (scores, labels) in logits.items():
            others = {other: logits[other][0] for other in (agreement or {}).get(name, ())}
            mask = counted[:, -labels.shape[1] :].to(labels.device)
            for row, mine in enumerate(found):
                kept = mask[row, 1:]
                beside = {other: tensor[row, :-1][kept] for other, tensor in others.items()}
                mine[name] = _of(scores[row, :-1][kept], labels[row, 1:][kept], beside, calibration)
                if math.isnan(mine[name].nll[0]):
                    raise NonFiniteError(
                        f"{name or 'the model'} predicts no numbers (NaN): its weights hold such, or overflow"
                    )
        told(len(own) * ranks.count)
        return found

    each = in_batches([len(passage.ids) for passage in passages], batch, ranks, one_batch)
    found = {name: Predictions() for name in models}
    for passage in each:
        for name, predictions in passage.items():
            found[name].extend(predictions)
    return found


def losses(
    model: Any, passages: Sequence[Passage], batch: int = 8, device: str = "cpu", ranks: Ranks = ALONE
) -> Predictions:
    """The negative log-likelihood of each passage."""
    return predict({"": model}, passages, batch, device=device, ranks=ranks)[""]


def _logits(name: str, model: Any, ids: Tensor, uneven: bool) -> tuple[Tensor, Tensor]:
    if uneven and model.config.is_encoder_decoder:
        raise ProbeError(f"{name} is an encoder-decoder, for which rows are not evaluated: use windows of text")
    run, labels = forward(model, ids)
    if labels is None:
        raise ProbeError(f"{name} ({type(model).__name__}) predicts no next token, so that no text has a loss")
    with torch.inference_mode():
        return run(), labels


def _of(logits: Tensor, labels: Tensor, others: Mapping[str, Tensor], calibration: bool) -> Predictions:
    """One passage: logits (T, V) of the tokens that are counted, labels (T,)."""
    logits = logits.double()
    found = Predictions([float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))], [len(labels)])
    if calibration:
        confidence, top = logits.softmax(-1).max(-1)
        found.bins.append(binned(confidence.cpu().numpy(), (top == labels).cpu().numpy()))
    if others:
        mine = logits.log_softmax(-1)
        for name, other in others.items():
            theirs = other.to(logits.device).double().log_softmax(-1)
            found.agree.setdefault(name, []).append(float((mine.argmax(-1) == theirs.argmax(-1)).sum()))
            found.kl.setdefault(name, []).append(float((theirs.exp() * (theirs - mine)).sum()))
    return found
