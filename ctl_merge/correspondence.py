"""Which tensors of the models belong together.

The first model (the base, if there is one) names the output's tensors. Another model's tensor corresponds to it by
name; where names differ, by the module parameter that both stand for; where a model ties a tensor, by the one that is
stored in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ctl_merge.architecture import ModuleMap, ties_embeddings
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.errors import MismatchError
from ctl_merge.header import MERGEABLE, TensorSpec
from ctl_merge.layers import block_index, natural
from ctl_merge.model_config import vocab_size
from ctl_merge.recipe import Recipe
from ctl_merge.reference import ModelRef
from ctl_merge.token_rows import Input

# Buffers that models compute from their config: older checkpoints store them, and no reader needs them.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.masked_bias$|embeddings\.position_ids$")
_POSITIONS = re.compile(r"(^|[._])(wpe|pos|positions?)([._]|$)")  # tables of places, which may be as long
_MASK = re.compile(r"\.(attn|attention)\.bias$")  # GPT-2's causal mask; other models learn biases of that name


def _is_computed(name: str, spec: TensorSpec) -> bool:
    square = len(spec.shape) == 4 and spec.shape[-1] == spec.shape[-2]
    return bool(_COMPUTED.search(name) or (square and _MASK.search(name)))


@dataclass(frozen=True)
class Correspondence:
    """The output's tensors with each model's part in them, and what was decided on the way, in words.

    `inputs`: each part as the model's own files have it. `specs`: the first model's. `kinds`: each part's dtype.
    `axes`: of the tokens, in tables that have one row a token.
    """

    inputs: Mapping[str, Mapping[ModelRef, Input]]
    specs: Mapping[str, TensorSpec]
    kinds: Mapping[str, Mapping[ModelRef, str]]
    axes: Mapping[str, int]
    tied: Mapping[str, str]  # output tensors that models may tie, with the one stored in their place
    computed: frozenset[str]  # buffers that follow from the config
    decisions: tuple[str, ...]
    warnings: tuple[str, ...]


def correspond(recipe: Recipe, checkpoints: Mapping[ModelRef, FileCheckpoint]) -> Correspondence:
    """Match the tensors of all models. Raises MismatchError where the recipe does not say what to do."""
    _check_architectures(recipe.refs, checkpoints)
    matcher = _Matcher(recipe, checkpoints)
    matcher.match_names()
    matcher.match_shapes()
    return matcher.result()


def _check_architectures(refs: Iterable[ModelRef], checkpoints: Mapping[ModelRef, FileCheckpoint]) -> None:
    first, *others = refs
    expected = checkpoints[first].config.get("model_type")
    for ref in (first, *others):
        config = checkpoints[ref].config
        if config.get("quantization_config"):
            raise MismatchError(f"{ref} is quantised (its config.json says so): name the unquantised model")
        if config.get("model_type") != expected:
            raise MismatchError(
                f"different architectures: {first} is {expected!r}, {ref} is {config.get('model_type')!r}. "
                "Only checkpoints that share a base model can be merged."
            )


# What changes the function that the same weights compute.
_FUNCTIONAL = (
    "num_attention_heads num_key_value_heads head_dim hidden_act rms_norm_eps layer_norm_eps rope_theta rope_scaling "
    "rope_parameters sliding_window"
).split()


def _config_warnings(refs: Iterable[ModelRef], checkpoints: Mapping[ModelRef, FileCheckpoint]) -> list[str]:
    """Where the same shapes do not mean the same function: settings that two configs both state, differently."""
    first, *others = refs
    own = checkpoints[first].config
    found = []
    for ref in others:
        config = checkpoints[ref].config
        differing = [key for key in _FUNCTIONAL if key in own and key in config and own[key] != config[key]]
        if differing:
            listed = ", ".join(f"{key} ({own[key]} and {config[key]})" for key in differing)
            found.append(
                f"{first} and {ref} were trained with different settings, of which the first's are kept: {listed}"
            )
    return found


def few(names: Iterable[str], limit: int = 5) -> str:
    """The first names of a list and how many more there are."""
    names = sorted(names, key=natural)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class _Matcher:
    def __init__(self, recipe: Recipe, checkpoints: Mapping[ModelRef, FileCheckpoint]) -> None:
        self.recipe, self.checkpoints = recipe, checkpoints
        self.first, *self.others = recipe.refs
        self.config = checkpoints[self.first].config
        self.inputs = {name: {self.first: Input(self.first, name)} for name in checkpoints[self.first].tensors}
        self.tied: dict[str, str] = {}
        self.axes: dict[str, int] = {}  # of the tokens, in tensors that have one row a token
        self.decisions: list[str] = []
        self.warnings = _config_warnings(recipe.refs, checkpoints)
        self._modules: ModuleMap | None = None

    @property
    def modules(self) -> ModuleMap:
        """The model's own view of names: made only where names or ties leave a question, as it loads transformers."""
        if self._modules is None:
            self._modules = ModuleMap(self.config)
        return self._modules

    def result(self) -> Correspondence:
        own = self.checkpoints[self.first].tensors
        specs = {name: self._spec(name) for name in self.inputs}
        computed = {name for name, spec in specs.items() if _is_computed(name, spec) and "F" in spec.dtype}
        if computed:
            self.decisions.append(f"{len(computed)} stored buffers that the model computes are {self.first}'s")
        return Correspondence(
            inputs=self._stored_inputs(), specs={n: own[parts[self.first].tensor] for n, parts in self.inputs.items()},
            axes=self.axes, kinds=self._kinds(), tied=self.tied, computed=frozenset(computed),
            decisions=tuple(self.decisions), warnings=tuple(self.warnings),
        )  # fmt: skip

    def _stored_inputs(self) -> dict[str, dict[ModelRef, Input]]:
        """Every part as its model's own files have it, where it was matched through a view of them."""
        return {
            name: {ref: Input(*self.checkpoints[part.model].stored(part.tensor)) for ref, part in parts.items()}
            for name, parts in self.inputs.items()
        }

    def _kinds(self) -> dict[str, dict[ModelRef, str]]:
        return {name: {ref: self._spec(name, ref).dtype for ref in parts} for name, parts in self.inputs.items()}

    def _spec(self, name: str, ref: ModelRef | None = None) -> TensorSpec:
        part = self.inputs[name][ref or self.first]
        return self.checkpoints[part.model].tensors[part.tensor]

    # ---- names

    def match_names(self) -> None:
        """Give every output tensor a part of every model."""
        self._find_ties()
        for ref in self.others:
            self._match(ref)
        for name in list(self.inputs):
            missing = [ref for ref in self.recipe.refs if ref not in self.inputs[name]]
            if missing:
                self._settle_missing(name, missing)
        left = [name for name in self.checkpoints[self.first].tensors if name not in self.inputs]
        if left and self.recipe.missing == "error":
            self.decisions.append(f"{self.first}: {len(left)} stored buffers that the model computes are left out")
        self._report_missing()

    def _find_ties(self) -> None:
        """Tensors that some model ties to another and some model stores apart become tensors of the output."""
        tables = {ref: self.checkpoints[ref].tensors for ref in self.recipe.refs}
        differ = any(set(table) != set(tables[self.first]) for table in tables.values())
        rows = [
            s.shape
            for n, s in tables[self.first].items()
            if len(s.shape) == 2 and s.shape[0] == vocab_size(self.config)
        ]
        if not differ and not (len(rows) > len(set(rows)) and ties_embeddings(self.config)):
            return
        names = {ref: self.modules.parameters(table) for ref, table in tables.items()}
        stored = {ref: {parameter: name for name, parameter in own.items()} for ref, own in names.items()}
        for target, source in self.modules.tied().items():
            holders = [ref for ref in tables if target in stored[ref]]
            if not holders or any(source not in stored[ref] for ref in tables):
                continue
            lacking = [ref for ref in tables if target not in stored[ref]]
            if self.modules.is_head(target) and not all(ties_embeddings(self.checkpoints[r].config) for r in lacking):
                continue  # saved without its head: the embedding is not what it would compute with
            name = stored[holders[0]][target]
            self.inputs[name] = {
                ref: Input(ref, stored[ref].get(target, stored[ref][source])) for ref in self.recipe.refs
            }
            if ties_embeddings(self.config):
                self.tied[name] = stored[self.first][source]
                self.decisions.append(
                    f"{name} is tied to {self.tied[name]} by the config and stored apart by {few(map(str, holders))}: "
                    "written only where the two differ, which the weights will tell"
                )
        self._stored = stored

    def _match(self, ref: ModelRef) -> None:
        table = self.checkpoints[ref].tensors
        unmatched = []
        for name, parts in self.inputs.items():
            if ref not in parts and name in table:
                parts[ref] = Input(ref, name)
            elif ref not in parts:
                unmatched.append(name)
        if unmatched:
            parameters = self.modules.parameters(unmatched)
            for name in unmatched:
                other = self._stored[ref].get(parameters[name])
                if other is not None:
                    self.inputs[name][ref] = Input(ref, other)
            renamed = [name for name in unmatched if ref in self.inputs[name]]
            if renamed:
                self.decisions.append(
                    f"{ref} names {len(renamed)} tensors differently: matched by module ({renamed[0]}, …)"
                )

    def _settle_missing(self, name: str, missing: list[ModelRef]) -> None:
        """What the recipe says of a tensor that only some models have."""
        if self.recipe.missing == "base":
            for ref in missing:
                self.inputs[name][ref] = Input(self.first, self.inputs[name][self.first].tensor)
        elif self.recipe.missing == "skip" or _is_computed(name, self._spec(name)):
            del self.inputs[name]
        if self.recipe.missing != "error":
            what = "the base's is used" if self.recipe.missing == "base" else "left out"
            if self.recipe.missing == "skip":
                self.warnings.append(f"the output lacks {name}: transformers will make it up at random")
            self.decisions.append(
                f"{name} is missing in {few(map(str, missing))}: {what} (missing: {self.recipe.missing})"
            )

    def _report_missing(self) -> None:
        """Refuse what is left: no tensor of any input goes without a word."""
        problems = []
        for ref in self.others:
            used = {parts[ref].tensor for parts in self.inputs.values() if ref in parts}
            extra = [name for name in self.checkpoints[ref].tensors if name not in used]
            computed = {name for name in extra if _is_computed(name, self.checkpoints[ref].tensors[name])}
            extra = [name for name in extra if name not in computed]
            lacking = [name for name, parts in self.inputs.items() if ref not in parts]
            if computed:
                self.decisions.append(f"{ref}: {len(computed)} stored buffers that the model computes are left out")
            if extra and self.recipe.missing != "error":
                self.decisions.append(f"{ref}: left out, as {self.first} lacks them: {few(extra)}")
            elif extra:
                problems.append(f"{ref} has {len(extra)} tensors that {self.first} lacks: {few(extra)}")
            if lacking:
                problems.append(f"{ref} lacks {len(lacking)} tensors that {self.first} has: {few(lacking)}")
        if problems:
            raise MismatchError(
                "the models do not have the same tensors:\n  " + "\n  ".join(problems) + "\nIf that is meant, set "
                "`missing: base` (the base's tensors stand in) or `missing: skip` (only common tensors are written)."
            )

    # ---- shapes and vocabulary

    def match_shapes(self) -> None:
        """Check every model's shapes; the rows of tables with one row a token are the vocabulary's to decide."""
        in_blocks = block_index(self.inputs, self.config)
        axes = {name: self._row_axis(name) for name in self.inputs if name not in in_blocks}
        for ref in self.others:
            for name in self.inputs:
                own, theirs = self._spec(name).shape, self._spec(name, ref).shape
                axis = axes.get(name)
                if own != theirs and (axis is None or _without(own, axis) != _without(theirs, axis)):
                    raise MismatchError(
                        f"{name} has shape {list(own)} in {self.first} and "
                        f"{list(theirs)} in {ref}: they do not come from the same base"
                    )
        self.axes = {name: axis for name, axis in sorted(axes.items()) if axis is not None}

    def _row_axis(self, name: str) -> int | None:
        """The axis of the tokens in a table; None for other tensors."""
        spec, size = self._spec(name), vocab_size(self.config)
        axis = 1 if len(spec.shape) == 2 and spec.shape[0] == 1 and name.endswith("bias") else 0
        is_table = len(spec.shape) == 2 or (len(spec.shape) == 1 and name.endswith("bias"))
        if not is_table or size is None or spec.shape[axis] < size or spec.dtype not in MERGEABLE:
            return None
        return None if _POSITIONS.search(name) else axis


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
