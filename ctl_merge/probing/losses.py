"""What a merge costs in loss, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ctl_merge.deferred import Tensor, torch
from ctl_merge.probing.metrics import interpolation


@dataclass
class Losses:
    """Sums over the predicted tokens of each sequence, (N,) each once it is stacked.

    nll: of every model. For each merge: `ensemble`, the nll of the logits that perfect linearity would give (the same
    affine combination of the parents' logits); `kl`, KL(merged ‖ ensemble); `agree`, how often their top tokens agree.
    """

    models: list[str]
    riders: list[str]
    nll: dict[str, list[float]] = field(default_factory=dict)
    ensemble: dict[str, list[float]] = field(default_factory=dict)
    kl: dict[str, list[float]] = field(default_factory=dict)
    agree: dict[str, list[float]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)

    def names(self, table: str) -> list[str]:
        """Whose rows a table has: of all models, or of the merges."""
        return self.models if table == "nll" else self.riders

    @property
    def count(self) -> int:
        """Sequences so far."""
        return len(self.tokens)

    def add(self, logits: Mapping[str, Tensor], ids: Tensor, coefficients: Sequence[np.ndarray], parents: int) -> None:
        """Take in one batch: logits (B, T, V) of every model, ids (B, T); the first `parents` models are base and
        parents."""
        for row, labels in enumerate(ids[:, 1:]):
            own = {name: tensor[row, :-1].double() for name, tensor in logits.items()}
            for name in self.models:
                self.nll.setdefault(name, []).append(_nll(own[name], labels))
            for name, c in zip(self.riders, coefficients, strict=True):
                shares = interpolation(c, parents)
                mixed = sum(share * own[model] for share, model in zip(shares, self.models, strict=False))
                self.ensemble.setdefault(name, []).append(_nll(mixed, labels))
                merged, ensemble = own[name].log_softmax(-1), mixed.log_softmax(-1)
                self.kl.setdefault(name, []).append(float((merged.exp() * (merged - ensemble)).sum()))
                self.agree.setdefault(name, []).append(float((merged.argmax(-1) == ensemble.argmax(-1)).sum()))
            self.tokens.append(len(labels))


def _nll(logits: Tensor, labels: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
