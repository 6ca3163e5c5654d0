"""Coefficients as a recipe with explicit numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ctl_merge.document import Document
from ctl_merge.errors import RecipeError
from ctl_merge.recipe import Recipe
from ctl_merge.reference import ModelRef

# What of the recipe that is tuned holds for whatever is made of its models.
_KEPT = (
    "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "seed", "missing", "nonfinite",
)  # fmt: skip
_DIGITS = 4


class Writer:
    """Writes recipes for the models of another recipe.

    `base`: the model that the parents come from; `start`: the folder from which relative paths are written.
    """

    def __init__(self, recipe: Recipe, base: ModelRef, parents: Sequence[ModelRef], start: Path) -> None:
        if recipe.slices or recipe.steps or recipe.mixture is not None:
            raise RecipeError(
                f"{recipe.name}: only a recipe of whole models in one document is tuned, not slices, modules, experts "
                "or several steps"
            )
        self.recipe, self.data = recipe, Document.parse(recipe.text, recipe.name)[-1].data
        self.kept = {key: self.data[key] for key in _KEPT if key in self.data}
        self.base, self.parents, self.start = base, list(parents), start

    def original(self) -> str:
        """The recipe as it is, its models named from `start`."""
        models = [
            {**{key: value for key, value in own.items() if key != "lora"}, "model": self.address(source.ref)}
            for own, source in zip(self.data["models"], self.recipe.models, strict=False)
        ]
        named = {"base_model": self.address(self.recipe.base)} if self.recipe.base else {}
        return yaml.safe_dump({**self.data, **named, "models": models}, sort_keys=False, allow_unicode=True)

    def method(self, method: str, own: Mapping[str, Any], shared: Mapping[str, Any] | None = None) -> str:
        """A recipe in which every parent has the same parameters."""
        return self.text(method, [dict(own) for _ in self.parents], shared)

    def text(
        self, method: str, own: Sequence[Mapping[str, Any]], shared: Mapping[str, Any] | None = None,
        extra: Sequence[Mapping[str, Any]] | None = None, account: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """A recipe with the parameters of each parent; `extra`: other keys of each model, such as its data."""
        lines = [f"# {line}".rstrip() for line in account]
        lines += [f"merge_method: {method}", f"base_model: {_quoted(self.address(self.base))}", "models:"]
        for i, (ref, parameters) in enumerate(zip(self.parents, own, strict=True)):
            lines.append(f"  - model: {_quoted(self.address(ref))}")
            lines += [
                f"    {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in (extra or [{}] * 99)[i].items()
            ]
            if parameters:
                lines.append("    parameters:")
            for name, value in parameters.items():
                lines += _parameter(name, value)
        if shared:
            lines.append(f"parameters: {json.dumps(shared)}")
        lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.kept.items()]
        return "\n".join(lines) + "\n"

    def coefficients(
        self, tensors: Mapping[str, Sequence[float]], level: Mapping[str, str], account: Sequence[str] = ()
    ) -> str:
        """Task arithmetic with these coefficients of each tensor (one for each parent), which its group shares."""
        of_group: dict[str, Sequence[float]] = {level[name]: own for name, own in tensors.items() if name in level}
        # A filter is a part of a name, and the first that matches counts.
        position = {group: i for i, group in enumerate(of_group)}
        ordered = sorted(of_group, key=lambda group: (_contained(group, of_group), position[group]))
        settings: list[dict[str, Any]] = []
        for i in range(len(self.parents)):
            values = {group: round(float(of_group[group][i]), _DIGITS) for group in ordered}
            mean = round(sum(values.values()) / len(values), _DIGITS)
            if set(values) == {""}:
                settings.append({"weight": values[""]})
            else:
                listed = [{"filter": group, "value": value} for group, value in values.items()]
                settings.append({"weight": [*listed, {"value": mean}]})
        return self.text("task_arithmetic", settings, account=account)

    def address(self, ref: ModelRef) -> str:
        """How a recipe in the folder `start` names a model: a folder that was named by a relative path, by another."""
        if ref.adapter is not None:
            return f"{self.address(ref.bare)}+{self.address(ref.adapter)}"
        if ref.folder is None:
            return ref.text
        absolute = Path(os.path.expanduser(ref.text)).is_absolute()
        return str(ref.folder) if absolute else os.path.relpath(ref.folder, self.start.resolve())


def _contained(group: str, others: Mapping[str, Any]) -> int:
    """How many other groups a group's filter would match by mistake: those come before it."""
    return sum(group != other and group in other for other in others)


def _parameter(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
        return [f"      {name}: {json.dumps(value)}"]
    lines = [f"      {name}:"]
    for item in value:
        chosen = f"filter: {json.dumps(item['filter'])}, " if "filter" in item else ""
        lines.append(f"        - {{{chosen}value: {json.dumps(item['value'])}}}")
    return lines


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
