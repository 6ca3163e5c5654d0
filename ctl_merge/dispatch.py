"""A model's weights over devices, main memory and disk."""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ctl_merge.deferred import Tensor, torch

ITEMSIZE = 4  # models run in float32


@dataclass(frozen=True)
class Placement:
    """Where the weights of each module stay, and where it computes.

    `stays`: module's path -> `cpu`, `cuda:N` or `disk`; the nearest path above a module counts, `""` is the whole
    model. What stays on an accelerator computes there; all else on `device`, to which weights that stay elsewhere are
    brought while their module runs. So accelerate reads a device map.
    """

    device: str = "cpu"
    stays: Mapping[str, str] = field(default_factory=lambda: {"": "cpu"})

    def stay(self, path: str) -> str:
        """Where a module's weights stay; a module that no path covers has none, only buffers."""
        while path not in self.stays and path:
            path = path.rpartition(".")[0]
        return self.stays.get(path, self.device)

    def computes(self, path: str) -> str:
        """Where a module computes."""
        stay = self.stay(path)
        return self.device if stay in ("cpu", "disk") else stay

    @property
    def devices(self) -> list[str]:
        """The devices that compute, the main one first."""
        return list(dict.fromkeys([self.device, *map(self.computes, self.stays)]))

    @property
    def streamed(self) -> bool:
        """Whether some weights are read anew whenever they are used."""
        return "disk" in self.stays.values()

    @property
    def whole(self) -> bool:
        """Whether all weights stay on the one device that computes."""
        return set(self.stays.values()) == {self.device}


@dataclass(frozen=True)
class Unit:
    """Modules whose weights come and go together: a block, or a module outside of the blocks without its children."""

    path: str
    module: torch.nn.Module
    whole: bool
    parameters: Mapping[str, torch.nn.Parameter]

    @property
    def prefix(self) -> str:
        return f"{self.path}." if self.path else ""


def units(model: torch.nn.Module, blocks: Mapping[str, torch.nn.Module]) -> list[Unit]:
    """The units that have weights or buffers, those outside of the blocks first, and the model itself."""
    found = []
    outside = {p: m for p, m in model.named_modules() if not any(f"{p}.".startswith(f"{block}.") for block in blocks)}
    for path, module in {**outside, **blocks}.items():
        whole = path in blocks
        prefix = f"{path}." if path else ""
        own = dict(module.named_parameters(prefix.removesuffix("."), recurse=whole, remove_duplicate=False))
        if own or not path or any(True for _ in module.buffers(recurse=whole)):
            found.append(Unit(path, module, whole, own))
    return found


def dispatch(
    model: Any, weights: Mapping[str, Tensor], placement: Placement, blocks: Mapping[str, torch.nn.Module]
) -> Any:
    """Give the model its weights where they stay; accelerate's hooks bring them, and inputs, to where they are used.

    `weights`: by the names of parameters, read when asked for. A parameter that modules share is held once a device.
    """
    model.tie_weights()
    _read_buffers(model, weights)
    every = units(model, blocks)
    held = _Held(weights)
    if placement.whole:
        for unit in every:
            _set(unit, {name: held.on(placement.device, name, p) for name, p in unit.parameters.items()})
        return model.to(placement.device)
    _keep_ids(model)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(placement.device))  # the buffers
    for unit in every:
        stay = placement.stay(unit.path)
        if stay != "disk":
            for name, parameter in unit.parameters.items():
                held.on(stay, name, parameter)
    for unit in every:
        if placement.stay(unit.path) == placement.computes(unit.path):
            _set(unit, {n: held.on(placement.computes(unit.path), n, p) for n, p in unit.parameters.items()})
        _hook(unit, held, placement)
    return model


def twin(model: Any) -> Any:
    """The same model once more, to be run beside it: it shares the weights that are in memory."""
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    maps = [hook.weights_map for hook in hooks if getattr(hook, "weights_map", None) is not None]
    shared = [*(p for p in model.parameters() if not p.is_meta), *maps]
    return copy.deepcopy(model, {id(each): each for each in shared})


