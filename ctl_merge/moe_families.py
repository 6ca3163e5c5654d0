"""Architectures that a mixture of dense models can have."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctl_merge.architecture import typed_config
from ctl_merge.errors import MismatchError
from ctl_merge.mixture import Mixture
from ctl_merge.model_config import ABSENT, with_changes

Path = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Family:
    """An architecture of the output, and which dense models fit into it. Names are those below a layer."""

    name: str  # as the recipe's `architecture` calls it
    model_type: str
    model_class: str
    takes: tuple[str, ...]  # model types of the dense models
    count: str  # the config's key for the number of experts
    expert: str
    router: str
    shared: str | None = None
    shared_gate: str | None = None
    projections: Mapping[str, str] = field(default_factory=dict)  # those that have another name there
    biases: tuple[str, ...] = ()  # that the architecture has whether or not the dense model does

    def tensor(self, expert: int | None, projection: str) -> str:
        """The name of a dense projection as an expert's; None is the shared expert."""
        where = self.shared if expert is None else self.expert.format(expert)
        return f"{where}.{self.projections.get(projection, projection)}.weight"

    def objection(self, mixture: Mixture, model_type: str) -> str | None:
        """Why the mixture cannot have this architecture."""
        if model_type not in self.takes:
            return f"takes models of type {', '.join(self.takes)}; these are {model_type}"
        if self.shared is None and mixture.shared:
            return "has no shared experts; the recipe lists one"
        if self.shared is not None and not mixture.shared:
            return "needs one model under `shared_experts`; the recipe lists none"
        return None


FAMILIES = (
    Family(
        "Mixtral", "mixtral", "MixtralForCausalLM", ("llama", "mistral"), "num_local_experts",
        expert="block_sparse_moe.experts.{}", router="block_sparse_moe.gate.weight",
        projections={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    ),
    Family(
        "Qwen MoE", "qwen2_moe", "Qwen2MoeForCausalLM", ("llama", "mistral", "qwen2"), "num_experts",
        expert="mlp.experts.{}", router="mlp.gate.weight", shared="mlp.shared_expert",
        shared_gate="mlp.shared_expert_gate.weight", biases=("q_proj", "k_proj", "v_proj"),
    ),
    Family(
        "Qwen3 MoE", "qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3",), "num_experts",
        expert="mlp.experts.{}", router="mlp.gate.weight",
    ),
)  # fmt: skip
# mergekit writes it with a reference to code on the Hub, which is not run here.
_NOT_IN_TRANSFORMERS = "DeepSeek MoE"


def names() -> list[str]:
    return [family.name for family in FAMILIES]


def named(beginning: str) -> list[Family]:
    """The families whose names begin so, in any case, in the order in which they are tried."""
    return [family for family in FAMILIES if family.name.lower().startswith(beginning.lower())]


def unknown(name: str) -> str:
    """What to say of an `architecture` that none is."""
    listed = f"there are: {', '.join(names())}"
    if _NOT_IN_TRANSFORMERS.lower().startswith(name.lower()):
        return f"{_NOT_IN_TRANSFORMERS} of the first generation has no class in transformers: {listed}"
    near = difflib.get_close_matches(name, names(), n=1)
    return f"no architecture {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; {listed}"


def choose(mixture: Mixture, model_type: str) -> Family:
    """The first family that fits the mixture. Raises MismatchError with what speaks against each."""
    found = {family: family.objection(mixture, model_type) for family in named(mixture.architecture or "")}
    fitting = next((family for family, objection in found.items() if objection is None), None)
    if fitting is None:
        why = "\n".join(f"  {family.name} {objection}" for family, objection in found.items())
        raise MismatchError(f"no architecture of the output fits these models and the recipe:\n{why}")
    return fitting


