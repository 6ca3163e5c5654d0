"""Random configurations: a method's parameters over the forms in which YAML may give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import yaml

from differential.families import TORCH, Family
from differential.methods import METHODS, REQUIRED, Knob, Spec

FILTERS = ("self_attn", "mlp", "q_proj", "layernorm", "norm", "embed_tokens", "lm_head", "layers.1.", "weight", "*")


@dataclass(frozen=True)
class Case:
    """One configuration over one family; models are named as the family names them."""

    method: str
    number: int
    family: Family
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.method}-{self.number:03d}"

    def text(self, **changes: Any) -> str:
        """The configuration as YAML, with the models' folders; a key that is changed to None is left out."""
        keys = {key: value for key, value in {**self.config, **changes}.items() if value is not None}
        return yaml.safe_dump(_located(keys, self.family), sort_keys=False)


def _located(value: Any, family: Family) -> Any:
    if isinstance(value, Mapping):
        places = ("model", "base_model", "path")
        return {
            key: family.path(inner) if key in places and isinstance(inner, str) else _located(inner, family)
            for key, inner in value.items()
        }
    return [_located(item, family) for item in value] if isinstance(value, list) else value


def generate(method: str, count: int, families: Sequence[Family], seed: int) -> list[Case]:
    """`count` configurations of a method, the same for the same seed."""
    return [Generator(method, number, families, seed).case() for number in range(count)]


