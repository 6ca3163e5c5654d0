"""MetaGPT: task arithmetic with coefficients from norms."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ctl_merge.deferred import Tensor
from ctl_merge.methods.angles import energy, energy_shares
from ctl_merge.methods.combine import weighted_sum
from ctl_merge.methods.fused import Fused, summed
from ctl_merge.methods.parameters import Parameters
from ctl_merge.methods.registry import Measure, Scope, merge_method


def _whole_model(parameters: Parameters) -> Scope | None:
    return "model"


def _say_coefficients(results: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    found = next((result["coefficient"] for result in results.values() if result), None)
    return None if found is None else "coefficients: " + ", ".join(f"{float(share):.4g}" for share in found)


def _fused(*, coefficient: np.ndarray, **_: object) -> Fused:
    return summed(coefficient)


@merge_method(
    space="task_vectors",
    linear=True,
    measures={"coefficient": Measure(energy, energy_shares, _whole_model, compiled="energy")},
    report=_say_coefficients,
    fused=_fused,
    paper="2406.11385",
)
def metagpt(deltas: Tensor, *, coefficient: Tensor | None = None) -> Tensor:
    """Base plus Σ λ d with λ_i = ‖d_i‖² / Σ ‖d_j‖², the norms of whole task vectors.

    deltas (models, *shape) -> (*shape). `coefficient` (models,): λ, measured over the model, equal where all norms
    are zero; computed from `deltas` if missing. They minimise the bound on the models' mean loss difference of
    arXiv 2406.11385, to first order and for orthogonal task vectors.
    """
    if coefficient is None:
        coefficient = energy_shares(energy(deltas), deltas[0].numel())
    return weighted_sum(deltas, coefficient)
