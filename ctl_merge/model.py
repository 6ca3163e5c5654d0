"""A checkpoint as a transformers model, whole or streamed."""

from __future__ import annotations

import contextlib
import copy
import ctypes
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ctl_merge.architecture import with_floats
from ctl_merge.checkpoint import Checkpoint
from ctl_merge.errors import CheckpointError, ProbeError


class ModuleWeights(Mapping[str, Tensor]):
    """The parameters of a model, by module name, read from a checkpoint when they are asked for.

    transformers' own conversions (renamed, stacked, split tensors) are applied to the file's tensors. `as_written`
    rounds to the checkpoint's dtype first, as a reader of the written file would see it.
    """

    def __init__(
        self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, as_written: bool = False
    ) -> None:
        self.model, self.checkpoint, self.dtype, self.as_written = model, checkpoint, dtype, as_written
        self._sources = _sources_by_parameter(model, checkpoint)
        self._tied = {t: s for t, s in model.all_tied_weights_keys.items() if t not in self._sources}
        expected = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        missing = sorted(expected - self._sources.keys() - self._tied.keys())
        if missing:
            raise CheckpointError(
                f"{checkpoint.name} has no weights for {len(missing)} parameters, such as {missing[0]}"
            )

    def __getitem__(self, parameter: str) -> Tensor:
        first, transform, sources = self._sources[self._tied.get(parameter, parameter)]
        collected = copy.deepcopy(transform)
        for name, pattern in sources:
            collected.add_tensor(first, name, pattern, self._read(name))
        converted = collected.convert(first, model=self.model, config=self.model.config)
        found = converted[self._tied.get(parameter, parameter)]
        return found[0] if isinstance(found, list) else found

    def __iter__(self) -> Iterator[str]:
        return iter([*self._sources, *self._tied])

    def __len__(self) -> int:
        return len(self._sources) + len(self._tied)

    @property
    def stores_tied(self) -> bool:
        """Whether the checkpoint has weights of its own for a parameter that the model ties."""
        return any(target in self._sources for target in self.model.all_tied_weights_keys)

    def _read(self, name: str) -> Tensor:
        spec = self.checkpoint.tensors[name]
        if self.as_written:
            return self.checkpoint.read(name).to(self.dtype)
        out = torch.empty(spec.numel, dtype=self.dtype)
        self.checkpoint.read_into(name, out)
        return out.view(spec.shape)


