"""Chunks merged by compiled loops, where numba pays."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np

from ctl_merge.checkpoint import CHUNK
from ctl_merge.counting import LOOP_CHUNK, Columns, Counting, Raw, Refuse, pieces
from ctl_merge.deferred import Tensor, torch
from ctl_merge.inputs import Inputs
from ctl_merge.mapped import InPlace
from ctl_merge.methods.fused import Fused
from ctl_merge.methods.noise import key_of
from ctl_merge.plan import Plan, TensorPlan

# Entries of a model from which on the loops are worth the time that compiling them takes once.
LEAST = 1 << 25
# What `Fused` says, as the kernels number it.
_ELECT = {"weighted": 0, "unweighted": 1, "count": 2}
_DIVIDE = {"weights": 0, "count": 1, "none": 2}
_SUM, _ANCHORED, _AGREE = range(3)

logger = logging.getLogger("ctl_merge")


def worthwhile(plan: Plan) -> bool:
    """Whether a merge of this size gains by the compiled loops, and numba is there to compile them."""
    merged = [tensor for tensor in plan.tensors.values() if tensor.operation == "merge"]
    if not merged or plan.recipe.allow_nonfinite:
        return False
    method, parameters = plan.method, merged[0].parameters
    if method.grain_for(parameters) == "tensor":
        return False
    return sum(tensor.spec.numel for tensor in merged) >= LEAST and find_spec("numba") is not None


def loop_step(width: int) -> int:
    """Entries of a tensor that are merged at once, in rows of so many that stay whole."""
    return width * max(1, LOOP_CHUNK // width)


def working_bytes(models: int, exact: bool, width: int) -> int:
    """What the loops hold for each thread, with so many inputs, and rows of at most so many entries that stay whole."""
    ranking = (8 * models + 20) * max(width, 2048) + (1 << 17)  # places, keys, words to sort, and counts
    products = models * models * CHUNK >> 7  # a number for each pair and 1024 entries
    return max(width, LOOP_CHUNK) * (models * (2 if exact else 8) + 8) + 8 * (models + 5) * 2048 + ranking + products


class CompiledLoops:
    """The loops of `ctl_merge.methods.kernels` over chunks of a plan's tensors.

    `columns(tensor)` are a tensor's parameters, per-model ones as arrays; `refuse(tensor, start, count)` is called
    where NaN or infinity was met, and raises. Thread-safe; from and to bfloat16 without torch.
    """

    def __init__(self, kernels: Any, plan: Plan, inputs: Inputs, columns: Columns, refuse: Refuse) -> None:
        self._kernels, self._plan, self._inputs, self._columns = kernels, plan, inputs, columns
        self._refuse, self._held = refuse, threading.local()
        self.counting = Counting(kernels, plan.method, columns, self._stored, refuse)

    @classmethod
    def load(cls, plan: Plan, inputs: Inputs, columns: Columns, refuse: Refuse) -> CompiledLoops | None:
        """None where numba does not work: a merge without it is slower, and the same."""
        try:
            from ctl_merge.methods import kernels
        except Exception as error:  # numba that does not fit NumPy or this processor, or finds no folder for its cache
            logger.info("without compiled loops: %s", error)
            return None
        return cls(kernels, plan, inputs, columns, refuse)

    def merge(
        self, plan: TensorPlan, results: Mapping[str, Tensor], start: int, count: int, width: int,
        words: np.ndarray | None = None,
    ) -> np.ndarray | None:  # fmt: skip
        """So many entries of a tensor from `start` on, in rows of `width` that stay whole.

        They are `words`, filled, where that is given, for bfloat16 as its bits, and the inputs are stored so; else
        float64, unrounded. None where the plain definition must decide: for what no loop does, parts of rows that stay
        whole, NaN, infinity, or numbers near the end of the range.
        """
        prepared = self._prepared(plan, results)
        if prepared is None or start % width or count % width:
            return None
        raw = self._load(plan, start, count, decoded=words is None)
        # There is a loop from bfloat16 to bfloat16, and one from float64 to float64.
        exact = words is not None and raw[1].dtype == np.uint16
        merged = words if exact else self._memory("merged", count, np.float64)
        assert merged is not None
        block, rows = self._kernels.BLOCK, len(plan.inputs) + 5
        undecided = self._kernels.merge_chunk(
            raw, plan.base is not None, start, width, merged,
            self._memory("scratch", rows * block, np.float64).reshape(rows, block),
            self._memory("words", block // 2 + 4, np.uint64), self._ranking(len(plan.inputs), width), *prepared,
        )  # fmt: skip
        return None if undecided else merged

    def decode(self, plan: TensorPlan, start: int, stack: Tensor) -> bool:
        """Fill the float64 `stack` (inputs, n) from `start` on, the base subtracted from the others.

        False where NaN or infinity is among the inputs. Read are the larger chunks that the pieces lie in, each once
        where they are asked for in order.
        """
        begin = start - start % LOOP_CHUNK
        count = min(LOOP_CHUNK, plan.spec.numel - begin)
        if start + stack.shape[1] > begin + count:
            begin, count = start, stack.shape[1]
        raw = self._raw(plan, begin, count)
        return not self._kernels.decode_chunk(raw, plan.base is not None, start - begin, stack.numpy())

    def state(self, plan: TensorPlan, name: str, results: Mapping[str, Any]) -> np.ndarray:
        """What one of the method's measures accumulates over a whole tensor; `results` of those before it."""
        loop = self._plan.method.measures[name].loop(plan.parameters)
        if loop == "gram" or loop == "energy":
            return self._products(plan, loop == "energy")
        return self.counting.state(plan, name, results)

    def _products(self, plan: TensorPlan, squares: bool) -> np.ndarray:
        """Inner products over a whole tensor, (models, models); `squares`: those of each with itself, (models,)."""
        models, block = len(plan.inputs), self._kernels.BLOCK
        total, scratch = np.zeros((models, models)), self._memory("scratch", (models + 2) * block, np.float64)
        sums = self._memory("sums", models * models * CHUNK // block, np.float64).reshape(models, models, -1)
        for start, count in pieces(plan):
            undecided = self._kernels.add_products(
                self._stored(plan, start, count), plan.base is not None, count, CHUNK, squares,
                scratch.reshape(-1, block), sums, total,
            )  # fmt: skip
            if undecided:
                self._refuse(plan, start, count)
        return total.diagonal().copy() if squares else np.triu(total) + np.triu(total, 1).T

    def _stored(self, plan: TensorPlan, start: int, count: int) -> Raw:
        return self._load(plan, start, count, decoded=False)

    def _raw(self, plan: TensorPlan, start: int, count: int) -> Raw:
        held = getattr(self._held, "raw", None)
        if held is None or held[0] is not plan or held[1:3] != (start, count):
            raw = self._stored(plan, start, count)
            held = self._held.raw = (plan, start, count, raw)
        return held[3]

    def _prepared(self, plan: TensorPlan, results: Mapping[str, Tensor]) -> tuple[Any, ...] | None:
        """The arguments of the loop, made once for a tensor."""
        held = getattr(self._held, "prepared", None)
        if held is None or held[0] is not plan:
            held = self._held.prepared = (plan, self._prepare(plan, results))
        return held[1]

    def _prepare(self, plan: TensorPlan, results: Mapping[str, Tensor]) -> tuple[Any, ...] | None:
        fuse = self._plan.method.fused
        fused: Fused | None = fuse(**self._columns(plan), **results, models=len(plan.inputs)) if fuse else None
        if fused is None or (fused.anchor is not None and (plan.base or fused.above or fused.chance or fused.divisors)):
            return None  # the last: an anchored sum is of the models as they are stored
        combine = _AGREE if fused.elect else _SUM if fused.anchor is None else _ANCHORED
        seed = self._plan.recipe.seed
        keys = [key_of(seed, part.model.short, part.tensor) for part in plan.inputs if fused.chance is not None]
        return (
            combine, _ELECT[fused.elect or "weighted"], _DIVIDE[fused.divide], np.array(fused.factors),
            fused.anchor or 0, float(fused.total), float(fused.scale),
            fused.above is not None, np.array(fused.above or ()), np.array(fused.upto or ()),
            fused.chance is not None, np.array(keys, np.uint64).reshape(-1, 2), _limits(fused.chance or ()),
            fused.divisors is not None, np.array(fused.divisors or ()),
            fused.spread is not None, np.array(fused.chance or ()), np.array(fused.spread or ()), fused.by_chance,
        )  # fmt: skip

    def _load(self, plan: TensorPlan, start: int, count: int, decoded: bool) -> Raw:
        """The inputs' values, in bfloat16 if they are and need not be `decoded`; good until this thread's next."""
        self._held.raw = None  # whose memory this is
        parts = plan.everyone
        exact = not decoded and all(map(self._inputs.are_words, parts))
        if exact:
            found = [file and file.bytes(2 * start, 2 * count) for file in self._files(plan)]
            if all(piece is not None for piece in found):
                return _addresses(found), np.empty(0, np.uint16)
        rows = self._memory("raw", len(parts) * count, np.uint16 if exact else np.float64).reshape(len(parts), count)
        for row, part in zip(rows, parts, strict=True):
            self._inputs.fill(torch.from_numpy(row).view(torch.bfloat16 if exact else torch.float64), part, start)
        return _addresses(rows), rows[0, :0]

    def _files(self, plan: TensorPlan) -> list[InPlace | None]:
        """The inputs' bytes in their files: mapped once for all passes over a tensor."""
        held = getattr(self._held, "files", None)
        if held is None or held[0] is not plan:
            held = self._held.files = (plan, [self._inputs.mapped(part) for part in plan.everyone])
        return held[1]

    def _ranking(self, models: int, width: int) -> tuple[np.ndarray, ...]:
        """Memory to find places in, in rows that stay whole."""
        span = width * max(1, self._kernels.BLOCK // width)
        return (
            self._memory("places", models * span, np.float64).reshape(models, span), self._keys(span),
            self._memory("sorted", width, np.uint64), self._memory("unsorted", width, np.uint64),
            self._memory("counts", 1 << 14, np.int64),
        )  # fmt: skip

    def _keys(self, count: int) -> np.ndarray:
        return self._memory("keys", count, np.uint32)

    def _memory(self, use: str, count: int, dtype: type) -> np.ndarray:
        """This thread's memory for a use."""
        held: dict[Any, np.ndarray] = self._held.__dict__
        if (use, dtype) not in held or held[use, dtype].size < count:
            held[use, dtype] = np.empty(count, dtype)
        return held[use, dtype][:count]


def _limits(chances: Any) -> np.ndarray:
    """Below which of 2^24 an entry's random bits must be: the chance in float32, as the plain definition has it."""
    return np.array([math.ceil(float(np.float32(chance)) * 2**24) for chance in chances], np.int32)


def _addresses(rows: Any) -> np.ndarray:
    return np.array([row.ctypes.data for row in rows], np.int64)
