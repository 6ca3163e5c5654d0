"""What a merge costs in loss, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ctl_merge.probing.intervals import Draws
from ctl_merge.probing.losses import Losses
from ctl_merge.probing.observer import BASE

Array = np.ndarray
LOGITS = "logits"  # the last site that is blamed: all that comes after the last block


def loss_report(
    losses: Losses, parents: Sequence[str], merges: Sequence[str], patches: Mapping[str, Mapping[str, str]],
    draws: Draws,
) -> dict[str, Any]:  # fmt: skip
    """Nats per token with 95 % intervals over sequences, paired, and what a merge's loss is made of.

    L(merged) - L_i = [L(merged) - L(ensemble)] + [L(ensemble) - L_i]: non-linearity cost and dilution cost.
    `patches`: for each merge, the model that is patched at a site.
    """
    tokens = draws.sums(np.array(losses.tokens))

    def drawn(sums: Sequence[float]) -> Array:
        return draws.sums(np.array(sums)) / tokens

    nll = {name: drawn(sums) for name, sums in losses.nll.items()}
    best = _ranked(nll, parents)[:1]
    found = {}
    for name in merges:
        ensemble, interval = drawn(losses.ensemble[name]), draws.interval
        gains = {site: nll[name] - nll[model] for site, model in patches.get(name, {}).items()}
        found[name] = {
            "ensemble": interval(ensemble), "nonlinearity_cost": interval(nll[name] - ensemble),
            "dilution_cost": {p: interval(ensemble - nll[p]) for p in parents},
            "against_first": interval(nll[name] - nll[merges[0]]) if name != merges[0] else None,
            "against_base": interval(nll[name] - nll[BASE]),
            "against_best_parent": {"parent": best[0], **interval(nll[name] - nll[best[0]])} if best else None,
            "kl": interval(drawn(losses.kl[name])), "agreement": interval(drawn(losses.agree[name])),
            "patch": {site: interval(gain) for site, gain in gains.items()},
            "blame": {site: interval(own) for site, own in blame(gains, nll[name] - ensemble).items()},
        }  # fmt: skip
    return {"nll": {name: draws.interval(nll[name]) for name in (BASE, *parents, *merges)}, "merges": found}


def best_parent(losses: Losses, parents: Sequence[str], draws: Draws) -> dict[str, Any] | None:
    """The parent that a data set belongs to: that of the lowest loss on it; None without losses of parents.

    `margin`: by how much the second best loses more, None where there is no second. An interval above 0 leaves no
    doubt.
    """
    tokens = draws.sums(np.array(losses.tokens))
    nll = {name: draws.sums(np.array(losses.nll[name])) / tokens for name in parents}
    best, second = (*_ranked(nll, parents)[:2], None, None)[:2]
    if best is None:
        return None
    margin = draws.interval(nll[second] - nll[best]) if second else None
    return {"parent": best, "second": second, "margin": margin}


def blame(gains: Mapping[str, Array], cost: Array) -> dict[str, Array]:
    """Each block's own share of the non-linearity cost: how much more its patch gains than the one before it.

    A patch undoes all that has gone wrong up to its site, so successive differences are the blocks' own. After the
    last block come the final norm and the head; the patch there is the logit ensemble, whose gain is the whole `cost`.
    The shares of the last stack and of the logits add up to it; a stack before that one starts anew from the merge.
    Where a merge is not linear in the weights, sites differ in its effective coefficients, and that is in the shares.
    """
    found: dict[str, Array] = {}
    last: dict[str, Array] = {}
    for site, gain in gains.items():
        stack = site.rpartition(".")[0]
        found[site] = gain - last.get(stack, np.zeros_like(gain))
        last[stack] = gain
    return found | {LOGITS: cost - gain} if gains else {}


def _ranked(nll: Mapping[str, Array], parents: Iterable[str]) -> list[str]:
    key: Callable[[str], float] = lambda parent: nll[parent][0]  # noqa: E731
    return sorted(parents, key=key)