def _sources_by_parameter(model: Any, checkpoint: Checkpoint) -> dict[str, tuple[str, Any, list[tuple[str, str]]]]:
    """For each parameter: the first target of its transform, the transform, and the file tensors that go into it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters: Any = [c for c in conversions if not isinstance(c, WeightRenaming)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, tuple[str, Any, list[tuple[str, str]]]] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        transform = by_pattern[pattern] if pattern else WeightRenaming(name, target)
        groups.setdefault(target, (target, transform, []))[2].append((name, pattern or name))
    for first, transform, sources in list(groups.values()):
        for other in getattr(transform, "target_patterns", [])[1:]:
            groups.setdefault(first.replace(transform.target_patterns[0], other), (first, transform, sources))
    return groups


def empty_model(config: Mapping[str, Any], name: str) -> Any:
    """A transformers model of that config in eval mode, its parameters on the meta device. No remote code is run."""
    import transformers
    from accelerate import init_empty_weights

    architecture = (config.get("architectures") or [None])[0]
    kind = getattr(transformers, str(architecture), None)
    if architecture is None:
        raise CheckpointError(f"{name}: config.json has no `architectures`, which name the model's class")
    if kind is None:
        raise CheckpointError(
            f"{name}: transformers has no {architecture!r}; models that bring code of their own cannot be run"
        )
    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"{name}: transformers has no model_type {config.get('model_type')!r}")
    typed = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(with_floats(config))
    with init_empty_weights(include_buffers=False):
        model = kind._from_config(typed, dtype=torch.float32)
    return model.eval()


def load_weights(
    checkpoint: Checkpoint, device: str = "cpu", streamed: bool = False, as_written: bool = False,
    blocks: str | None = None, resident_bytes: int = 0,
) -> Any:  # fmt: skip
    """The checkpoint as a model in float32: its weights in memory on `device`, or read there block by block.

    `blocks`: path of the list of blocks, where it cannot be found. `resident_bytes`: how much of a streamed model may
    stay in memory.
    """
    model = empty_model(checkpoint.config, checkpoint.name)
    weights = ModuleWeights(model, checkpoint, as_written=as_written)
    if weights.stores_tied:
        model = empty_model({**checkpoint.config, "tie_word_embeddings": False}, checkpoint.name)
        weights = ModuleWeights(model, checkpoint, as_written=as_written)
    if not streamed:
        return materialise(model, weights, device)
    stacks = find_blocks(model, blocks)
    return stream(model, weights, device, {p: m for stack in stacks.values() for p, m in stack.items()}, resident_bytes)


def materialise(model: Any, weights: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Any:
    """Give the model all its weights, on one device."""
    model.tie_weights()
    _read_buffers(model, weights)
    _fill(model, model.named_parameters(remove_duplicate=False), weights, device)
    return model.to(device)


def _fill(
    model: Any,
    parameters: Iterable[tuple[str, nn.Parameter]],
    weights: Mapping[str, Tensor],
    device: torch.device | str,
) -> None:
    done: dict[int, nn.Parameter] = {}
    for name, parameter in list(parameters):
        if id(parameter) not in done:
            done[id(parameter)] = nn.Parameter(weights[name].to(device), requires_grad=False)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, done[id(parameter)])


def stream(
    model: Any, weights: Mapping[str, Tensor], device: torch.device | str, blocks: Mapping[str, nn.Module],
    resident_bytes: int = 0,
) -> Any:  # fmt: skip
    """Let the model's weights be read when a module runs, a block at a time, and forgotten after.

    What is outside of the blocks, then the first blocks, stay in memory as far as `resident_bytes` reach; accelerate's
    hooks load the others.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import PrefixedDataset

    model.tie_weights()
    _read_buffers(model, weights)
    _keep_ids(model)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # the buffers
    outside = {p: m for p, m in model.named_modules() if not any(f"{p}.".startswith(f"{block}.") for block in blocks)}
    for path, module in {**outside, **blocks}.items():
        whole = path in blocks  # a block's weights are read together, of other modules each its own
        prefix = f"{path}." if path else ""
        own = [(f"{prefix}{n}", p) for n, p in module.named_parameters(remove_duplicate=False, recurse=whole)]
        resident_bytes -= sum(4 * parameter.numel() for _, parameter in own)
        if own and resident_bytes >= 0:
            _fill(model, own, weights, device)
        elif own:
            hook = AlignDevicesHook(
                execution_device=torch.device(device), offload=True, place_submodules=whole,
                weights_map=PrefixedDataset(weights, prefix),
            )  # fmt: skip
            add_hook_to_module(module, hook)
    return model


def return_freed_memory() -> None:
    """Have glibc give back what is free in its heaps.

    Weights that several threads read and forget leave holes there: unless these are given back again and again, memory
    grows with depth although nothing is kept. Other C libraries have no such call.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


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


def find_blocks(model: Any, named: str | None = None) -> dict[str, dict[str, nn.Module]]:
    """The model's stacks of transformer blocks: list's path -> {`path.i`: block}.

    The topmost ModuleLists whose items are all GradientCheckpointingLayers; else those of the classes that the model
    says must not be split; else, or if there is none, ProbeError asks for `named`, the path of a list.
    """
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    if named is not None:
        if named not in lists:
            raise ProbeError(f"--blocks {named}: the model has no such list of modules; it has: {', '.join(lists)}")
        chosen = [named]
    else:
        from transformers.modeling_layers import GradientCheckpointingLayer

        unsplit = set(model._no_split_modules or ())
        chosen = _topmost(p for p, m in lists.items() if all(isinstance(b, GradientCheckpointingLayer) for b in m))
        chosen = chosen or _topmost(p for p, m in lists.items() if all(type(b).__name__ in unsplit for b in m))
    if not chosen:
        raise ProbeError(f"no stack of transformer blocks was found: name one with --blocks; lists: {', '.join(lists)}")
    return {path: {f"{path}.{i}": block for i, block in enumerate(lists[path])} for path in chosen}


def tensors_below(model: Any, checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, list[str]]:
    """For each module's path, the checkpoint's tensors that its parameters are made of."""
    sources = _sources_by_parameter(model, checkpoint)
    found: dict[str, list[str]] = {}
    for path in modules:
        below = [names for parameter, (_, _, names) in sources.items() if parameter.startswith(f"{path}.")]
        found[path] = list(dict.fromkeys(name for names in below for name, _ in names))
    return found


def _topmost(paths: Any) -> list[str]:
    paths = list(paths)
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
