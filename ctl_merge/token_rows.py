"""Which rows of which files make one model's table.

A table has one row a token: the embedding, the output head, the head's bias. Where vocabularies differ, a row of the
output is a model's own row for that token or, where it has none, a stand-in from other models.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ctl_merge.checkpoint import CHUNK, Checkpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.reference import ModelRef

# Values of `RowMap.table` for rows that no single row of a file gives; NONE is for `align` alone.
ZERO, MEAN, PADDING, NONE = -1, -2, -3, -4


@dataclass(frozen=True, eq=False, repr=False)
class RowMap:
    """Where each row of one model's table comes from.

    Row i is row `row[i]` of `sources[table[i]]` or, where `table[i]` is ZERO, zeros; MEAN, the mean of the rows
    `owners[:, i]` of all sources, -1 for those without; PADDING, the mean of the rows [0, counted) of this map.
    Arrays are int64: `table` and `row` (rows,), `owners` (sources, rows).
    """

    sources: tuple[tuple[ModelRef, str], ...]  # tensors with rows of `width` entries
    table: np.ndarray
    row: np.ndarray
    owners: np.ndarray
    width: int
    counted: int = 0

    def __repr__(self) -> str:
        return f"RowMap({len(self.table)} rows, {self._digest[:16]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowMap) and self._digest == other._digest

    def is_identity(self, source: int, stored: int) -> bool:
        """Whether it is one source's own table, of `stored` rows, as it is."""
        return (
            len(self.table) == stored
            and bool((self.table == source).all())
            and bool((self.row == np.arange(stored)).all())
        )

    def __hash__(self) -> int:
        return hash(self._digest)

    @cached_property
    def _digest(self) -> str:
        mean = self.owners[:, self.table == MEAN]
        content = hashlib.sha256(repr((self.sources, self.width, self.counted)).encode())
        for array in (self.table, self.row, mean):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()


def align(
    sources: tuple[tuple[ModelRef, str], ...], ids: np.ndarray, deciding: Sequence[bool], base: int | None,
    stand_ins: np.ndarray, forced: Sequence[int], tokens: int, width: int,
) -> list[RowMap]:  # fmt: skip
    """The map of each source's model.

    `ids` (sources, rows): the row of its table that each model has for a row of the output, -1 for none. The stand-in
    for a row that a model lacks is the base's or, without one, the mean of all rows that there are; zeros if there are
    none. Only `deciding` models give such. `stand_ins` (2, rows) names others: source or ZERO, and its row; NONE for
    none. `forced` rows take their stand-in in every model. Rows from `tokens` on are padding.
    """
    count, rows = ids.shape
    owners = np.where(np.array(deciding)[:, None], ids, -1)
    have = owners >= 0
    single = have.argmax(0)
    table = np.select([have.sum(0) == 0, have.sum(0) == 1], [ZERO, single], MEAN)
    row = np.where(table >= 0, owners[single, np.arange(rows)], 0)
    if base is not None:
        table, row = np.where(have[base], base, table), np.where(have[base], owners[base], row)
    named = stand_ins[0] != NONE
    table, row = np.where(named, stand_ins[0], table), np.where(named, stand_ins[1], row)
    own = ids.copy()
    own[:, list(forced)] = -1
    maps = []
    for model in range(count):
        use = own[model] >= 0
        of_model = np.where(use, model, table)
        of_model[tokens:] = PADDING
        maps.append(RowMap(sources, of_model, np.where(use, own[model], row), owners, width, min(tokens, rows)))
    return maps


@dataclass(frozen=True, slots=True)
class Input:
    """One model's part in one output tensor."""

    model: ModelRef
    tensor: str
    rows: RowMap | None = None  # where the rows are not those of `tensor`, one by one


def runs(table: np.ndarray, row: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """[begin, end) of rows that follow each other in one table, with the table and its first row."""
    if not len(table):
        return
    broken = (np.diff(table) != 0) | ((np.diff(row) != 1) & (table[1:] >= 0))
    begins = [0, *(np.flatnonzero(broken) + 1).tolist()]
    for begin, end in zip(begins, [*begins[1:], len(table)], strict=True):
        yield begin, end, int(table[begin]), int(row[begin])


class RowReader:
    """Reads tables by their maps, any part of them at a time. Thread-safe."""

    def __init__(self, checkpoints: Mapping[ModelRef, Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._padding: dict[RowMap, Tensor] = {}
        self._lock = threading.Lock()

    def read_into(self, rows: RowMap, out: Tensor, start: int = 0) -> None:
        """Fill the contiguous 1-D `out` with the table's elements from `start` on."""
        if rows.width and out.numel():
            first, last = start // rows.width, -(-(start + out.numel()) // rows.width)
            self._gather(rows, first, rows.table[first:last], rows.row[first:last], out, start)

    def _gather(
        self, rows: RowMap, first: int, table: np.ndarray, row: np.ndarray, out: Tensor, start: int
    ) -> None:  # fmt: skip
        """As `read_into`, with `table` and `row` for the rows from `first` on."""
        width = rows.width
        for begin, end, source, source_row in runs(table, row):
            at = (first + begin) * width - start  # negative for a row whose beginning `start` cuts off
            low, high = max(at, 0), min((first + end) * width - start, out.numel())
            piece = out[low:high]
            if source >= 0:
                model, tensor = rows.sources[source]
                self._checkpoints[model].read_into(tensor, piece, source_row * width + low - at)
            elif source == ZERO:
                piece.zero_()
            elif source == MEAN:
                piece.copy_(self._mean(rows, first + begin, first + end, start + low, high - low))
            else:
                places = torch.arange(start + low, start + high) % width
                piece.copy_(self._padding_of(rows)[places])

    def _mean(self, rows: RowMap, begin: int, end: int, start: int, count: int) -> Tensor:
        """Means in float64 of `count` elements from `start` on, which lie in the rows [begin, end)."""
        total, part = torch.zeros(count, dtype=torch.float64), torch.empty(count, dtype=torch.float64)
        for source, owned in enumerate(rows.owners[:, begin:end]):
            if (owned >= 0).any():
                self._gather(rows, begin, np.where(owned >= 0, source, ZERO), owned, part, start)
                total += part
        number = torch.from_numpy((rows.owners[:, begin:end] >= 0).sum(0))
        return total / number[torch.arange(start, start + count) // rows.width - begin]

    def _padding_of(self, rows: RowMap) -> Tensor:
        """The mean of a table's rows, (width,) float64, taken once."""
        with self._lock:
            if rows not in self._padding:
                total, step = torch.zeros(rows.width, dtype=torch.float64), max(1, CHUNK // rows.width)
                for begin in range(0, rows.counted, step):
                    part = torch.empty(min(step, rows.counted - begin) * rows.width, dtype=torch.float64)
                    self.read_into(rows, part, begin * rows.width)
                    total += part.view(-1, rows.width).sum(0)
                self._padding[rows] = total / max(1, rows.counted)
            return self._padding[rows]
