"""Averaging by how much each model's loss feels each weight."""

from __future__ import annotations

from ctl_merge.deferred import Tensor
from ctl_merge.methods.combine import dividing, weighted_mean
from ctl_merge.methods.parameters import PerModel, Weight, column
from ctl_merge.methods.registry import merge_method


@merge_method(space="weights", statistic="fisher", check=dividing, paper="2111.09832")
def fisher(tensors: Tensor, *, weight: PerModel[Weight] = 1.0, fisher: Tensor | None = None) -> Tensor:
    """Average each weight by its Fisher information: Σ w F θ / Σ w F.

    tensors, fisher (models, *shape) -> (*shape). F is the mean over sequences of the squared gradient of the
    sequence's log-likelihood, on each model's own text (the empirical Fisher; the paper, Matena and Raffel 2022, draws
    labels from the model). Weights that no gradient reaches are averaged by `weight`.
    """
    average = weighted_mean(tensors, weight)
    if fisher is None:
        return average
    importance = fisher * column(weight, fisher)
    total = importance.sum(0)
    # As a correction of the average, which stays where all importances are zero.
    return average + ((tensors - average) * importance).sum(0) / total.masked_fill(total == 0, 1.0)
