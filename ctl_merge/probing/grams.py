"""Inner products of features: all that the metrics need.

At a site (the output of a block, or of its attention or MLP) the features of M sources form a Gram matrix for each
sequence and stratum of tokens, summed over tokens in float64: a few KB instead of every feature map of every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ctl_merge.deferred import Tensor, torch

# Dimensions that the robust variant leaves out: those in which the base's features of the first sequence are largest.
MASSIVE = 8


@dataclass
class SiteGrams:
    """The statistics of one site. N sequences, S strata, M sources, P pairs of combinations.

    gram, robust (N, S, M, M): inner products over all dimensions, and without the massive ones (listed in `massive`).
    cosines (N, S, P): per-token cosines summed over tokens. tokens (N, S).
    """

    sources: list[str]
    massive: list[int] = field(default_factory=list)
    gram: list[Tensor] = field(default_factory=list)
    robust: list[Tensor] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)

    def add(self, features: Tensor, strata: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take in one batch.

        features (M, B, T, H), the base first; strata (B, S, T) bool: which tokens count; pairs of coefficient vectors
        (M,) between whose combinations of the sources the per-token cosine is taken.
        """
        if not self.massive:
            counted = strata[0].any(0)  # of one sequence, so that the batch size changes nothing
            squares = features[0, 0, counted].double().square().mean(0)
            self.massive = squares.topk(min(MASSIVE, len(squares))).indices.sort().values.tolist()
        for sequence, masks in zip(features.transpose(0, 1), strata, strict=True):
            by_token = sequence.double().transpose(0, 1)  # (T, M, H)
            tokens = by_token @ by_token.transpose(1, 2)  # (T, M, M)
            few = by_token[..., self.massive]
            counted = masks.to(tokens)
            self.gram.append(torch.einsum("st,tmn->smn", counted, tokens).cpu())
            self.robust.append(torch.einsum("st,tmn->smn", counted, tokens - few @ few.transpose(1, 2)).cpu())
            self.cosines.append(torch.stack([counted @ _cosine(tokens, a, b) for a, b in pairs], dim=1).cpu())
            self.tokens.append(counted.sum(1).cpu())


def _cosine(gram: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """cos of the combinations a and b of the sources, from their Gram: gram (T, M, M), a and b (M,) -> (T,)."""
    a, b = a.to(gram), b.to(gram)
    product, left, right = (torch.einsum("m,tmn,n->t", x, gram, y) for x, y in ((a, b), (a, a), (b, b)))
    return product / (left * right).clamp_min(1e-300).sqrt()


@dataclass
class Grams:
    """The statistics of one data set: every site's, and the number of tokens in each sequence and stratum (N, S)."""

    strata: list[str]
    sites: dict[str, SiteGrams] = field(default_factory=dict)
    tokens: list[Tensor] = field(default_factory=list)

    def present(self) -> dict[str, int]:
        """The strata that have tokens, and how many."""
        counts = torch.stack(self.tokens).sum(0).int().tolist()
        return {name: count for name, count in zip(self.strata, counts, strict=True) if count}
