"""Accelerators made of software: devices `soft:0` and `soft:1`, whose tensors lie in main memory but do not mix.

An operation on tensors of two devices is an error, as on a GPU; its values are the CPU's. To be imported in a process
of its own, since torch keeps a backend once it has one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

COUNT = 2


class OnDevice(torch.Tensor):
    """A tensor that says it is on a device, and holds its values in `raw`, on the CPU."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if device is None:  # accelerate makes parameters by their class
            return torch.nn.Parameter(raw, requires_grad=requires_grad)
        found = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=device
        )
        found.raw = raw
        return found

    def tolist(self) -> Any:
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        devices = {t.device for t in tensors if t.ndim or t.device.type == "soft"}
        target = kwargs.get("device")
        if func is torch.ops.aten._fused_sdp_choice.default:
            return 0  # attention in plain steps: kernels are chosen by the device
        if func is torch.ops.aten.histc.default:
            args = (args[0].float(), *args[1:])  # transformers counts whole numbers on accelerators, which CPUs do not
        if len(devices) > 1 and func not in (torch.ops.aten.copy_.default, torch.ops.aten._copy_from.default):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {sorted(map(str, devices))}")
        device = torch.device(target) if target is not None else next(iter(d for d in devices if d.type == "soft"))
        if device.type == "soft" and target is not None:
            kwargs["device"] = torch.device("cpu")
        wrappers = {id(t.raw): t for t in tensors if isinstance(t, OnDevice)}
        out = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice) or device.type != "soft":
                return value
            return wrappers.get(id(value)) if id(value) in wrappers else OnDevice(value, device)

        return tree_map(wrap, out)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, OnDevice) else value


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    return OnDevice(torch.empty(size, dtype=dtype), torch.device(device))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype), torch.device(device))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _raw(target).copy_(_raw(source))
    return target


class _Module(_DummyBackendModule):
    def device_count(self) -> int:
        return COUNT


_setup_privateuseone_for_python_backend("soft", backend_module=_Module())
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
torch.inference_mode = torch.no_grad  # type: ignore[assignment, misc]  # torch allows no views of such tensors in it
