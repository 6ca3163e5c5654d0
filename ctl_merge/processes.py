"""Processes that a launcher started, and what they agree on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from ctl_merge.errors import CtlMergeError, DeviceError
from ctl_merge.shown import shown

T = TypeVar("T")

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # as accelerate reads them
_PATIENCE = timedelta(days=30)  # a rank waits for the others to merge their shards, however long that takes


@dataclass(frozen=True)
class Ranks:
    """This process and those that were started with it; by default it is alone. `local_*`: those on this machine."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    local_count: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that speaks, and writes what is written once."""
        return self.index == 0

    @property
    def cores(self) -> int:
        """The CPU cores that are this process's own."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_count)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order; waits for all. Raises DeviceError where one has ended."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        try:
            return gather_object([value])
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DeviceError(
                "another process of this run has ended: its message says why, and the same command, of a merge with "
                f"--resume, goes on with what is written ({reason})"
            ) from None

    def together(self, step: Callable[[], T]) -> T:
        """Take a step that every process takes. Where it fails for one, all raise the same error."""
        found, problem = None, None
        try:
            found = step()
        except CtlMergeError as error:
            problem = error
        problems = self.gather(problem)
        if any(problems):
            raise _agreed(problems) from problem
        return found  # type: ignore[return-value]

    def at_first(self, step: Callable[[], T]) -> T | None:
        """Take a step that the first process alone takes, while the others wait."""
        return self.together(lambda: step() if self.first else None)

    def require_alone(self, what: str) -> None:
        """Refuse several processes. Raises DeviceError, on all of them."""
        if self.count > 1:
            error = DeviceError(f"{what} is the work of one process: run it without a launcher")
            error.agreed = True
            raise error


def _agreed(problems: Sequence[CtlMergeError | None]) -> CtlMergeError:
    """The problems of all processes as one, which all of them raise."""
    found = {index: problem for index, problem in enumerate(problems) if problem is not None}
    messages = list(dict.fromkeys(map(str, found.values())))
    if len(messages) > 1 or (len(found) < len(problems) and 0 not in found):
        messages = [f"rank {index}: {problem}" for index, problem in found.items()]
    error = type(next(iter(found.values())))("\n".join(messages))
    error.agreed = True
    return error


ALONE = Ranks()
_started: Ranks | None = None


def launched(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The processes that torchrun or `accelerate launch` started, joined by accelerate's PartialState (gloo).

    Raises DeviceError where fewer came up than were asked for: each would take the whole work for its own.
    """
    global _started
    if _started is None:
        asked = max(int(environment.get(name) or 1) for name in _SIZES)
        _started = _joined(asked) if asked > 1 else ALONE
    return _started


def _joined(asked: int) -> Ranks:
    from accelerate import PartialState

    try:
        state = PartialState(cpu=True, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"the {asked} processes of this run cannot reach each other: {error}") from None
    if state.num_processes != asked:
        raise DeviceError(f"{asked} processes were asked for and {state.num_processes} came up: use torchrun")
    found = Ranks(state.process_index, asked, max(state.local_process_index, 0))
    import socket

    machines = found.gather(socket.gethostname() + os.environ.get("GROUP_RANK", ""))
    return Ranks(found.index, asked, found.local_index, machines.count(machines[found.index]))


def check_launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """What to warn of a launcher whose processes do not know of each other, so that each believes to be alone.

    Raises DeviceError for `accelerate launch --cpu`, which was asked for several processes and starts one.
    """
    if any(int(environment.get(name) or 1) > 1 for name in _SIZES):
        return None
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        raise DeviceError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu: use "
            "`torchrun --nproc_per_node N -m ctl_merge RECIPE`"
        )
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks == 1:
        return None
    return (
        f"srun started {tasks} processes that do not know of each other, and each does the whole work: to share it, "
        "start torchrun with srun, once on each machine, or give each process its --shard-rank and --shard-world"
    )


def report(error: CtlMergeError) -> None:
    """Say an error on standard error: once where all processes raise it, else with the rank."""
    ranks = _started or ALONE
    agreed = getattr(error, "agreed", False)
    if ranks.first or not agreed:
        said = shown(str(error))
        print(f"error: {said}" if ranks.first or agreed else f"error: rank {ranks.index}: {said}", file=sys.stderr)
        sys.stderr.flush()
    if agreed:
        ranks.gather(None)  # a launcher ends all processes as soon as one has ended: not before this is said


def leave() -> None:
    """Take leave of the other processes, if there are any. Once a process has failed, there is nothing to wait for."""
    global _started
    if _started is not None and _started.count > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
    _started = None


def deal(sizes: Sequence[int], count: int) -> list[int]:
    """To which of `count` owners each size goes: the largest first, each to the one with the least so far."""
    load, found = [0] * count, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        found[index] = min(range(count), key=load.__getitem__)
        load[found[index]] += sizes[index]
    return found
