"""Measures of whole tensors, or of the whole model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np

from ctl_merge.deferred import torch
from ctl_merge.plan import Plan, TensorPlan
from ctl_merge.processes import ALONE, Ranks, deal
from ctl_merge.sums import State, total

Results = dict[str, Any]  # tensors or arrays, by the measure's name


class Measured(Protocol):
    """A merge whose tensors are measured."""

    plan: Plan

    def columns(self, plan: TensorPlan) -> Mapping[str, Any]: ...
    def accumulate(self, plan: TensorPlan, name: str, results: Results) -> State: ...


class Measures:
    """The results of a method's measures, such as a threshold or a norm: all that a merge keeps of its inputs.

    Each measure is a state that adds up over pieces of the inputs, and a result that is concluded from it; later
    measures may ask for the results of earlier ones. Thread-safe.
    """

    def __init__(self, merge: Measured) -> None:
        self._merge, self._method = merge, merge.plan.method
        self._merged = [plan for plan in merge.plan.tensors.values() if plan.operation == "merge"]
        self._of_model: Results = {}
        self._of_tensor: dict[str, Results] = {}
        self._lock = threading.RLock()

    def of(self, plan: TensorPlan) -> Results:
        """The results for one tensor, those of the whole model included; measured where they are not known."""
        scopes = self._method.scopes(plan.parameters)
        if not scopes or not plan.spec.numel:
            return {}
        if any(scope == "model" and name not in self._of_model for name, scope in scopes.items()):
            self.take()
        if plan.name not in self._of_tensor:
            results = dict(self._of_model)
            for name in (n for n, scope in scopes.items() if scope == "tensor"):
                state = self._merge.accumulate(plan, name, results)
                results[name] = self._conclude(plan, name, state, plan.spec.numel, results)
            self._of_tensor[plan.name] = results
        return self._of_tensor[plan.name]

    def all(self) -> dict[str, Results]:
        """The results for every merged tensor."""
        return {plan.name: self.of(plan) for plan in self._merged}

    def take(
        self, each: Callable[[Callable[[TensorPlan], State], Iterable[TensorPlan]], Iterable[State]] = map,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        """Take the measures that run over the whole model; `each` maps over tensors, in order, maybe in parallel.

        Ranks share the tensors, and all come to the same results. Done on the first read if it was not called before.
        """
        with self._lock:
            merged = [plan for plan in self._merged if plan.spec.numel]
            if not merged:
                return
            scopes = self._method.scopes(merged[0].parameters)
            numel = sum(plan.spec.numel for plan in merged)
            owners = deal([plan.spec.numel for plan in merged], ranks.count)
            own = [index for index, owner in enumerate(owners) if owner == ranks.index]
            for name in (n for n, scope in scopes.items() if scope == "model" and n not in self._of_model):
                accumulate = partial(self._merge.accumulate, name=name, results=dict(self._of_model))
                state = total(zip(own, each(accumulate, [merged[index] for index in own]), strict=True), ranks)
                self._of_model[name] = self._conclude(merged[0], name, state, numel, dict(self._of_model))

    def known(self) -> dict[str, Results]:
        """The results so far by tensor; those of the whole model under ""."""
        return {"": self._of_model, **self._of_tensor}

    def recall(self, known: Mapping[str, Results]) -> None:
        """Take results that were known before, or to another process, for one's own."""
        self._of_model |= known.get("", {})
        self._of_tensor |= {name: results for name, results in known.items() if name}

    @property
    def passes(self) -> int:
        """How many times all inputs are read before the merge itself."""
        return list(self._method.scopes(self._merged[0].parameters).values()).count("model") if self._merged else 0

    @property
    def passes_left(self) -> int:
        """As `passes`, without those whose results are known."""
        return self.passes - len(self._of_model)

    def _conclude(self, plan: TensorPlan, name: str, state: State, numel: int, results: Results) -> State:
        arguments = {**self._merge.columns(plan), **results}
        if not isinstance(state, np.ndarray):
            arguments = tensors(arguments)
        with np.errstate(all="ignore"):  # what is let through may be NaN or infinite, and torch says nothing either
            found = self._method.measures[name].conclude(state, numel, **arguments)
        return np.asarray(found) if isinstance(found, np.generic) else found


def tensors(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with tensors for arrays, over the same memory."""
    return {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
