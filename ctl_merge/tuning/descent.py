"""Coefficients by descent on the loss itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ctl_merge.deferred import torch
from ctl_merge.tuning.adjustable import Adjustable, Texts

Array = np.ndarray
_PASSES = 4  # of L-BFGS over the tuning texts between two looks at the validation texts
_PATIENCE = 2  # looks without a better loss
_GAIN = 1e-4  # nats per token: less is not better


@dataclass(frozen=True)
class Bounds:
    """Between which coefficients stay."""

    least: float = -np.inf
    most: float = np.inf

    def clip(self, coefficients: Array) -> Array:
        return np.clip(coefficients, self.least, self.most)


@dataclass
class Found:
    """Coefficients (groups, parents) for the groups of a level, their validation loss, and how they came about."""

    how: str
    level: str
    groups: list[str]
    coefficients: Array
    validation: float
    path: list[dict[str, float]] = field(default_factory=list)


def descend(
    model: Adjustable, level: str, start: Mapping[str, Sequence[float]], tuning: Texts, validation: Texts,
    bounds: Bounds, *, steps: int = 10, told: Callable[[int], object] = lambda count: None,
) -> Found:  # fmt: skip
    """L-BFGS on the coefficients of a level, from those that `start` has for each tensor.

    The loss is the tuning texts'; what is kept is where the validation texts' was least, and the search ends when that
    has not improved for a while. So the validation texts decide how far the coefficients go.
    """
    listed, place = model.places(level)
    c = torch.from_numpy(bounds.clip(_started(model, start, listed, place))).requires_grad_(True)
    search = torch.optim.LBFGS([c], max_iter=_PASSES, max_eval=2 * _PASSES, history_size=20,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def slope() -> float:
        model.set(c.detach().numpy(), place)
        loss, gradient = model.slope(tuning, place, len(listed))
        c.grad = torch.from_numpy(gradient)
        return loss

    best, waited, path = Found("descent", level, listed, c.detach().numpy().copy(), np.inf), 0, []
    for step in range(steps + 1):
        own = c.detach().numpy().copy()
        model.set(own, place)
        now = model.loss(validation)
        path.append({"step": step, "validation": now})
        waited = 0 if now < best.validation - _GAIN else waited + 1
        if now < best.validation:
            best = Found("descent", level, listed, own, now)
        if step == steps or waited >= _PATIENCE:
            break
        path[-1]["tuning"] = float(search.step(slope))  # type: ignore[arg-type]
        with torch.no_grad():
            c.clamp_(bounds.least, bounds.most)
        told(1)
    best.path = path
    return best


def _started(
    model: Adjustable, start: Mapping[str, Sequence[float]], listed: Sequence[str], place: Mapping[str, int]
) -> Array:
    """The mean over each group's tensors of what they start with."""
    sums, counts = np.zeros((len(listed), len(model.parents))), np.zeros((len(listed), 1))
    for name, own in model.sources.items():
        for tensor in own:
            sums[place[name]] += start[tensor]
            counts[place[name]] += 1
    return sums / counts
