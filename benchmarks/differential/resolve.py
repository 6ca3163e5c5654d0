"""What a configuration says of each tensor of the output: a second reading of the YAML that shares no code with ours.

Precedence: the source's parameters, the slice's, the module's, the configuration's, the default. A setting is a
scalar, a list (a gradient over the layers of the slice), `{value, filter}`, or a list of those of which the first whose
filter is part of the tensor's name counts; one that matches nothing leaves it to the next scope.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from differential.methods import REQUIRED, Spec

_NOTHING = object()
_STACK = "model.layers."


@dataclass(frozen=True)
class Job:
    """One tensor of the output: (model, tensor) of the base and the inputs, and the parameters.

    `own`: parameters of which every input has a value, `shared`: the others.
    """

    name: str
    base: tuple[str, str] | None
    inputs: tuple[tuple[str, str], ...]
    own: Mapping[str, tuple[Any, ...]]
    shared: Mapping[str, Any]


def output_dtype(config: Mapping[str, Any], stored: str) -> str:
    """The dtype in which the result is written."""
    return config.get("out_dtype") or config.get("dtype") or stored


def resolve(
    config: Mapping[str, Any], spec: Spec, names: Sequence[str], depth: int
) -> Iterator[Job]:  # fmt: skip
    """The jobs of a configuration over models that all have the tensors `names` and `depth` layers."""
    reader = _Reader(config, spec)
    before = [name for name in names if "embed_tokens" in name]
    after = [name for name in names if not name.startswith(_STACK) and name not in before]
    rests = sorted({name.removeprefix(_STACK).partition(".")[2] for name in names if name.startswith(_STACK)})
    slices, module = _slices(config, spec, depth)
    for name in before:
        yield reader.job(name, slices[0], module, 0.0, lambda source, name=name: name)
    layer = 0
    for part in slices:
        first, end = part["sources"][0]["layer_range"]
        for index in range(end - first):
            place = index / (end - first - 1) if end - first > 1 else 1.0
            for rest in rests:

                def stored(source: Mapping[str, Any], index: int = index, rest: str = rest) -> str:
                    return f"{_STACK}{source['layer_range'][0] + index}.{rest}"

                yield reader.job(f"{_STACK}{layer}.{rest}", part, module, place, stored)
            layer += 1
    for name in after:
        yield reader.job(name, slices[-1], module, 0.0, lambda source, name=name: name)


def _slices(config: Mapping[str, Any], spec: Spec, depth: int) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    """The slices, and the module that they are in; `models` are one slice over all layers, which the base joins."""
    module: Mapping[str, Any] = {}
    if "modules" in config:
        (module,) = config["modules"].values()
    holder = module or config
    if "slices" in holder:
        return list(holder["slices"]), module
    sources = [{**source, "layer_range": [0, depth]} for source in holder["models"]]
    base = config.get("base_model")
    if base is not None and all(_name(source["model"]) != _name(base) for source in sources):
        sources.append({"model": base, "layer_range": [0, depth]})
    return [{"sources": sources}], module


def _name(model: Any) -> str:
    """A model as written: its name, `{path: name}` or `{model: either, lora: either}`."""
    if not isinstance(model, Mapping):
        return model
    found = _name(model.get("model", model.get("path")))
    return f"{found}+{_name(model['lora'])}" if "lora" in model else found


class _Reader:
    def __init__(self, config: Mapping[str, Any], spec: Spec) -> None:
        self.config, self.spec = config, spec
        self.base = _name(config["base_model"]) if config.get("base_model") is not None else None

    def job(self, name: str, part: Mapping[str, Any], module: Mapping[str, Any], place: float, stored: Any) -> Job:
        outer = [holder.get("parameters") or {} for holder in (part, module, self.config)]
        apart = self.base is not None and self.spec.base != "input"
        sources = [source for source in part["sources"] if not (apart and _name(source["model"]) == self.base)]
        origin = next((s for s in part["sources"] if apart and _name(s["model"]) == self.base), None)
        own = {
            knob: tuple(
                _value([source.get("parameters") or {}, *outer], knob, stored(source), place, what.default)
                for source in sources
            )
            for knob, what in self.spec.knobs.items()
            if what.own
        }
        shared = {
            knob: _value(outer, knob, name, place, what.default)
            for knob, what in self.spec.knobs.items()
            if not what.own
        }
        return Job(
            name,
            base=(_name(origin["model"]), stored(origin)) if origin else None,
            inputs=tuple((_name(source["model"]), stored(source)) for source in sources),
            own=own,
            shared=shared,
        )


def _value(scopes: Sequence[Mapping[str, Any]], knob: str, tensor: str, place: float, default: Any) -> Any:
    for scope in scopes:
        found = evaluate(scope[knob], tensor, place) if knob in scope else _NOTHING
        if found is not _NOTHING:
            # Flags may be written as numbers, numbers as text that YAML does not take for a number.
            return bool(found) if isinstance(default, bool) and found in (0, 1) else found
    assert default is not REQUIRED, f"the generator gave no {knob} for {tensor}"
    return default


def evaluate(setting: Any, tensor: str, place: float) -> Any:
    """The value of a setting for a tensor at `place` (0 the first layer of the slice, 1 the last)."""
    choices = [setting] if isinstance(setting, Mapping) else setting
    if isinstance(choices, list) and isinstance(choices[0], Mapping):
        for choice in choices:
            wanted = choice.get("filter")
            if wanted is None or wanted == "*" or wanted in tensor:
                return evaluate(choice["value"], tensor, place)
        return _NOTHING
    if isinstance(setting, list):
        values = [_scalar(value) for value in setting]
        position = place * (len(values) - 1)
        index = int(position)
        if isinstance(values[0], bool) or index + 1 == len(values):
            return values[index]
        return values[index] * (1 - (position - index)) + values[index + 1] * (position - index)
    return _scalar(setting)


def _scalar(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
