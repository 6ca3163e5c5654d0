"""A mixture of experts, decided tensor by tensor.

The base is planned as a merge of itself; then the tensors of its feed-forward networks give way to those of the
experts, and tensors that no model stores (gates, noise) come from a checkpoint that makes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.correspondence import Correspondence, Input, correspond, few
from ctl_merge.deferred import Tensor
from ctl_merge.errors import MismatchError
from ctl_merge.gates import PromptGates
from ctl_merge.header import TensorSpec, dtype_code
from ctl_merge.layers import natural
from ctl_merge.loadable import check_loads
from ctl_merge.made import MadeCheckpoint, MadeRef, Maker, normal, random_gate, zeros
from ctl_merge.mixture import Expert, Mixture, scales
from ctl_merge.model_config import with_changes
from ctl_merge.moe_families import Family, choose, config_changes
from ctl_merge.moe_words import NETWORK, hints, left_out, structure, unused
from ctl_merge.plan import Plan, TensorPlan, make_plan
from ctl_merge.recipe import Recipe, Source
from ctl_merge.reference import ModelRef
from ctl_merge.slices import View

_PROJECTION = re.compile(r"(.*\.layers\.|layers\.)(\d+)\.mlp\.(gate|up|down)_proj\.weight")

Checkpoints = Mapping[ModelRef, FileCheckpoint]


def plan_mixture(recipe: Recipe, checkpoints: Checkpoints) -> tuple[Plan, MadeCheckpoint]:
    """Decide a mixture from the headers of its models, and what makes the tensors that none of them has.

    Raises MismatchError where the models do not fit together or into any architecture.
    """
    mixture, base = recipe.mixture, recipe.base
    assert mixture is not None and base is not None
    found = _networks(recipe, checkpoints)
    config = checkpoints[base].config
    family = choose(mixture, str(config.get("model_type")))
    dense = make_plan(replace(recipe, mixture=None, base=None, models=(Source(base),)), checkpoints)
    builder = _Builder(recipe, mixture, family, dense, found.inputs, checkpoints[base])
    tensors = dict(builder.tensors())
    changes = config_changes(family, config, mixture, str(base))
    left = check_loads(tensors, with_changes(config, changes), family.name, base)
    kept = {name: tensors[name] for name in sorted(tensors, key=natural) if name not in left}
    decisions = [*structure(mixture, family, base), *found.decisions, *unused(mixture, base, checkpoints)]
    decisions += [*dense.decisions, *left_out(base, left)]
    warnings = [*dense.warnings, *found.warnings, *hints(mixture, checkpoints[base])]
    plan = Plan(
        recipe, kept, dense.tied, tuple(dict.fromkeys(decisions)), tuple(dict.fromkeys(warnings)), changes=changes
    )
    return plan, builder.made()


def _networks(recipe: Recipe, checkpoints: Checkpoints) -> Correspondence:
    """The feed-forward tensors with every model's part, by the base's names."""
    views: dict[ModelRef, FileCheckpoint] = {}
    for ref in recipe.refs:
        names = {name: name for name in checkpoints[ref].tensors if NETWORK in name}
        views[ref] = View(checkpoints[ref], ref, names, {})
    found = correspond(replace(recipe, mixture=None), views)
    odd = [name for name in found.inputs if not _PROJECTION.fullmatch(name)]
    if odd or not found.inputs:
        what = f"has {few(odd)}" if odd else "has no tensors of that name"
        raise MismatchError(
            f"{recipe.base} {what}: experts are made of `layers.N.mlp.gate_proj`, `up_proj` and `down_proj` alone"
        )
    matrices = [name.rpartition(".mlp.")[0] for name in found.inputs if name.endswith("_proj.weight")]
    short = next((layer for layer in matrices if matrices.count(layer) != 3), None)
    if short:
        raise MismatchError(f"{recipe.base}: {short}.mlp lacks one of gate_proj, up_proj and down_proj, or its weight")
    return found


@dataclass
class _Builder:
    """Makes the plans of all tensors. What no model stores is collected for `made`."""

    recipe: Recipe
    mixture: Mixture
    family: Family
    dense: Plan
    networks: Mapping[str, Mapping[ModelRef, Input]]
    base: FileCheckpoint

    def __post_init__(self) -> None:
        self.ref = MadeRef("gates and noise" if any(e.noise_scale for e in self.mixture.everyone) else "gates")
        self._makers: dict[str, Maker] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._gates: PromptGates | None = None
        self.layers = self._layers()

    def _layers(self) -> dict[int, str]:
        """How the names of each layer's tensors begin."""
        found = {}
        for name in self.networks:
            match = _PROJECTION.fullmatch(name)
            assert match is not None
            found[int(match[2])] = f"{match[1]}{match[2]}."
        return dict(sorted(found.items()))

    def made(self) -> MadeCheckpoint:
        held = self._gates.held_bytes if self._gates else 0
        return MadeCheckpoint(self.ref, self.base, self._specs, self._makers, held)

    def tensors(self) -> Iterator[tuple[str, TensorPlan]]:
        """All tensors of the output."""
        for name, tensor in self.dense.tensors.items():
            if name not in self.networks:
                yield name, tensor
        for name, parts in self.networks.items():
            yield from self._experts(name, parts)
        for number, layer in enumerate(self.layers.values()):
            yield from self._routers(number, layer)
            for projection in self.family.biases:
                yield from self._bias(f"{layer}self_attn.{projection}")

    def _experts(self, name: str, parts: Mapping[ModelRef, Input]) -> Iterator[tuple[str, TensorPlan]]:
        match = _PROJECTION.fullmatch(name)
        assert match is not None
        layer, projection = f"{match[1]}{match[2]}.", f"{match[3]}_proj"
        spec = self.dense.tensors[name].spec
        numbered: list[tuple[int | None, Expert]] = [*enumerate(self.mixture.experts)]
        numbered += [(None, expert) for expert in self.mixture.shared]
        for number, expert in numbered:
            inputs = [parts[expert.ref]]
            target = layer + self.family.tensor(number, projection)
            if expert.noise_scale:
                noise = f"noise.{target}"
                inputs.append(self._make(noise, spec.shape, normal(self.recipe.seed, noise)))
            parameters = scales(expert, on_residual=projection == "down_proj")
            yield target, TensorPlan(target, spec, "merge", tuple(inputs), None, parameters)

    def _routers(self, number: int, layer: str) -> Iterator[tuple[str, TensorPlan]]:
        experts, width = len(self.mixture.experts), self._width
        yield self._router(layer + self.family.router, number, layer, (0, experts), width)
        if self.family.shared_gate:
            ends = (experts, len(self.mixture.everyone))
            yield self._router(layer + self.family.shared_gate, number, layer, ends, width)

    def _router(self, name: str, number: int, layer: str, rows: tuple[int, int], width: int) -> tuple[str, TensorPlan]:
        if self.mixture.from_prompts:
            self._gates = self._gates or PromptGates(
                self.base, self._embedding, len(self.layers), self.mixture.everyone, self.mixture.gate_mode
            )
            maker: Maker = partial(_rows_of, self._gates, number, rows)
        else:
            maker = random_gate(self.mixture.gate_mode, self.recipe.seed, name, width)
        made = self._make(name, (rows[1] - rows[0], width), maker)
        return name, self._plan(name, f"{layer}mlp.gate_proj.weight", made)

    def _bias(self, projection: str) -> Iterator[tuple[str, TensorPlan]]:
        """Zeros where the architecture has a bias and the base has none."""
        name, weight = f"{projection}.bias", self.dense.tensors.get(f"{projection}.weight")
        if name not in self.dense.tensors and weight is not None:
            yield name, self._plan(name, weight.name, self._make(name, weight.spec.shape[:1], zeros))

    def _plan(self, name: str, like: str, made: Input) -> TensorPlan:
        """A tensor that is made, in the dtype of one of the base's."""
        spec = TensorSpec(self.dense.tensors[like].spec.dtype, self._specs[made.tensor].shape)
        return TensorPlan(name, spec, "merge", (made,), None, {})

    def _make(self, name: str, shape: Sequence[int], maker: Maker) -> Input:
        self._specs[name] = TensorSpec(dtype_code("float64"), tuple(shape))
        self._makers[name] = maker
        return Input(self.ref, name)

    @property
    def _embedding(self) -> str:
        found = [name for name in self.dense.tensors if name.endswith("embed_tokens.weight")]
        if len(found) != 1:
            raise MismatchError(f"{self.base.name} has no embed_tokens.weight: set `gate_mode: random`")
        return self.dense.tensors[found[0]].inputs[0].tensor

    @property
    def _width(self) -> int:
        name = next(name for name in self.networks if name.endswith("gate_proj.weight"))
        return self.dense.tensors[name].spec.shape[1]


def _rows_of(gates: PromptGates, layer: int, rows: tuple[int, int], start: int, count: int) -> Tensor:
    return gates.rows[layer, rows[0] : rows[1]].flatten()[start : start + count]
