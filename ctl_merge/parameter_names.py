"""File tensors that make up another version's parameter.

Whoever trained an adapter may have had another transformers than wrote the model's files. A parameter is looked for
among the names in the files first, then by what they stand for in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ctl_merge.architecture import ModuleMap, block_index, stacked, ties_embeddings
from ctl_merge.header import TensorSpec
from ctl_merge.model_config import vocab_size


@dataclass(frozen=True)
class Place:
    """A file tensor that is, or is a part of, a parameter: of expert `expert`, from row `row` on."""

    name: str
    own: str  # what the checkpoint stores: of another name where that is tied to it
    expert: int | None = None
    experts: int = 1
    row: int = 0


class ParameterNames:
    """The parameters of a checkpoint, by the names that it or its model's class has for them."""

    def __init__(self, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> None:
        self.tensors, self.config = tensors, config

    @cached_property
    def modules(self) -> ModuleMap:
        """The model's own view of names: made only where they leave a question, as it loads transformers."""
        return ModuleMap(self.config)

    @cached_property
    def _files(self) -> dict[str, str]:
        return {parameter: name for name, parameter in self.modules.parameters(self.tensors).items()}

    @cached_property
    def _stacks(self) -> dict[str, list[list[str]]]:
        return stacked(self.modules, self.tensors)

    @cached_property
    def ties(self) -> dict[str, str]:
        """File names of tensors that the base ties and does not store, with that of the one stored in their place."""
        ties = {}
        for target, source in self.modules.tied().items():
            open_ = not self.modules.is_head(target) or ties_embeddings(self.config)
            if open_ and target not in self._files and source in self._files:
                ties[target] = self._files[source]
        return ties

    def places(self, parameter: str) -> list[Place]:
        """The file tensors that make up a parameter; none where the base has no such parameter."""
        if parameter in self.tensors:
            return [Place(parameter, parameter)]
        canonical = self.modules.parameters([parameter])[parameter]
        if canonical in self._files:
            return [Place(self._files[canonical], self._files[canonical])]
        if canonical in self.ties:
            return [Place(canonical, self.ties[canonical])]
        found, row = [], 0
        for experts in self._stacks.get(canonical, []):
            found += [Place(name, name, expert, len(experts), row) for expert, name in enumerate(experts)]
            row += self.tensors[experts[0]].shape[0]
        return found

    @cached_property
    def _blocks(self) -> Mapping[str, object]:
        return block_index(self.tensors, self.config)

    def is_table(self, name: str) -> bool:
        """Whether a stored tensor has a row for each token: outside of the blocks, and long enough."""
        size, spec = vocab_size(self.config), self.tensors.get(name)
        return bool(size and spec and spec.shape and spec.shape[0] >= size and name not in self._blocks)

    def stored_ties(self) -> Iterator[tuple[str, str]]:
        """Pairs of file tensors that the config ties although both are stored: PEFT gives both the same new rows."""
        if ties_embeddings(self.config):
            for target, source in self.modules.tied().items():
                if target in self._files and source in self._files:
                    yield self._files[target], self._files[source]