class Generator:
    """Draws one configuration."""

    def __init__(self, method: str, number: int, families: Sequence[Family], seed: int) -> None:
        self.method, self.number, self.spec = method, number, METHODS[method]
        self.rng = Random(f"{seed} {method} {number}")
        # Masks are recomputed in plain integers: only small tensors have them in a moment.
        fitting = [f for f in families if not self.spec.random or "tied" in f.name or f.name == "real"]
        fitting = [f for f in fitting if self.spec.base == "origin" or not f.vocabularies_differ]
        self.family = self.rng.choice(fitting)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def case(self) -> Case:
        least, most = self.spec.models
        count = min(self.rng.randint(least, most), len(self.family.tunes))
        models = self.rng.sample(self.family.tunes, count)
        base = self.spec.base == "origin" or (self.spec.base in ("maybe", "input") and self.chance(0.5))
        config: dict[str, Any] = {"merge_method": self.method}
        if base:
            config["base_model"] = self.named(self.family.base)
        shared = self.shared()
        layout = self.rng.choices(("models", "slices", "modules"), (5, 4, 1))[0]
        if layout == "models":
            config["models"] = self.models(models, base, shared)
        elif layout == "slices" or self.family.vocabularies_differ:
            config["slices"] = self.slices(models, base, shared)
        else:
            inner: dict[str, Any] = {"slices": self.slices(models, base, shared)}
            if self.chance(0.5):
                inner["parameters"] = self.settings(self.common())
            config["modules"] = {"default": {key: value for key, value in inner.items() if value}}
        if shared:
            config["parameters"] = shared
        return Case(self.method, self.number, self.family, {**config, **self.dtypes(), **self.vocabulary()})

    # ---- models

    def named(self, model: str) -> Any:
        """A model, now and then in mergekit's long form."""
        path, _, adapter = model.partition("+")
        lora = {"lora": {"path": adapter}} if adapter else {}
        return {"model": {"path": path}, **lora} if self.chance(0.1) else model

    def source(self, model: str, shared: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.named(model)}
        given = {}
        for name, knob in self.own().items():
            covered = name in shared or knob.default is not REQUIRED
            if not covered or self.chance(0.6):
                given[name] = self.setting(knob, partial=covered)
        return {**found, "parameters": given} if given else found

    def listed(self, models: Sequence[str], base: bool, shared: Mapping[str, Any], must: bool) -> list[dict[str, Any]]:
        """The sources, and often, or where they must hold it, the base among them."""
        found = [self.source(model, shared) for model in models]
        ordinary = self.spec.base == "input"
        if base and (must or self.chance(0.3) or (ordinary and self.own())):
            own = self.source(self.family.base, shared) if ordinary else {"model": self.named(self.family.base)}
            found.insert(self.rng.randint(0, len(found)), own)
        return found

    def models(self, models: Sequence[str], base: bool, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
        return self.listed(models, base, shared, must=False)

    def slices(self, models: Sequence[str], base: bool, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Runs of layers, each from places of its own; as long as the model, longer or shorter."""
        found = []
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            length = self.rng.randint(1, self.family.depth)
            sources = self.listed(models, base, shared, must=True)
            together = self.chance(0.7)
            start = self.rng.randint(0, self.family.depth - length)
            for source in sources:
                first = start if together else self.rng.randint(0, self.family.depth - length)
                source["layer_range"] = [first, first + length]
            part: dict[str, Any] = {"sources": sources}
            if self.chance(0.4):
                part["parameters"] = self.settings(self.common())
            found.append({key: value for key, value in part.items() if value})
        return found

    # ---- parameters

    def own(self) -> dict[str, Knob]:
        return {name: knob for name, knob in self.spec.knobs.items() if knob.own}

    def common(self) -> dict[str, Knob]:
        return {name: knob for name, knob in self.spec.knobs.items() if not knob.own}

    def shared(self) -> dict[str, Any]:
        """The configuration's own parameters: shared ones, and what models that say nothing fall back on."""
        found = {}
        for name, knob in self.spec.knobs.items():
            if (knob.default is REQUIRED and not knob.own) or self.chance(0.3 if knob.own else 0.7):
                found[name] = self.setting(knob, partial=knob.default is not REQUIRED and self.chance(0.2))
        return found

    def settings(self, knobs: Mapping[str, Knob]) -> dict[str, Any]:
        return {name: self.setting(knob, partial=True) for name, knob in knobs.items() if self.chance(0.5)}

    def setting(self, knob: Knob, partial: bool) -> Any:
        """A scalar, a gradient, or choices by filter; `partial`: they need not match every tensor."""
        form = self.rng.choices(("scalar", "gradient", "choices", "choice"), (5, 2, 2, 1))[0]
        if form == "scalar" or (form == "choice" and not partial):
            return knob.draw(self.rng)
        if form == "gradient":
            return self.gradient(knob)
        names = self.rng.sample(FILTERS, self.rng.randint(1, 3))
        choices = [{"filter": name, "value": self.inner(knob)} for name in names]
        if form == "choice":
            return choices[0]
        return choices if partial and self.chance(0.4) else [*choices, {"value": self.inner(knob)}]

    def inner(self, knob: Knob) -> Any:
        return self.gradient(knob) if self.chance(0.3) else knob.draw(self.rng)

    def gradient(self, knob: Knob) -> Any:
        return knob.draw(self.rng) if knob.whole else [knob.draw(self.rng) for _ in range(self.rng.randint(2, 4))]

    # ---- the rest

    def dtypes(self) -> dict[str, str]:
        names = list(TORCH)
        forms: list[dict[str, str]] = [{"dtype": self.rng.choice(names)}, {"out_dtype": self.rng.choice(names)}]
        forms += [{"dtype": self.rng.choice(names), "out_dtype": self.rng.choice(names)}]
        if "mixed" in self.family.name:  # without `dtype` the tools take different ones: a behaviour of its own
            forms = [forms[0], forms[2]]
        else:
            forms += [{}]
        return self.rng.choice(forms)

    def vocabulary(self) -> dict[str, str]:
        return {"tokenizer_source": self.rng.choice(("base", "union"))} if self.family.vocabularies_differ else {}


def described(spec: Spec) -> str:
    """A method's parameters, those of each model with a star."""
    return ", ".join(f"{name}{'*' if knob.own else ''}" for name, knob in spec.knobs.items())
