"""How a probe is made, and where its models live."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ctl_merge.architecture import block_index
from ctl_merge.checkpoint import Checkpoint
from ctl_merge.devices import checked_device, parse_max_memory
from ctl_merge.probing.run import Running


@dataclass(frozen=True)
class Options:
    """How a probe is made. `sequences` windows of `length` tokens of each data set.

    `device_map`: cpu, cuda:N, disk (weights are read block by block, so that memory does not grow with depth), or auto
    (the default), which reads so what exceeds half the memory, or `max_memory`, such as `cpu=8GiB`. `patch`: replace
    each block's features in turn by the interpolation and see what the loss gains. `null`: probe a random task vector
    of the same size as well. `special_tokens`: put each window between the special tokens that the tokenizer adds to
    a text. `scaling`: probe the task vectors at a quarter and a half of their size too, to see where the deviation
    grows with the square.
    """

    sequences: int = 64
    length: int = 256
    batch: int = 8
    device_map: str | None = None
    max_memory: str | None = None
    blocks: str | None = None
    chat: bool = False
    patch: bool = False
    null: bool = False
    special_tokens: bool = False
    scaling: bool = False


def placed(options: Options, checkpoints: Sequence[Checkpoint]) -> Running:
    """Where the models compute, and how much of each stays in memory.

    Half of the memory, or what `max_memory` allows, is shared out among the models; the rest of their blocks is read
    when it is needed.
    """
    device, streamed = place(options.device_map)
    limits = parse_max_memory(options.max_memory)
    total = torch.cuda.mem_get_info(device)[1] if device.startswith("cuda") else physical_memory()
    limit = limits.get(torch.device(device).index if device != "cpu" else "cpu", total // 2)
    needed = 4 * sum(spec.numel for checkpoint in checkpoints for spec in checkpoint.tensors.values())
    resident = 0 if streamed else limit // len(checkpoints)
    return Running(device, streamed or needed > limit, options.batch, options.blocks, resident)


def place(device_map: str | None) -> tuple[str, bool]:
    """The device that computes, and whether all blocks are to be read from disk. Raises DeviceError."""
    if device_map not in (None, "auto", "disk"):
        return checked_device(device_map), False
    return "cuda:0" if torch.cuda.is_available() else "cpu", device_map == "disk"


def physical_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def weight_bytes(running: Running, models: int, checkpoint: Checkpoint) -> int:
    """Float32 weights in memory at once: those that stay, and of streamed models the largest block."""
    whole = 4 * sum(spec.numel for spec in checkpoint.tensors.values())
    if not running.streamed:
        return models * whole
    sizes: dict[tuple[str, int], int] = {}
    for name, (stack, index, _) in block_index(checkpoint.tensors, checkpoint.config).items():
        sizes[stack, index] = sizes.get((stack, index), 0) + 4 * checkpoint.tensors[name].numel
    return models * (min(running.resident_bytes, whole) + max(sizes.values(), default=whole))
