"""Whether a class of transformers will load an output whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ctl_merge.architecture import empty_model, origins, tied_parameters
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.correspondence import few
from ctl_merge.errors import CheckpointError, MismatchError
from ctl_merge.header import TensorSpec
from ctl_merge.model import ModuleWeights
from ctl_merge.plan import Plan, TensorPlan
from ctl_merge.reference import ModelRef


@dataclass
class _Table:
    """As much of a checkpoint as its names take."""

    name: str
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]


def check_stack(plan: Plan, first: FileCheckpoint) -> Plan:
    """Refuse a stack of layers of which the model's class would leave tensors out; the plan with what else is seen."""
    config = plan.fit(first.config)
    try:
        model = empty_model(config, str(first.ref))
    except CheckpointError as error:
        return _warned(plan, f"whether the stack of layers loads could not be seen: {error}")
    state, found = model.state_dict(), origins(model, plan.tensors)
    used = {name for parameter, origin in found.items() if parameter in state for name, _ in origin.sources}
    odd = [name for name, tensor in plan.tensors.items() if name not in used and tensor.operation == "merge"]
    if odd:
        raise MismatchError(
            f"at its new depth a {config['architectures'][0]} has no place for {few(odd)}: layers that differ from the "
            "others cannot stand anywhere in the stack"
        )
    tied = tied_parameters(model)
    lacking = [name for name, _ in model.named_parameters() if name not in found and tied.get(name) not in found]
    return (
        _warned(plan, f"the stack lacks {few(lacking)}: transformers will make them up at random") if lacking else plan
    )


def _warned(plan: Plan, warning: str) -> Plan:
    return replace(plan, warnings=(*plan.warnings, warning))


def check_loads(tensors: Mapping[str, TensorPlan], config: Mapping[str, Any], kind: str, base: ModelRef) -> set[str]:
    """Refuse tensors that the config's class would not load, or lacks, or has in another shape.

    `kind`: what messages call the class; `base`: the model that the tensors outside of experts are from. Returns the
    stored buffers that the class computes itself. Raises MismatchError.
    """
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    model = empty_model(config, kind)
    try:
        weights = ModuleWeights(model, _Table(kind, specs, config))  # type: ignore[arg-type]
    except CheckpointError as error:
        raise MismatchError(f"{base} does not have all that a {kind} needs: {error}") from None
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unknown = {name for name in weights if name not in state}
    odd = [name for name in unknown if name not in tensors or tensors[name].operation == "merge"]
    if odd:
        raise MismatchError(f"a {kind} has no place for {len(odd)} tensors of {base}: {few(odd)}")
    wrong = next((n for n in weights if n in specs and n in state and specs[n].shape != state[n]), None)
    if wrong:
        raise MismatchError(
            f"{wrong} has shape {list(specs[wrong].shape)} and by the config {list(state[wrong])}: is the config of "
            f"{base} that of its weights?"
        )
    return unknown
