"""Probing models that are in memory already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.header import TensorSpec
from ctl_merge.probing.data import STRATA
from ctl_merge.probing.observer import BASE, Rider, Subject
from ctl_merge.probing.report import ProbeReport, build_report
from ctl_merge.probing.run import Session
from ctl_merge.weights import task_grams

ALL_TOKENS = "input"


class LoadedCheckpoint(Checkpoint):
    """The parameters of a model in memory, under their module names."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.config = name, model.config.to_dict()
        self._parameters = {n: p.detach() for n, p in model.named_parameters()}
        self.tensors = {n: TensorSpec("F32", tuple(p.shape)) for n, p in self._parameters.items()}

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        out.copy_(self._parameters[tensor].reshape(-1)[start : start + out.numel()])


class observing:
    """A context in which models in memory are run in step, and observed.

    `base`, `parents` and `merges` are transformers models of one architecture, in eval mode and float32. On leaving
    they are as they were.

    >>> import ctl_merge, torch, transformers
    >>> load = transformers.AutoModelForCausalLM.from_pretrained
    >>> base, cycle, shift = (load(f"recipes/quickstart/{name}") for name in ("base", "cycle", "shift"))
    >>> merged = ctl_merge.load_model("recipes/quickstart/average.yaml")
    >>> with ctl_merge.observing(base, {"cycle": cycle, "shift": shift}, {"merged": merged}) as seen:
    ...     seen.run(torch.arange(3, 27).view(1, -1))
    ...     report = seen.report()
    >>> report.data["merges"][0]["explained_weight"] > 0.999
    True
    """

    def __init__(self, base: Any, parents: Mapping[str, Any], merges: Mapping[str, Any]) -> None:
        stored = {name: LoadedCheckpoint(name, model) for name, model in {BASE: base, **parents, **merges}.items()}
        own = {name: stored[name] for name in parents}
        made = {name: stored[name] for name in merges}
        weights = task_grams(stored[BASE], list(own.values()), list(made.values()))
        self._subject = Subject(stored[BASE], own, made, weights)
        self._riders = [Rider(name, checkpoint) for name, checkpoint in made.items()]
        self._session = Session(self._subject, self._riders, {BASE: base, **parents, **merges})

    def __enter__(self) -> observing:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.__exit__()

    def run(self, ids: Tensor) -> None:
        """Observe one batch of token ids (B, T), without padding."""
        strata = torch.zeros(len(ids), len(STRATA), ids.shape[1], dtype=torch.bool)
        strata[:, STRATA.index("first"), 0] = True  # there is no tokenizer to tell delimiters
        strata[:, STRATA.index("other"), 1:] = True
        self._session.run(ids, strata)

    def report(self) -> ProbeReport:
        """What was observed so far; observation then starts anew."""
        return build_report(self._subject, self._riders, {ALL_TOKENS: self._session.end()}, {"compute": "float32"})
