"""Merges that tuning must beat, each best of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctl_merge.evaluating.likelihood import Predictions, losses
from ctl_merge.evaluating.passages import Passage
from ctl_merge.merging import Merge
from ctl_merge.model import load_weights
from ctl_merge.probing.run import Running
from ctl_merge.recipe_file import parse_recipe
from ctl_merge.tuning.adjustable import Adjustable, Texts
from ctl_merge.tuning.written import Writer

UNIFORM = "task arithmetic"
LAMBDAS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
TIES = [(density, scale) for density in (0.3, 0.6, 0.9) for scale in (0.4, 0.6, 0.8, 1.0)]


@dataclass(frozen=True)
class Rival:
    """A merge by its recipe's text, and what was chosen of it in words."""

    name: str
    text: str
    chosen: str = ""


@dataclass(frozen=True)
class Trier:
    """Measures lazy merges: recipes as text, relative to `folder`."""

    running: Running
    folder: Path

    def open(self, text: str, name: str = "recipe") -> Merge:
        opened = Merge(parse_recipe(text, name, self.folder))
        opened.fetch()
        return opened

    def predictions(self, checkpoint: Any, texts: Texts) -> dict[str, Predictions]:
        """How a checkpoint predicts each text; it is not written."""
        running = self.running
        model = load_weights(checkpoint, running.placement, blocks=running.blocks,
                             trust_remote_code=running.trust_remote_code)  # fmt: skip
        return {name: losses(model, own, running.batch, running.placement.device) for name, own in texts.items()}

    def loss(self, text: str, texts: Texts) -> float:
        """Mean over the texts of a recipe's loss in nats per token."""
        found = self.predictions(self.open(text).merged, texts).values()
        return float(np.mean([sum(each.nll) / sum(each.tokens) for each in found]))


def best_uniform(model: Adjustable, texts: Texts) -> tuple[float, dict[float, float]]:
    """The λ of task arithmetic with the least loss, to within 0.025, and the loss at each λ that was tried."""
    _, place = model.places("model")
    tried: dict[float, float] = {}

    def at(value: float) -> float:
        if value not in tried:
            model.set(np.full((1, len(model.parents)), value), place)
            tried[value] = model.loss(texts)
        return tried[value]

    best = min(LAMBDAS, key=at)
    for step in (0.1, 0.05, 0.025):
        best = min((round(best + way * step, 4) for way in (-1, 0, 1)), key=at)
    return best, tried


def rivals(
    writer: Writer, uniform: float, recipe: tuple[str, str], trier: Trier, texts: Texts,
    told: Callable[[int], object] = lambda count: None,
) -> Iterator[Rival]:  # fmt: skip
    """The average, task arithmetic at its best λ, TIES at its best density and λ, and the recipe as it is.

    What is chosen is chosen on `texts`, which are not those that everything is compared on.
    """
    count = len(writer.parents)
    yield Rival("average", writer.method("task_arithmetic", {"weight": round(1 / count, 6)}))
    yield Rival(UNIFORM, writer.method("task_arithmetic", {"weight": uniform}), f"λ = {uniform:g}")
    ties = {
        f"density {density:g}, λ = {scale:g}":
            writer.method("ties", {"weight": 1.0, "density": density}, {"lambda": scale})
        for density, scale in TIES
    }  # fmt: skip
    yield best_of("ties", ties, trier, texts, told)
    yield Rival(*recipe)


def best_of(
    name: str,
    choices: Mapping[str, str],
    trier: Trier,
    texts: Texts,
    told: Callable[[int], object] = lambda count: None,
) -> Rival:
    """The choice of the least loss."""
    found: dict[str, float] = {}
    for label, text in choices.items():
        found[label] = trier.loss(text, texts) if len(choices) > 1 else 0.0
        told(1)
    best = min(found, key=lambda label: found[label])
    return Rival(name, choices[best], best)


def joined(*parts: Mapping[str, Sequence[Passage]]) -> dict[str, list[Passage]]:
    """The same texts' windows of several parts together."""
    return {name: [passage for part in parts for passage in part[name]] for name in parts[0]}
