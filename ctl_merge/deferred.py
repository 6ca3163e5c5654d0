"""torch, imported when it is first asked for something.

Its import takes two seconds, longer than merging a small model: what is planned from headers, or merged by compiled
loops, does without. `Tensor` is for annotations alone.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class Tensor:
        """Stands for torch.Tensor where annotations are looked at."""

    class _Deferred(ModuleType):
        """A module that is imported on the first look into it; thread-safe, as imports are."""

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self.__name__), name)

    torch = _Deferred("torch")


def library(values: Any) -> Any:
    """NumPy for its arrays, torch for tensors: for what is computed of either alike."""
    return np if isinstance(values, np.ndarray | np.generic) else torch


def torch_version() -> str:
    """What `torch.__version__` says."""
    return version("torch")


__all__ = ["Tensor", "library", "torch", "torch_version"]
