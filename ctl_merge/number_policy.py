"""What became of numbers that are none, or fit badly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctl_merge.plan import Plan
from ctl_merge.writer import let_through

_SHOWN = 8  # of the tensors that a card names


def number_policy(plan: Plan, folder: Path) -> dict[str, Any]:
    """How numbers were treated that are none, too large, or between two of the output's dtype.

    Where they were let through, `let_through` counts those that the folder's weights hold: by tensor, `nan` and
    `infinite`.
    """
    allowed = plan.recipe.allow_nonfinite
    policy = {
        "arithmetic": "float64", "rounding": "nearest even", "denormals": "kept",
        "nonfinite": "allow" if allowed else "refuse", "overflow": "to infinity" if allowed else "refuse",
        "no_decomposition": "refuse",
    }  # fmt: skip
    return {**policy, "let_through": let_through(folder)} if allowed else policy


def number_lines(numbers: Mapping[str, Any]) -> list[str]:
    """The same in words, for cards."""
    said = (f"{key.replace('_', ' ')} {value}" for key, value in numbers.items() if isinstance(value, str))
    return [f"numbers: {', '.join(said)}", *through_lines(numbers)]


def device_line(devices: Mapping[str, int]) -> str:
    """Which devices did the arithmetic, of how many tensors each: they agree to a rounding."""
    return f"computed on {', '.join(f'{name} ({count:,} tensors)' for name, count in devices.items()) or 'cpu'}"


def through_lines(numbers: Mapping[str, Any]) -> list[str]:
    """What was let through; nothing where it was refused."""
    found = numbers.get("let_through")
    if not found:
        return [] if found is None else ["NaN and infinity were allowed, and the weights hold none"]
    nan, infinite = (sum(own[kind] for own in found.values()) for kind in ("nan", "infinite"))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"let through: {nan:,} NaN and {infinite:,} infinite entries, in {', '.join([*found][:_SHOWN])}{more}"]
