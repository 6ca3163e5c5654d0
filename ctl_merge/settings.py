"""A parameter's value over layers and tensor names.

Semantics are those of mergekit's conditional values: a scalar; a list, interpolated linearly over the layers;
`{value, filter}`; or a list of those, of which the first whose filter is a substring of the tensor's name counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ctl_merge.methods.parameters import Parameter


@dataclass(frozen=True)
class Setting:
    """Choices in order, each a filter (None matches every tensor) and its value or gradient."""

    choices: tuple[tuple[str | None, Any], ...]

    def matches(self, tensor: str) -> bool:
        """Whether the setting says anything of this tensor."""
        return self._choice(tensor) is not None

    def at(self, tensor: str, place: float) -> Any:
        """The value for a tensor at `place` in the layers, 0 the first and 1 the last; it must match."""
        choice = self._choice(tensor)
        assert choice is not None
        value = choice[1]
        return _interpolate(value, place) if isinstance(value, tuple) else value

    @property
    def uniform(self) -> bool:
        """Whether every tensor gets the same value."""
        return len(self.choices) == 1 and self.choices[0][0] is None and not isinstance(self.choices[0][1], tuple)

    def _choice(self, tensor: str) -> tuple[str | None, Any] | None:
        return next((c for c in self.choices if c[0] is None or c[0] in tensor), None)


def _interpolate(values: tuple[Any, ...], place: float) -> Any:
    position = min(max(place, 0.0), 1.0) * (len(values) - 1)
    index = int(position)
    if not isinstance(values[0], float) or index == len(values) - 1:
        return values[index]
    share = position - index
    return (1 - share) * values[index] + share * values[index + 1]


def parse_setting(raw: Any, parameter: Parameter, problems: list[tuple[tuple[str | int, ...], str]]) -> Setting | None:
    """Read the YAML value of a parameter; what is wrong is appended to `problems` with its path below the value."""
    before = len(problems)
    choices = tuple(_choices(raw, parameter, problems))
    return Setting(choices) if len(problems) == before else None


def _choices(raw: Any, parameter: Parameter, problems: list) -> Iterator[tuple[str | None, Any]]:
    if isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        for index, item in enumerate(raw):
            yield from _choice(item, parameter, (index,), problems)
    else:
        yield from _choice(raw, parameter, (), problems)


def _choice(
    item: Any, parameter: Parameter, at: tuple[str | int, ...], problems: list
) -> Iterator[tuple[str | None, Any]]:
    if not isinstance(item, dict):
        yield None, _value(item, parameter, at, problems)
        return
    unknown = sorted(str(key) for key in item.keys() - {"value", "filter"})
    if unknown or "value" not in item:
        what = f"unknown key {unknown[0]!r}" if unknown else "`value` is missing"
        problems.append((at, f"{what}: a choice has `value` and, if it is not for every tensor, `filter`"))
        return
    name = item.get("filter")
    if name is not None and not isinstance(name, str):
        problems.append(((*at, "filter"), f"a filter is part of a tensor's name, not {name!r}"))
        return
    yield (None if name == "*" else name), _value(item["value"], parameter, (*at, "value"), problems)


def _value(raw: Any, parameter: Parameter, at: tuple[str | int, ...], problems: list) -> Any:
    """A checked scalar, or a tuple of them (a gradient)."""
    if isinstance(raw, list) and not raw:
        problems.append((at, "an empty gradient: give at least one value"))
        return None
    try:
        return tuple(parameter.check(v) for v in raw) if isinstance(raw, list) else parameter.check(raw)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].lower()
        problems.append((at, f"`{parameter.name}`: {reason} (it is {raw!r})"))
        return None