def config_changes(family: Family, config: Mapping[str, Any], mixture: Mixture, name: str) -> dict[Path, Any]:
    """What makes the dense model's config the mixture's, such that both mean the same by all that they share.

    `name`: of the dense model. A key that it leaves to its model type's default is written out where the new type has
    another one; keys that the new type does not know are removed. Raises MismatchError.
    """
    typed = typed_config(config)
    if typed is None:
        raise MismatchError(f"{name}: transformers cannot read its config.json: is it a model of today's format?")
    known, old = (typed_config({"model_type": t}).to_dict() for t in (family.model_type, config["model_type"]))
    changes: dict[Path, Any] = {("model_type",): family.model_type, ("architectures",): [family.model_class]}
    changes |= {(key,): ABSENT for key in config if key == "auto_map" or (key in old and key not in known)}
    changes.pop(("head_dim",), None)
    changes |= {(key,): value for key, value in _sizes(family, typed, mixture).items()}
    changes |= _head_dim(typed, config, with_changes(config, changes))
    changes |= _defaults(typed, config, with_changes(config, changes))
    return changes | _windows(family, config, with_changes(config, changes), known, name)


def _sizes(family: Family, typed: Any, mixture: Mixture) -> dict[str, Any]:
    found: dict[str, Any] = {family.count: len(mixture.experts), "num_experts_per_tok": mixture.experts_per_token}
    if family.model_type == "mixtral":
        return found
    found |= {"moe_intermediate_size": typed.intermediate_size, "decoder_sparse_step": 1, "mlp_only_layers": []}
    found |= {"norm_topk_prob": True}  # else the chosen experts' weights would not sum to one
    return found | ({"shared_expert_intermediate_size": typed.intermediate_size} if family.shared else {})


def _head_dim(typed: Any, config: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[Path, Any]:
    """Some types have a default of their own, some read what is there even if it is null."""
    usual = typed.hidden_size // typed.num_attention_heads
    wanted = getattr(typed, "head_dim", None) or usual
    own = getattr(typed_config(changed), "head_dim", None) or usual
    if wanted != own:
        return {("head_dim",): wanted}
    return {("head_dim",): ABSENT} if "head_dim" in config and config["head_dim"] is None else {}


# What a type's default may differ in without the weights meaning anything else, or what is dealt with apart.
_APART = frozenset(
    "model_type architectures transformers_version dtype torch_dtype head_dim sliding_window use_sliding_window "
    "max_window_layers layer_types".split()
)


def _defaults(typed: Any, config: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[Path, Any]:
    """Values that the dense model's type gives a key, and the new type another."""
    old, new = typed.to_dict(), typed_config(changed).to_dict()
    shared = (key for key in old if key in new and key not in _APART)
    found: dict[Path, Any] = {(key,): old[key] for key in shared if old[key] != new[key]}
    rope = found.get(("rope_parameters",))
    if rope and "rope_theta" not in config and "rope_theta" in rope:
        found[("rope_theta",)] = rope["rope_theta"]  # older readers look for it there
    return found


def _windows(
    family: Family, config: Mapping[str, Any], changed: Mapping[str, Any], known: Mapping[str, Any], name: str
) -> dict[Path, Any]:
    """What keeps the sliding windows of attention, layer by layer."""
    wanted = attention_windows(config)
    if attention_windows(changed) == wanted:
        return {}
    width = max((window for window in wanted if window), default=None)
    found: dict[Path, Any] = {("sliding_window",): width}
    if "use_sliding_window" in known:
        found[("use_sliding_window",)] = width is not None
    if "layer_types" in known:
        found[("layer_types",)] = ["sliding_attention" if window else "full_attention" for window in wanted]
    if attention_windows(with_changes(changed, found)) != wanted:
        raise MismatchError(
            f"{name}: some of its layers have a sliding window and some have none, which {family.name} cannot have"
        )
    return found


def attention_windows(config: Mapping[str, Any]) -> Sequence[int | None]:
    """Over how many tokens each layer attends; None for all."""
    typed = typed_config(config)
    window = getattr(typed, "sliding_window", None) or None
    kinds = getattr(typed, "layer_types", None) or ["sliding_attention"] * typed.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
