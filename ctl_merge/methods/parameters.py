"""The types in which merge methods declare their parameters.

A method's keyword-only arguments are the recipe's parameters: annotation, default and range are written there and
nowhere else. `PerModel[T]` marks a parameter that each model has its own value of; all others are shared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from pydantic import Field, FiniteFloat, TypeAdapter

from ctl_merge.deferred import Tensor

PER_MODEL = "per model"
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")
T = TypeVar("T")

_MOST = 1e9  # with numbers without bound sums need not be finite
Weight = Annotated[FiniteFloat, Field(ge=-_MOST, le=_MOST, description="factor of the model (or of its task vector)")]
Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]
Density = Annotated[Fraction, Field(description="share of the task vector's entries that is kept")]
Scale = Annotated[FiniteFloat, Field(ge=-_MOST, le=_MOST, description="factor on the merged task vector")]
Normalize = Annotated[bool, Field(description="divide by the sum of the weights")]


if TYPE_CHECKING:

    class PerModel(Tensor, Generic[T]):
        """What a method receives."""

else:

    class PerModel:
        """`PerModel[T]`: one T per model. The method receives a float64 CPU tensor (models, 1, ...) or a tuple."""

        def __class_getitem__(cls, item: Any) -> Any:
            return Annotated[item, PER_MODEL]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a merge method, as its signature declares it."""

    name: str  # in the recipe; `lambda` there is `lambda_` in Python
    type: Any  # annotation, without the PerModel mark
    default: Any  # `Parameter.REQUIRED` where there is none
    per_model: bool
    description: str

    REQUIRED = object()

    @property
    def keyword(self) -> str:
        """The name of the function's argument."""
        return "lambda_" if self.name == "lambda" else self.name

    @property
    def required(self) -> bool:
        return self.default is Parameter.REQUIRED

    def check(self, value: Any) -> Any:
        """`value` as the parameter's type; raises pydantic.ValidationError."""
        if self.type_is_bool and isinstance(value, int | float) and value in (0, 1):
            value = bool(value)  # mergekit's configs write flags as numbers too
        if isinstance(value, str) and NUMBER.fullmatch(value):
            # YAML 1.1 takes 1e-1, without a point, for text; and people put numbers in quotes.
            value = int(value) if value.lstrip("+-").isdecimal() else float(value)
        return self._adapter.validate_python(value, strict=True)

    @cached_property
    def _adapter(self) -> TypeAdapter:
        return TypeAdapter(self.type)

    @cached_property
    def type_is_bool(self) -> bool:
        """Whether true and false are among its values."""
        return "boolean" in str(self._adapter.json_schema())


def column(values: Tensor, like: Tensor) -> Tensor:
    """Per-model values (models, 1, ...) on the device and in the dtype of `like` (models, *shape)."""
    return values.to(device=like.device, dtype=like.dtype)


Parameters = Mapping[str, Any]
