"""An adapter's tensors, matched to those that they change."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from ctl_merge.adapter_config import AdapterConfig
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.errors import CheckpointError
from ctl_merge.header import MERGEABLE, TensorSpec
from ctl_merge.layers import natural
from ctl_merge.low_rank import LowRank
from ctl_merge.parameter_names import ParameterNames, Place

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(\.weight)?|token_adapter\.trainable_tokens_delta)"
)
_INNER = ".base_layer"  # a module that PEFT has wrapped
_OUTER = re.compile(r"\.modules_to_save(\.default)?")  # as older versions saved what it replaces
_BEFORE = ".original_module."  # the base's own weights, which PEFT sometimes saves beside those that replace them


@dataclass(frozen=True, slots=True)
class Change:
    """How a tensor comes about: from the base's `own`, or from `stored` of the adapter (a tensor, its first element).

    Then what is added: `low_rank`; `shift`, a vector of the adapter and its factor; `rows` that are replaced: a tensor
    of the adapter, and in order each row with that of the adapter's which it becomes.
    """

    spec: TensorSpec
    own: str | None = None
    stored: tuple[str, int] | None = None
    low_rank: LowRank | None = None
    shift: tuple[str, float] | None = None
    rows: tuple[str, tuple[tuple[int, int], ...]] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The adapter's tensors that are read for every piece of this one."""
        low = self.low_rank
        parts = (low and low.a, low and low.b, self.shift and self.shift[0], self.rows and self.rows[0])
        return tuple(part for part in parts if part)

    @property
    def alters(self) -> bool:
        """Whether the tensor differs from the base's, and is not only stored apart from what it was tied to."""
        return bool(self.stored or self.low_rank or self.shift or self.rows)

    @property
    def is_sum(self) -> bool:
        """Whether it is the base's tensor and something that does not depend on that."""
        return not (self.stored or self.rows or (self.low_rank and self.low_rank.magnitude))


