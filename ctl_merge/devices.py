"""Where arithmetic happens: accelerate's device maps, read for tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from ctl_merge.deferred import torch
from ctl_merge.errors import DeviceError
from ctl_merge.header import TensorSpec
from ctl_merge.processes import deal
from ctl_merge.sizes import parse_size


def assign_devices(
    specs: Mapping[str, TensorSpec], device_map: str | None = None, max_memory: str | None = None
) -> dict[str, str]:
    """The device of each tensor's arithmetic.

    `device_map`: `cpu` (default), `cuda:N` or another torch device, `auto` (all accelerators that are there, tensors
    spread by bytes; the CPU if there is none), or JSON `{"module or tensor prefix": device}` as in transformers: the
    longest prefix wins and `""` is the rest. Raises DeviceError for a device that is not there.
    """
    if device_map is None or device_map == "cpu":
        return dict.fromkeys(specs, "cpu")
    if device_map == "auto":
        return _spread(specs, list(accelerators(parse_max_memory(max_memory))))
    if device_map.lstrip().startswith("{"):
        table = {prefix: checked_device(device) for prefix, device in parse_table(device_map).items()}
        return {name: by_prefix(name, table) for name in specs}
    return dict.fromkeys(specs, checked_device(device_map))


def parse_max_memory(text: str | None) -> dict[int | str, int]:
    """`0=20GiB,cpu=60GiB` as bytes per device, the form that accelerate takes. Raises DeviceError."""
    if not text:
        return {}
    found: dict[int | str, int] = {}
    for item in text.split(","):
        device, _, size = item.partition("=")
        device = device.strip().removeprefix("cuda:")
        try:
            found[device if device in ("cpu", "mps", "disk") else int(device)] = parse_size(size)
        except ValueError:
            raise DeviceError(f"--max-memory: {item!r} is not device=size, such as 0=20GiB or cpu=60GiB") from None
    return found


def accelerators(limits: Mapping[int | str, int]) -> dict[str, int]:
    """The accelerators that are there and that the limits do not rule out, each with the bytes that may be used."""
    if not torch.accelerator.is_available():
        return {}
    from accelerate.utils import get_max_memory

    kind = torch.accelerator.current_accelerator()
    if kind is None or kind.type == "mps":  # it has no float64
        return {}
    allowed = get_max_memory(dict(limits) or None)
    numbers = _own(sorted(key for key, size in allowed.items() if isinstance(key, int) and size > 0))
    return {checked_device(number): allowed[number] for number in numbers}


def _own(numbers: list[int]) -> list[int]:
    """Of this machine's accelerators those of this process, where a launcher started several here."""
    index, count = (int(os.environ.get(name) or usual) for name, usual in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    return numbers[index::count] or numbers[index % max(1, len(numbers)) :][:1]


def _spread(specs: Mapping[str, TensorSpec], devices: list[str]) -> dict[str, str]:
    """Tensors spread by bytes."""
    if not devices:
        return dict.fromkeys(specs, "cpu")
    names = sorted(specs)
    owners = deal([specs[name].nbytes for name in names], len(devices))
    return {name: devices[owner] for name, owner in zip(names, owners, strict=True)}


def parse_table(text: str) -> dict[str, Any]:
    """The device of each prefix, as JSON says; `checked_device` tells whether it is there. Raises DeviceError."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise DeviceError(f"--device-map is not valid JSON: {error}") from None


def by_prefix(name: str, table: Mapping[str, str]) -> str:
    """The device of the longest prefix. Raises DeviceError where there is none."""
    matching = [p for p in table if p == "" or name == p or name.startswith(f"{p}.")]
    if not matching:
        raise DeviceError(f'--device-map says nothing of {name}: add a prefix that covers it, or "" for the rest')
    return table[max(matching, key=len)]


def checked_device(device: Any) -> str:
    """A device's full name, if it is there. `disk` is where weights are anyway: their arithmetic is the CPU's."""
    if device == "disk":
        return "cpu"
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    kind = torch.accelerator.current_accelerator().type if count else "cuda"  # type: ignore[union-attr]
    try:
        wanted = torch.device(kind, device) if isinstance(device, int) else torch.device(str(device))
    except (RuntimeError, TypeError, ValueError):
        raise DeviceError(f"{device!r} is no device: use auto, cpu, cuda:0 or a JSON map") from None
    if wanted.type == "cpu":
        return "cpu"
    if wanted.type == "mps":
        raise DeviceError("mps has no float64, in which merges are computed: use --device cpu")
    if wanted.type != kind or (wanted.index or 0) >= count:
        there = ", ".join(["cpu", *(f"{kind}:{i}" for i in range(count))])
        raise DeviceError(f"there is no device {device!r} here; there are: {there}")
    return f"{wanted.type}:{_own([*range(count)])[0] if wanted.index is None else wanted.index}"


def physical_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