def held_bytes(
    model: Any, placement: Placement, blocks: Mapping[str, torch.nn.Module]
) -> tuple[dict[str, int], dict[str, int]]:
    """Float32 weights by device: those that stay, and the most that are brought at a time for one unit.

    `model` is an empty one, its parameters on the meta device.
    """
    model.tie_weights()
    every = units(model, blocks)
    sizes = {
        (id(p), placement.stay(unit.path)): ITEMSIZE * p.numel() for unit in every for p in unit.parameters.values()
    }
    staying: dict[str, int] = {}
    for (_, stay), size in sizes.items():
        if stay != "disk":
            staying[stay] = staying.get(stay, 0) + size
    brought: dict[str, int] = {}
    for unit in every:
        to = placement.computes(unit.path)
        own = {id(p): ITEMSIZE * p.numel() for p in unit.parameters.values() if (id(p), to) not in sizes}
        brought[to] = max(brought.get(to, 0), sum(own.values()))
    return staying, {device: size for device, size in brought.items() if size}


class _Held:
    """Weights in memory, each once a device, however many modules share it."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self._tensors: dict[tuple[int, str], torch.nn.Parameter] = {}
        self._empty: list[torch.nn.Parameter] = []  # kept, so that no other parameter gets the identity of one of them

    def on(self, device: str, name: str, empty: torch.nn.Parameter) -> torch.nn.Parameter:
        """The parameter on a device, read if it is not there yet."""
        key = (id(empty), device)
        if key not in self._tensors:
            self._empty.append(empty)
            self._tensors[key] = torch.nn.Parameter(self.weights[name].to(device), requires_grad=False)
        return self._tensors[key]

    def there(self, parameters: Mapping[str, torch.nn.Parameter], devices: tuple[str, ...]) -> dict[str, Tensor]:
        """Those of the parameters that are on one of the devices, the first that has it."""
        keys = {name: [(id(p), device) for device in devices] for name, p in parameters.items()}
        found = {name: [self._tensors[key] for key in own if key in self._tensors] for name, own in keys.items()}
        return {name: own[0] for name, own in found.items() if own}


def _set(unit: Unit, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        owner, _, attribute = name.removeprefix(unit.prefix).rpartition(".")
        setattr(unit.module.get_submodule(owner), attribute, parameter)


def _hook(unit: Unit, held: _Held, placement: Placement) -> None:
    """Have inputs, and weights that stay elsewhere, brought to where the unit computes."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import PrefixedDataset

    computes = placement.computes(unit.path)
    offloaded = placement.stay(unit.path) != computes
    near = ChainMap(held.there(unit.parameters, (computes, "cpu")), held.weights)  # type: ignore[arg-type]
    hook = AlignDevicesHook(
        execution_device=torch.device(computes), offload=offloaded, place_submodules=unit.whole,
        io_same_device=not unit.path,  # the model's outputs come back to where its inputs were
        weights_map=PrefixedDataset(near, unit.prefix) if offloaded else None,
    )  # fmt: skip
    add_hook_to_module(unit.module, hook)


def _read_buffers(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Give the model the buffers that belong to its state, such as a router's correction bias: few and small.

    Those that the checkpoint lacks stay as the model's class makes them.
    """
    stored = set(weights) & model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(weights[name])


def _keep_ids(model: Any) -> None:
    """Llama 4 moves the token ids to where its embedding's weights are: nowhere while they are streamed."""
    called: dict[str, Any] = {}
    model.register_forward_pre_hook(lambda module, args, kwargs: called.update(kwargs), with_kwargs=True)
    embedding = model.get_input_embeddings()
    if embedding is not None:
        embedding.register_forward_pre_hook(
            lambda module, args: (called["input_ids"],) if args and args[0].is_meta else None
        )