class Matcher:
    """Matches the adapter to its base. Raises CheckpointError where a tensor of it fits nowhere."""

    def __init__(self, base: FileCheckpoint, adapter: FileCheckpoint, config: AdapterConfig) -> None:
        self.base, self.adapter, self.config = base, adapter, config
        self.names = ParameterNames(base.tensors, base.config)
        self.changes: dict[str, Change] = {}
        self.added: list[str] = []  # tensors that the base lacks
        self._unmatched: list[str] = []
        self._parts: dict[str, dict[str, str]] = defaultdict(dict)

    def match(self) -> Mapping[str, Change]:
        """Every tensor that the adapter changes or brings, by its name in the files."""
        for key in self.adapter.tensors:
            name = key.removeprefix(_PREFIX)
            part = _PART.fullmatch(name)
            if _BEFORE in name:
                continue
            if name == key or (not part and ("lora_" in name or "token_adapter" in name)):
                self._unmatched.append(key)
            elif part:
                self._check_dtype(key)
                self._parts[part["module"]][part["part"].removesuffix(".weight")] = key
            else:
                self._replace(_OUTER.sub("", name.replace(_INNER, "")), key)
        nested: dict[str, list[dict[str, str]]] = defaultdict(list)
        for module, keys in self._parts.items():
            nested[module.replace(_INNER, "")].append(keys)
        self._transposes = self.config.fan_in_fan_out or any(map(self._is_transposed, nested.items()))
        for module, every in nested.items():
            self._match_module(module, every)
        if self._unmatched:
            listed = ", ".join(sorted(self._unmatched, key=natural)[:5])
            raise CheckpointError(
                f"{self.adapter.name}: {len(self._unmatched)} tensors of the adapter belong to nothing in "
                f"{self.base.name}: {listed}{', …' if len(self._unmatched) > 5 else ''}. Was it trained on this model?"
            )
        if not self.changes:
            raise CheckpointError(f"{self.adapter.name}: the adapter holds no tensors")
        self._follow_ties()
        return self.changes

    def _check_dtype(self, key: str) -> None:
        dtype = self.adapter.tensors[key].dtype
        if dtype not in MERGEABLE:
            raise CheckpointError(f"{self.adapter.name}: {key} is {dtype}: save the adapter in floating point")

    @property
    def resized(self) -> int | None:
        """How many rows the base's tables of tokens have now; None where they have as many as before."""
        base = self.base.tensors
        rows = {
            change.spec.shape[0]: name
            for name, change in self.changes.items()
            if change.stored and name in base and change.spec.shape != base[name].shape
        }
        if len(rows) > 1:
            listed = ", ".join(f"{name} {count}" for count, name in rows.items())
            raise CheckpointError(f"{self.adapter.name}: its tables have different numbers of rows: {listed}")
        return next(iter(rows), None)

    @property
    def changes_tokens(self) -> bool:
        """Whether the adapter changes rows of tokens, so that they are no longer the base's."""
        return any(self.names.is_table(change.own or name) for name, change in self.changes.items())

    # ---- whole tensors

    def _shape(self, places: list[Place]) -> tuple[int, ...]:
        """The shape of the parameter that is made up of these."""
        first = self._own(places[0])
        if places[0].expert is None:
            return first.shape
        count = places[0].experts
        rows = sum(self._own(place).shape[0] for place in places) // count
        return (count, rows, *first.shape[1:])

    def _own(self, place: Place) -> TensorSpec:
        """What the base stores, or what the adapter brings in its place."""
        change = self.changes.get(place.name)
        return change.spec if change else self.base.tensors[place.own]

    def _replace(self, parameter: str, key: str) -> None:
        spec, places = self.adapter.tensors[key], self.names.places(parameter)
        if not places:
            if not self.config.saves(parameter):
                self._unmatched.append(key)
                return
            self.added.append(parameter)
            self.changes[parameter] = Change(spec, stored=(key, 0))
            return
        shape = self._shape(places)
        resized = shape[1:] == spec.shape[1:] and self.names.is_table(places[0].own)
        if shape != spec.shape and not resized:
            self._refuse(key, spec.shape, places[0].name, shape)
        for place in places:
            own = self.base.tensors[place.own]
            if place.expert is None:
                self.changes[place.name] = Change(TensorSpec(own.dtype, spec.shape), stored=(key, 0))
            else:
                first = (place.expert * shape[1] + place.row) * prod(shape[2:])
                self.changes[place.name] = Change(own, stored=(key, first))

    def _refuse(self, key: str, theirs: tuple[int, ...], name: str, own: tuple[int, ...]) -> None:
        raise CheckpointError(
            f"{self.adapter.name}: {key} has shape {list(theirs)} and does not fit {name}, which has {list(own)} in "
            f"{self.base.name}: it was trained on another model"
        )

    # ---- low ranks and rows

    def _match_module(self, module: str, every: list[dict[str, str]]) -> None:
        """The parts of one module: several where several of its parameters have an adapter each."""
        for keys in every:
            bare = {kind for kind in keys if kind not in ("lora_B.bias", "lora_magnitude_vector")}
            if bare == {"token_adapter.trainable_tokens_delta"} and bare == keys.keys():
                self._replace_rows(module, keys["token_adapter.trainable_tokens_delta"])
            elif bare == {"lora_embedding_A", "lora_embedding_B"}:
                self._add_low_rank(f"{module}.weight", module, keys, "lora_embedding_A", "lora_embedding_B")
            elif bare == {"lora_A", "lora_B"}:
                parameter = self._target(module, keys)
                if parameter is None:
                    self._unmatched += keys.values()
                else:
                    named = parameter if self._names_parameter(parameter) else module
                    self._add_low_rank(parameter, named, keys, "lora_A", "lora_B")
            else:
                raise CheckpointError(
                    f"{self.adapter.name}: the adapter of {module} has only {', '.join(sorted(keys))}: a part is "
                    "missing, or it is one of a kind that cannot be read"
                )

    def _names_parameter(self, parameter: str) -> bool:
        return any(f".{parameter}".endswith(f".{name}") for name in self.config.target_parameters or ())

    def _target(self, module: str, keys: Mapping[str, str]) -> str | None:
        """The parameter of the module that A and B belong to, by name and shape."""
        if self.names.places(f"{module}.weight"):
            return f"{module}.weight"
        leaves = dict.fromkeys(name.rpartition(".")[2] for name in self.config.target_parameters or ())
        fitting = []
        for parameter in (f"{module}.{leaf}" for leaf in leaves):
            places = self.names.places(parameter)
            if places and self._orientation(self._shape(places), *self._sizes(keys["lora_A"], keys["lora_B"])):
                fitting.append(parameter)
        if len(fitting) > 1:
            raise CheckpointError(
                f"{self.adapter.name}: {keys['lora_A']} fits {' and '.join(fitting)}, so that it cannot be told which "
                "of them it belongs to"
            )
        return fitting[0] if fitting else None

    def _sizes(self, a: str, b: str) -> tuple[int, int]:
        """How many inputs and outputs A and B have."""
        first, second = self.adapter.tensors[a].shape, self.adapter.tensors[b].shape
        return prod(first[1:]), second[0] if second else 0

    def _orientation(self, shape: tuple[int, ...], inputs: int, outputs: int) -> set[bool]:
        """Whether the matrix is stored transposed, (inputs, outputs): what its shape allows."""
        if self._stacked(shape):
            shape = shape[1:]
        elif len(shape) > 2:  # a convolution's kernel
            return {False} if (shape[0], prod(shape[1:])) == (outputs, inputs) else set()
        ways = {False: (outputs, inputs), True: (inputs, outputs)}
        return {way for way, own in ways.items() if own == shape}

    def _stacked(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape of three numbers is of experts, and not of a convolution: PEFT names those parameters."""
        return bool(self.config.target_parameters) and len(shape) == 3

    def _add_low_rank(self, parameter: str, named: str, keys: Mapping[str, str], a: str, b: str) -> None:
        places = self.names.places(parameter)
        if not places:
            self._unmatched += keys.values()
            return
        shape = self._shape(places)
        inputs, outputs = self._sizes(keys[a], keys[b])
        ways = self._orientation(shape, inputs, outputs)
        if a == "lora_embedding_A":
            ways &= {True}
        experts = shape[0] if self._stacked(shape) else 1
        rank, scale = self.config.rank(named), self.config.scale(named)
        if not ways:
            self._refuse(f"{keys[a]}, {keys[b]}: B A", (outputs, inputs), places[0].name, shape)
        self._check_rank(keys[a], keys[b], rank * experts)
        transposed = True in ways if len(ways) == 1 else self._stores_transposed(parameter, len(shape) == 3)
        magnitude = keys.get("lora_magnitude_vector")
        if self.config.use_dora and not magnitude:
            raise CheckpointError(f"{self.adapter.name}: {named} lacks its lora_magnitude_vector, which DoRA has")
        if magnitude and (experts > 1 or self.adapter.tensors[magnitude].numel != outputs):
            self._refuse(magnitude, self.adapter.tensors[magnitude].shape, places[0].name, shape)
        low = LowRank(keys[a], keys[b], scale, rank, transposed, experts, magnitude=magnitude)
        for place in places:
            self._change(place, low_rank=replace(low, expert=place.expert, row=place.row))
        if "lora_B.bias" in keys:
            self._shift(parameter.removesuffix("weight") + "bias", keys["lora_B.bias"], scale)

    def _check_rank(self, a: str, b: str, rank: int) -> None:
        first, second = self.adapter.tensors[a], self.adapter.tensors[b]
        if first.shape[0] != rank or len(second.shape) < 2 or prod(second.shape[1:]) != rank:
            raise CheckpointError(
                f"{self.adapter.name}: adapter_config.json asks for rank {rank} of {a}, but it has shape "
                f"{list(first.shape)}, and B {list(second.shape)}"
            )

    def _is_transposed(self, module: tuple[str, list[dict[str, str]]]) -> bool:
        """Whether a layer's matrix can only be stored transposed: then those of square layers may be so, too."""
        name, (keys, *_) = module
        own = self.base.tensors.get(f"{name}.weight")
        if own is None or not {"lora_A", "lora_B"} <= keys.keys():
            return False
        return self._orientation(own.shape, *self._sizes(keys["lora_A"], keys["lora_B"])) == {True}

    def _stores_transposed(self, parameter: str, stack: bool) -> bool:
        """Of a square matrix, whether its rows are the inputs: as in GPT-2, and in experts that say so."""
        if not stack and not self._transposes:
            return False
        module = self.names.module_of(parameter)
        if stack:
            return bool(getattr(module, "is_transposed", False))
        return module is None or type(module).__name__ == "Conv1D"

    def _shift(self, parameter: str, key: str, scale: float) -> None:
        places = self.names.places(parameter)
        if not places:
            raise CheckpointError(
                f"{self.adapter.name}: {key} is added to {parameter}, which {self.base.name} lacks: PEFT cannot merge "
                "it either (lora_bias)"
            )
        if self._own(places[0]).shape != self.adapter.tensors[key].shape:
            self._refuse(key, self.adapter.tensors[key].shape, parameter, self._own(places[0]).shape)
        self._change(places[0], shift=(key, scale))

    def _replace_rows(self, module: str, key: str) -> None:
        rows, places = self.config.tokens(module), self.names.places(f"{module}.weight")
        if not places or places[0].expert is not None or rows is None:
            self._unmatched.append(key)
            return
        shape, spec = self._own(places[0]).shape, self.adapter.tensors[key]
        if spec.shape != (len(rows), *shape[1:]):
            self._refuse(key, spec.shape, f"{len(rows)} rows of {places[0].name}", shape)
        if len(set(rows)) < len(rows) or not all(0 <= row < shape[0] for row in rows):
            raise CheckpointError(
                f"{self.adapter.name}: trainable_token_indices names rows twice, or rows that {places[0].name} with "
                f"its {shape[0]} rows does not have"
            )
        self._change(places[0], rows=(key, tuple(sorted((row, place) for place, row in enumerate(rows)))))

    def _change(self, place: Place, **what: object) -> None:
        change = self.changes.get(place.name) or Change(self.base.tensors[place.own], own=place.own)
        if change.low_rank or change.rows or (what.get("shift") and change.shift):
            raise CheckpointError(
                f"{self.adapter.name} changes {place.name} in two ways, and does not say which comes first"
            )
        if change.spec.dtype not in MERGEABLE:
            raise CheckpointError(
                f"{self.base.name}: {place.name} is {change.spec.dtype}, to which no adapter can be added: name the "
                "unquantised model"
            )
        self.changes[place.name] = replace(change, **what)  # type: ignore[arg-type]

    # ---- ties

    def _follow_ties(self) -> None:
        """Untie what the adapter changes on one side only, as the model that it was trained in computes."""
        if not self.changes_tokens:
            return
        for target, source in self.names.ties.items():
            changed = self.changes.get(source)
            if not changed or target in self.changes or (changed.low_rank is None and changed.stored is None):
                continue  # both have changes of their own, or new rows that are those of both
            if changed.spec.shape != self.base.tensors[source].shape:
                raise CheckpointError(
                    f"{self.adapter.name}: {source} has other rows than in {self.base.name}, and the adapter does not "
                    f"hold {target}, which is tied to it: save both (PEFT: save_embedding_layers=True)"
                )
            self.changes[target] = Change(self.base.tensors[source], own=source)
        for target, source in self.names.stored_ties():
            rows = self.changes.get(source)
            if rows and rows.rows and target not in self.changes:
                self.changes[target] = Change(self.base.tensors[target], own=target, rows=rows.rows)
