"""A model's stacks of transformer blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ctl_merge.architecture import is_layer, layer_classes, origins
from ctl_merge.deferred import torch
from ctl_merge.errors import ProbeError

Stacks = Mapping[str, Mapping[str, "torch.nn.Module"]]


def find_blocks(model: Any, named: str | None = None) -> dict[str, dict[str, torch.nn.Module]]:
    """The model's stacks of transformer blocks: list's path -> {`path.i`: block}.

    The topmost ModuleLists whose items are all GradientCheckpointingLayers; else those of the classes that the model
    says must not be split or give its hidden states; else the largest that is as long as the text model is deep, unless
    others of that length lie beside it; else, or if there is none, ProbeError asks for `named`, the path of a list.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module)
    }
    if named is not None:
        if named not in lists:
            raise ProbeError(f"--blocks {named}: the model has no such list of modules; it has: {', '.join(lists)}")
        chosen = [named]
    else:
        classes = layer_classes(model)
        chosen = _topmost(p for p, m in lists.items() if all(map(is_layer, m)))
        chosen = chosen or _topmost(p for p, m in lists.items() if all(type(b).__name__ in classes for b in m))
        chosen = chosen or _as_deep_as_the_text_model(model, lists)
    if not chosen:
        raise ProbeError(f"no stack of transformer blocks was found: name one with --blocks; lists: {', '.join(lists)}")
    return {path: {f"{path}.{i}": block for i, block in enumerate(lists[path])} for path in chosen}


def every_block(stacks: Stacks) -> dict[str, torch.nn.Module]:
    """The blocks of all stacks by site."""
    return {site: block for stack in stacks.values() for site, block in stack.items()}


def text_sites(model: Any, stacks: Stacks) -> list[str]:
    """The sites of the blocks that text runs through: not those of a vision or an audio tower beside them.

    Those in the model's decoder, and in the encoder of an encoder-decoder; all where the model does not tell.
    """
    parts = [model.get_decoder(), *([model.get_encoder()] if model.config.is_encoder_decoder else [])]
    inside = {id(module) for part in parts for module in part.modules()}
    reached = [stack for path, stack in stacks.items() if id(model.get_submodule(path)) in inside]
    return [site for stack in reached or stacks.values() for site in stack]


def tensors_below(model: Any, names: Iterable[str], modules: Iterable[str]) -> dict[str, list[str]]:
    """For each module's path, those of a checkpoint's tensors that its parameters are made of."""
    sources = {parameter: [name for name, _ in origin.sources] for parameter, origin in origins(model, names).items()}
    found: dict[str, list[str]] = {}
    for path in modules:
        below = [names for parameter, names in sources.items() if parameter.startswith(f"{path}.")]
        found[path] = list(dict.fromkeys(name for names in below for name in names))
    return found


def _as_deep_as_the_text_model(model: Any, lists: Mapping[str, torch.nn.ModuleList]) -> list[str]:
    """The largest list of the text model's depth; none where lists of that length share the work, as in XLM."""
    config = getattr(model, "config", None)
    depth = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    fitting = _topmost(path for path, module in lists.items() if len(module) == depth)
    beside = Counter(path.rpartition(".")[0] for path in fitting)
    largest = sorted(fitting, key=lambda path: sum(p.numel() for p in lists[path].parameters()))[-1:]
    return [path for path in largest if beside[path.rpartition(".")[0]] == 1]


def _topmost(paths: Iterable[str]) -> list[str]:
    paths = list(paths)
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
