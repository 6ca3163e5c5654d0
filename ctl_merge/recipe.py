"""What a recipe is: models, method, settings, slices, steps.

A mergekit config is a recipe: same keys, defaults and meaning. Our own keys (`seed`, `missing`, `nonfinite`) are
additions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from ctl_merge.methods import Method
from ctl_merge.mixture import Mixture
from ctl_merge.probing.rows import DataSpec
from ctl_merge.recipe_schema import DataSchema, Dtype, LoraSchema, ProbeSchema
from ctl_merge.recipe_tokenizer import TokenizerSetting
from ctl_merge.reference import ModelRef
from ctl_merge.settings import Setting


@dataclass(frozen=True)
class Source:
    """A model of the recipe with its own parameters; `layers` [first, end) of it, None for the whole model."""

    ref: ModelRef
    settings: Mapping[str, Setting] = field(default_factory=dict)
    layers: tuple[int, int] | None = None
    texts: tuple[DataSpec, ...] = ()


@dataclass(frozen=True)
class Slice:
    """A merge of its own within a recipe: a run of layers, or a module, or both.

    models, base: as the recipe's, for this slice; `module` is the part of the model, None for all of it.
    """

    models: tuple[Source, ...]
    base: Source | None
    settings: Mapping[str, Setting]  # the slice's own, then the module's, then the recipe's
    module: str | None = None

    @property
    def layers(self) -> int | None:
        """How many layers of the output it makes; None where it takes whole models."""
        span = self.models[0].layers
        return span and span[1] - span[0]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: what is merged into what, how. `text` is the file verbatim.

    `slices`: merges of their own, of which the output is made up; none where whole models are merged. `models` are
    then all models that go into them.
    """

    method: Method
    models: tuple[Source, ...]  # inputs in the recipe's order; the base is among them where it is an input
    base: ModelRef | None
    settings: Mapping[str, Setting]
    dtype: Dtype | None
    tokenizer: TokenizerSetting
    seed: int
    missing: Literal["error", "base", "skip"]
    allow_nonfinite: bool
    probe: ProbeSchema | None
    data: DataSchema | None  # where the method measures the models on text
    text: str
    name: str
    warnings: tuple[str, ...] = ()
    texts: tuple[DataSpec, ...] = ()  # for models without any of their own
    slices: tuple[Slice, ...] = ()
    steps: Mapping[str, Recipe] = field(default_factory=dict)  # earlier documents of the file, by name
    onlookers: tuple[ModelRef, ...] = ()  # among the models, and without a say in the vocabulary
    mixture: Mixture | None = None  # the models side by side, instead of merged
    place: Path | None = None  # the file's folder, where relative paths are looked for too
    lora: LoraSchema | None = None  # an adapter is written instead of a model

    @cached_property
    def refs(self) -> tuple[ModelRef, ...]:
        """Every distinct model that is read: the one that gives config and tokenizer first."""
        first = self.base or self.models[0].ref
        bases = (part.base.ref for part in self.slices if part.base)
        return tuple(dict.fromkeys((first, *(source.ref for source in self.models), *bases)))
