"""A checkpoint as a transformers model, whole or streamed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from typing import Any

from ctl_merge.architecture import empty_model, origins, tied_parameters
from ctl_merge.checkpoint import Checkpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.dispatch import Placement, dispatch
from ctl_merge.errors import CheckpointError
from ctl_merge.stacks import every_block, find_blocks


class ModuleWeights(Mapping[str, Tensor]):
    """The parameters of a model, by module name, read from a checkpoint when they are asked for.

    transformers' own conversions (renamed, stacked, split tensors) are applied to the file's tensors. `as_written`
    rounds to the checkpoint's dtype first, as a reader of the written file would see it.
    """

    def __init__(
        self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype | None = None, as_written: bool = False
    ) -> None:
        self.model, self.checkpoint, self.as_written = model, checkpoint, as_written
        self.dtype = dtype or torch.float32
        self._origins = origins(model, checkpoint.tensors)
        self._ties = tied_parameters(model)
        self._tied = {t: s for t, s in self._ties.items() if t not in self._origins}
        expected = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        missing = sorted(expected - self._origins.keys() - self._tied.keys())
        if missing:
            raise CheckpointError(
                f"{checkpoint.name} has no weights for {len(missing)} parameters, such as {missing[0]}"
            )

    def __getitem__(self, parameter: str) -> Tensor:
        stored = self._tied.get(parameter, parameter)
        return self._origins[stored].build(self.model, self._read)[stored]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._origins, *self._tied])

    def __len__(self) -> int:
        return len(self._origins) + len(self._tied)

    @property
    def stores_tied(self) -> bool:
        """Whether the checkpoint has weights of its own for a parameter that the model ties."""
        return any(target in self._origins for target in self._ties)

    def sources(self, parameter: str) -> list[str]:
        """The checkpoint's tensors that a parameter is made of."""
        stored = self._tied.get(parameter, parameter)
        return [name for name, _ in self._origins[stored].sources]

    def _read(self, name: str) -> Tensor:
        spec = self.checkpoint.tensors[name]
        if self.as_written:
            return self.checkpoint.read(name).to(self.dtype)
        out = torch.empty(spec.numel, dtype=self.dtype)
        self.checkpoint.read_into(name, out)
        return out.view(spec.shape)


def open_model(
    checkpoint: Checkpoint, as_written: bool = False, trust_remote_code: bool = False
) -> tuple[Any, ModuleWeights]:
    """The checkpoint's model, its parameters on the meta device, and the weights that belong into it.

    `trust_remote_code`: whether code that the model brings along may be run. Raises CheckpointError.
    """
    config, name = checkpoint.config, checkpoint.name
    model = empty_model(config, name, checkpoint.code, trust_remote_code)
    weights = ModuleWeights(model, checkpoint, as_written=as_written)
    if weights.stores_tied:  # a head of its own wins over a config that ties
        model = empty_model({**config, "tie_word_embeddings": False}, name, checkpoint.code, trust_remote_code)
        weights = ModuleWeights(model, checkpoint, as_written=as_written)
    return model, weights


def load_weights(
    checkpoint: Checkpoint, placement: Placement | None = None, as_written: bool = False, blocks: str | None = None,
    trust_remote_code: bool = False,
) -> Any:  # fmt: skip
    """The checkpoint as a model in float32 and eval mode, its weights where `placement` has them: in memory by default.

    `blocks`: path of the list of blocks, where it cannot be found.
    """
    model, weights = open_model(checkpoint, as_written, trust_remote_code)
    placement = placement or Placement()
    return dispatch(model, weights, placement, {} if placement.whole else every_block(find_blocks(model, blocks)))


def return_freed_memory() -> None:
    """Have glibc give back what is free in its heaps.

    Weights that several threads read and forget leave holes there: unless these are given back again and again, memory
    grows with depth although nothing is kept. Other C libraries have no such call.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
