"""Order statistics of tensors, counted by compiled loops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ctl_merge.methods.registry import Method
from ctl_merge.plan import TensorPlan

# Entries of a tensor that are read at once. The loops cut them up themselves; larger pieces than elsewhere, as reading
# and calling would else take longer than the arithmetic.
LOOP_CHUNK = 1 << 19
# From so many entries on a bin is foretold, by so many pieces of them; below, looking at these takes too large a share.
_LARGE, _PIECES = 1 << 22, 128
_NEAR = 3  # bins that are counted for each that is foretold: it, and both its neighbours

Raw = tuple[np.ndarray, np.ndarray]  # as `ctl_merge.methods.kernels` has it
Columns = Callable[[TensorPlan], Mapping[str, Any]]
Stored = Callable[[TensorPlan, int, int], Raw]
Refuse = Callable[[TensorPlan, int, int], object]


def counting_bytes(method: Method, models: int) -> int:
    """What a thread holds to count along with what is foretold, at most."""
    ranks = sum(measure.state[0] for measure in method.measures.values() if measure.compiled == "count_lower")
    return 8 * models * ranks * ((_NEAR + 1) << 16)


class Counting:
    """The two counts of `ctl_merge.methods.order` over a tensor's task vectors: of upper, then of lower halves.

    The second is of the bins that the first one finds. Where a tensor has cuts of its own they are foretold by the
    same search in a sample, and the lower halves within them and their neighbours counted along with the upper ones: a
    tensor's inputs are then read once for its cuts. A bin that was not foretold takes another pass, and is none the
    worse. Thread-safe. `stored(tensor, start, count)` gives the inputs; for the rest see `CompiledLoops`.
    """

    def __init__(self, kernels: Any, method: Method, columns: Columns, stored: Stored, refuse: Refuse) -> None:
        self._kernels, self._method, self._columns = kernels, method, columns
        self._stored, self._refuse = stored, refuse
        self._held = threading.local()

    def state(self, plan: TensorPlan, name: str, results: Mapping[str, Any]) -> np.ndarray:
        """The counts over a whole tensor, for one of the method's measures; `results` of those before it."""
        if self._method.measures[name].compiled == "count_upper":
            return self._upper(plan, name)
        return self._lower(plan, name, np.asarray(results[f"{name}_bin"])[..., 0])

    def _upper(self, plan: TensorPlan, name: str) -> np.ndarray:
        models = len(plan.inputs)
        upper = self._method.measures[name].zeros(models)
        alone = self._method.scopes(plan.parameters)[name] == "tensor"
        first = self._foretold(plan, name) if alone and plan.spec.numel >= _LARGE else np.zeros((models, 0), np.int64)
        lower = np.zeros((*first.shape, _NEAR, 1 << 16), np.int64)
        for start, count in pieces(plan):
            self._count(plan, start, count, first, upper, lower)
        self._held.foretold = (plan, first, lower)
        return upper

    def _lower(self, plan: TensorPlan, name: str, bins: np.ndarray) -> np.ndarray:
        foretold, first, lower = self._held.__dict__.pop("foretold", (None, None, None))
        if foretold is plan and first.shape == bins.shape:
            place = bins - first
            if ((place >= 0) & (place < _NEAR)).all():
                return np.take_along_axis(lower, place[..., None, None], axis=2)[:, :, 0]
        state = self._method.measures[name].zeros(len(plan.inputs))
        with_base, keys = plan.base is not None, self._keys()
        for start, count in pieces(plan):
            if self._kernels.count_lower(self._stored(plan, start, count), with_base, count, keys, bins, state):
                self._refuse(plan, start, count)
        return state

    def _foretold(self, plan: TensorPlan, name: str) -> np.ndarray:
        """The first of the bins to be counted for each rank that is asked for: (models, ranks)."""
        measure, block, models = self._method.measures[name], self._kernels.BLOCK, len(plan.inputs)
        sample, none = measure.zeros(models), np.zeros((models, 0), np.int64)
        nowhere = np.zeros((models, 0, _NEAR, 1 << 16), np.int64)
        for piece in range(_PIECES):
            start = piece * (plan.spec.numel - block) // (_PIECES - 1)
            self._count(plan, start, block, none, sample, nowhere)
        bins = measure.conclude(sample, _PIECES * block, **self._columns(plan))
        return np.maximum(np.asarray(bins)[..., 0] - _NEAR // 2, 0)

    def _count(
        self, plan: TensorPlan, start: int, count: int, first: np.ndarray, upper: np.ndarray, lower: np.ndarray
    ) -> None:
        raw, with_base = self._stored(plan, start, count), plan.base is not None
        if self._kernels.count_upper(raw, with_base, count, self._keys(), upper, first, lower):
            self._refuse(plan, start, count)

    def _keys(self) -> np.ndarray:
        """This thread's memory for a block's keys, twice."""
        keys = getattr(self._held, "keys", None)
        if keys is None:
            keys = self._held.keys = np.empty((2, self._kernels.BLOCK), np.uint32)
        return keys


def pieces(plan: TensorPlan) -> list[tuple[int, int]]:
    """What is read at once of a tensor: starts and numbers of entries."""
    return [(start, min(LOOP_CHUNK, plan.spec.numel - start)) for start in range(0, plan.spec.numel, LOOP_CHUNK)]
