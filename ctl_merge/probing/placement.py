"""How a probe is made, and where its models live."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.deferred import torch
from ctl_merge.devices import accelerators, by_prefix, checked_device, parse_max_memory, parse_table, physical_memory
from ctl_merge.dispatch import ITEMSIZE, Placement, held_bytes
from ctl_merge.errors import DeviceError
from ctl_merge.model import open_model
from ctl_merge.probing.rows import END, JOIN
from ctl_merge.probing.run import Observations, Rider, Running, Subject, shares_weights
from ctl_merge.sizes import format_size
from ctl_merge.stacks import every_block, find_blocks

LENGTH = 256


@dataclass(frozen=True)
class Options:
    """How a probe is made. `sequences` windows of `length` tokens of each data set: if None, 256 or
    the model's context where that is shorter.

    `device_map`: cpu, cuda:N, disk (weights are read block by block, so that memory does not grow with depth), JSON
    `{"module": device}`, or auto (the default): as many blocks as half the memory holds on the accelerators, then in
    main memory, the rest on disk. `max_memory`, such as `0=20GiB,cpu=8GiB`: what may be used instead of half, and only
    of the devices that it names. `patch`: replace each block's features in turn by the interpolation and see what the
    loss gains. `null`: probe a random task vector of the same size as well. `special_tokens`: put each window between
    the special tokens that the tokenizer adds to a text. `scaling`: probe the task vectors at a quarter and a half of
    their size too, to see where the deviation grows with the square. `trust_remote_code`: run code that the first model
    brings along, of its architecture or its tokenizer. `join`: what stands between a row's columns; `end`: what ends a
    row, which counts with the last column.
    """

    sequences: int = 64
    length: int | None = None
    batch: int = 8
    device_map: str | None = None
    max_memory: str | None = None
    blocks: str | None = None
    chat: bool = False
    patch: bool = False
    null: bool = False
    special_tokens: bool = False
    scaling: bool = False
    trust_remote_code: bool = False
    join: str = JOIN
    end: str = END


def placed(options: Options, base: Checkpoint, parents: int = 0, riders: Sequence[Rider] = ()) -> Running:
    """How and where all models run: the same map for each, so that the features of one site meet on one device.

    Nothing is read but headers. Raises CheckpointError, DeviceError and ProbeError for what cannot be run as asked.
    """
    models = 1 + parents + len(riders)
    sharing = sum(map(shares_weights, riders))
    placement = place(
        base, options.device_map or "auto", options.max_memory, options.blocks,
        trust_remote_code=options.trust_remote_code, models=models, holding=models - sharing,
    )  # fmt: skip
    return Running(placement, options.batch, options.blocks, options.trust_remote_code)


def place(
    checkpoint: Checkpoint, device_map: str, max_memory: str | None = None, blocks: str | None = None, *,
    trust_remote_code: bool = False, models: int = 1, holding: int = 1,
) -> Placement:  # fmt: skip
    """Where the weights of a checkpoint's model stay and compute, if so many models run, of which so many hold weights.

    Raises DeviceError for a device that is not there, and for a map that does not fit the model or the limits.
    """
    table = _checked(parse_table(device_map)) if device_map.lstrip().startswith("{") else None
    limits = _limits(device_map if table is None else "auto", max_memory)
    model, _ = open_model(checkpoint, trust_remote_code=trust_remote_code)
    if device_map == "disk":
        return Placement(next(iter(accelerators({})), "cpu"), {"": "disk"})
    if table is not None:
        sites = every_block(find_blocks(model, blocks))
        _check_prefixes(table, model, sites)
        placement = Placement(next((d for d in table.values() if d not in ("cpu", "disk")), "cpu"), table)
        _check_limits(placement, limits if max_memory else {}, model, sites, models, holding)
        return placement
    return _inferred(model, limits, blocks, models, holding)


def _limits(device_map: str, max_memory: str | None) -> dict[str, float]:
    """Bytes that weights may take on each device that may be used, the one that computes first."""
    given = parse_max_memory(max_memory)
    named = {checked_device(device): size for device, size in given.items() if device != "disk"}
    if device_map not in ("auto", "disk"):
        device = checked_device(device_map)
        return {device: named.get(device, float("inf"))}
    if given:
        return {device: named[device] for device in sorted(named, key=lambda d: (d == "cpu", d))}
    return {**{device: size // 2 for device, size in accelerators({}).items()}, "cpu": physical_memory() // 2}


def _inferred(model: Any, limits: Mapping[str, float], blocks: str | None, models: int, holding: int) -> Placement:
    """As much on each device as its limit allows for every model, by accelerate; no block is split."""
    from accelerate import infer_auto_device_map

    model.tie_weights()
    device = next(iter(limits), "cpu")
    whole = sum(ITEMSIZE * parameter.numel() for parameter in model.parameters())
    if holding * whole <= limits.get(device, 0):
        return Placement(device, {"": device})
    sites = every_block(find_blocks(model, blocks))
    streaming = held_bytes(model, Placement(device, {"": "disk"}), sites)[1].get(device, 0)
    shares: dict[Any, int] = {}
    for name, limit in limits.items():  # models that hold nothing still bring one block at a time
        free = limit - (models - holding) * streaming * (name == device)
        shares[name if name == "cpu" else int(name.rpartition(":")[2])] = max(0, int(free)) // holding
    classes = list({type(block).__name__ for block in sites.values()})
    found = infer_auto_device_map(model, shares, no_split_module_classes=classes)
    kind = device.partition(":")[0]
    return Placement(device, {path: f"{kind}:{d}" if isinstance(d, int) else str(d) for path, d in found.items()})


def _checked(table: Mapping[str, Any]) -> dict[str, str]:
    return {path: "disk" if device == "disk" else checked_device(device) for path, device in table.items()}


def _check_prefixes(table: Mapping[str, str], model: torch.nn.Module, blocks: Mapping[str, torch.nn.Module]) -> None:
    """Every path names a module, none lies inside of a block, and no weight is left out."""
    modules = dict(model.named_modules())
    for path in table:
        if path not in modules:
            near = difflib.get_close_matches(path, modules, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it begins with {', '.join(dict(model.named_children()))}"
            raise DeviceError(f"--device-map: the model has no module {path!r}: {hint}")
        block = next((site for site in blocks if path.startswith(f"{site}.")), None)
        if block:
            raise DeviceError(f"--device-map: {path!r} is a part of the block {block!r}: give the whole block a device")
    for name, _ in model.named_parameters(remove_duplicate=False):
        by_prefix(name, table)


def _check_limits(
    placement: Placement, limits: Mapping[str, float], model: Any, blocks: Mapping[str, torch.nn.Module],
    models: int, holding: int,
) -> None:  # fmt: skip
    for device, needed in _bytes(placement, model, blocks, models, holding).items():
        if needed > limits.get(device, float("inf")):
            raise DeviceError(
                f"--max-memory: the weights of {models} models that --device-map has on {device} take "
                f"{format_size(needed)}, more than the {format_size(limits[device])} allowed"
            )


def _bytes(
    placement: Placement, model: Any, blocks: Mapping[str, torch.nn.Module], models: int, holding: int
) -> dict[str, int]:
    """Float32 weights on each device at once: those that stay, and what every model has brought for its block."""
    staying, brought = held_bytes(model, placement, blocks)
    devices = dict.fromkeys([*staying, *brought])
    return {d: holding * staying.get(d, 0) + models * brought.get(d, 0) for d in devices}


def memory(
    running: Running, subject: Subject, riders: Sequence[Rider], observed: Mapping[str, Observations]
) -> dict[str, Any]:
    """What a report tells of devices and memory.

    Weights in float32 by what the placement says: those that stay, and one block of every model where they do not.
    Features as they were found: what all models bring to a meeting, which is one block's.
    """
    models = 1 + len(subject.parents) + len(riders)
    model, _ = open_model(subject.base, trust_remote_code=running.trust_remote_code)
    sites = every_block(find_blocks(model, running.blocks))
    found = _bytes(running.placement, model, sites, models, models - sum(map(shares_weights, riders)))
    return {
        "device": ", ".join(running.placement.devices), "streamed": running.placement.streamed,
        "weight_bytes_in_memory": sum(found.values()),
        **({"weight_bytes_by_device": found} if len(found) > 1 else {}),
        "feature_bytes_in_memory": max((own.feature_bytes for own in observed.values()), default=0),
        "logit_bytes_in_memory": max((own.logit_bytes for own in observed.values()), default=0),
    }  # fmt: skip
