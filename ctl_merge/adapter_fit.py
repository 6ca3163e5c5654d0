"""The change of one parameter, as an adapter holds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ctl_merge.adapter_files import Form, Held
from ctl_merge.adapter_targets import Target
from ctl_merge.checkpoint import Checkpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import NonFiniteError
from ctl_merge.factors import Factors, recompressed, truncated

# The exact factors of one of a parameter's matrices, where they are known without a decomposition.
Known = Callable[[Target, int], Factors | None]


@dataclass(frozen=True)
class Fit:
    """How changes become factors.

    change: the differences from the base, under its names. whole: the tensors that these lead to. `rank`: at most;
    `energy`: the share of each matrix's ‖change‖² that is enough, None for all of its numerical rank. `known`: see
    Known. `dtype`: of what is written. NonFiniteError is raised for what it, or a decomposition, cannot hold.
    """

    change: Checkpoint
    whole: Checkpoint
    dtype: torch.dtype
    rank: int | None = None
    energy: float | None = None
    known: Known = lambda target, number: None
    device: str = "cpu"
    allow_nonfinite: bool = False  # in what is stored whole

    def hold(self, target: Target, form: Form, rows: tuple[int, ...] = ()) -> tuple[Held, dict[str, Tensor]]:
        """What is held of the parameter, and its tensors: `a`, `b`, turned `at` and `bt` for what is tied, `whole`."""
        if form == "low_rank":
            return self._low_rank(target)
        tensor = target.read_whole(self.whole, self.dtype)
        if not self.allow_nonfinite:
            self._check_written(target, tensor)
        if form == "rows":
            tensor = tensor[list(rows)]
        return Held(target, form, f"stored as {'rows' if rows else 'it is'}", rows=rows), {"whole": tensor}

    def _low_rank(self, target: Target) -> tuple[Held, dict[str, Tensor]]:
        found, squares, lost = [], 0.0, 0.0
        for number in range(target.count):
            factors, own, missed = self._factors(target, number)
            found.append(factors)
            squares, lost = squares + own, lost + missed
        rank = max(factors.rank for factors in found)
        hows = " and ".join(dict.fromkeys(factors.how for factors in found))
        held = Held(target, "low_rank", hows, rank, found[0].scale, squares, lost)
        padded = [factors.padded(rank) for factors in found]
        a = torch.cat([factors.a for factors in padded])
        b = torch.stack([factors.b for factors in padded], dim=2).flatten(1)  # (outputs, rank · experts)
        parts = {"a": a, "b": b}
        fresh = torch.contiguous_format  # a row is its own transpose, and is stored twice all the same
        if target.tied:
            parts |= {"at": a.T.clone(memory_format=fresh), "bt": b.T.clone(memory_format=fresh)}
        return held, parts

    def _factors(self, target: Target, number: int) -> tuple[Factors, float, float]:
        """Of one matrix: the factors as they are written, ‖change‖², and ‖what they lose of it‖²."""
        known = self.known(target, number)
        if known is None:
            matrix = target.read(self.change, number).to(self.device)
        else:
            matrix = (known.b @ known.a).mul_(known.scale)
            fits = known.rank <= min(self.rank or known.rank, *target.matrix)
        squares = float(matrix.square().sum())
        if not math.isfinite(squares):
            raise NonFiniteError(
                f"{target.parameter}: the change holds NaN, infinity or numbers too large to be squared, which no "
                "adapter can hold"
            )
        try:
            if known is None:
                factors = truncated(matrix, self.rank, self.energy, f"{target.parameter}.{number}")
            else:
                factors = known if fits else recompressed(known, self.rank, self.energy)
        except torch.linalg.LinAlgError as error:
            raise NonFiniteError(
                f"{target.parameter}: there is no decomposition of its change ({error}). Look at the tensor with "
                "`ctl-merge compare`, and leave out the model or the adapter whose change it is"
            ) from None
        written = factors.rounded(self.dtype)
        self._check_written(target, written.a, written.b)
        on_cpu = replace(written, a=written.a.cpu().contiguous(), b=written.b.cpu().contiguous())
        return on_cpu, squares, written.lost(matrix) if squares else 0.0

    def _check_written(self, target: Target, *tensors: Tensor) -> None:
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            name = str(self.dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"{target.parameter}: {name} ends at {torch.finfo(self.dtype).max:g}, and the adapter's numbers go "
                "beyond it, or are none: set a wider dtype, or use intact models"
            )
