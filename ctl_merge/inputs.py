"""A merge's inputs, as they are read."""

from __future__ import annotations

from collections.abc import Mapping

from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.deferred import Tensor
from ctl_merge.mapped import InPlace
from ctl_merge.reference import ModelRef
from ctl_merge.token_rows import Input, RowReader


class Inputs:
    """Reads a model's tensor, or the rows of it that the output has. Thread-safe."""

    def __init__(self, checkpoints: Mapping[ModelRef, FileCheckpoint]) -> None:
        self.checkpoints, self._rows = checkpoints, RowReader(checkpoints)

    def fill(self, row: Tensor, part: Input, start: int) -> None:
        """Fill a row with one model's entries of an output tensor, from `start` on."""
        if part.rows is not None:
            self._rows.read_into(part.rows, row, start)
        else:
            self.checkpoints[part.model].read_into(part.tensor, row, start)

    def block(self, part: Input) -> int:
        """How many entries are best read at once."""
        return self.checkpoints[part.model].block(part.tensor)

    def are_words(self, part: Input) -> bool:
        """Whether the values are stored in bfloat16, and read as they are."""
        return part.rows is None and self.checkpoints[part.model].stored_as(part.tensor) == "BF16"

    def mapped(self, part: Input) -> InPlace | None:
        """The bytes as they lie in the file; None where they are to be read."""
        return self.checkpoints[part.model].mapped(part.tensor)
