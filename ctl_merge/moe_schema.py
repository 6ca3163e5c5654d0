"""Keys of a mixture-of-experts recipe, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, StrictInt, ValidationError

from ctl_merge.methods.parameters import NUMBER
from ctl_merge.mixture import GATE_MODES, RANDOM, Expert, GateMode, Mixture
from ctl_merge.moe_families import named, names, unknown
from ctl_merge.problems import Place, Problems, nearest
from ctl_merge.recipe_schema import Dtype
from ctl_merge.reference import ModelRef

_MODEL: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "object"}]}


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-1, without a point, for text; and people put numbers in quotes."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


Number = Annotated[FiniteFloat, BeforeValidator(_number)]
Size = Annotated[FiniteFloat, Field(ge=0), BeforeValidator(_number)]
Prompts = list[Annotated[str, Field(min_length=1)]]


class ExpertSchema(BaseModel):
    """One expert: a dense model, and what it is for."""

    model_config = ConfigDict(extra="forbid", strict=True)
    source_model: Any = Field(description="folder, org/name or org/name@revision", json_schema_extra=_MODEL)
    positive_prompts: Prompts | None = Field(None, description="texts that this expert is for")
    negative_prompts: Prompts | None = Field(None, description="texts that it is not for")
    noise_scale: Size | None = Field(None, description="standard deviation of noise on its weights")
    residual_scale: Number | None = Field(None, description="factor of what it adds to the residual stream")


class MixtureSchema(BaseModel):
    """A mixture of experts: dense models of one base, and how a router chooses among them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    base_model: Any = Field(
        description="gives everything but the experts: attention, norms, embeddings, tokenizer",
        json_schema_extra=_MODEL,
    )
    experts: list[ExpertSchema] = Field(min_length=1, description="the models among which the router chooses")
    shared_experts: list[ExpertSchema] | None = Field(None, description="an expert that every token goes through")
    gate_mode: GateMode = Field("hidden", description="of what the router's weights are made")
    experts_per_token: Annotated[StrictInt, Field(ge=1)] = Field(2, description="experts that a token goes through")
    architecture: str | None = Field(None, description=f"of the output: {', '.join(names())}")
    dtype: Dtype | None = Field(None, description="dtype of the weights; the base's if unset")
    name: str | None = Field(None, description="by which later documents of the file name this model")
    seed: StrictInt = Field(0, ge=0, description="seed of random gates and noise")
    nonfinite: Literal["error", "allow"] = Field(
        "error", description="NaN or infinity in an input: refuse, or let it through"
    )


class MixtureChecker:
    """Turns a document into a mixture; `ref` parses a model, `problems` and `warnings` get what there is to say."""

    def __init__(self, ref: Callable[[Place, Any], ModelRef | None], problems: Problems, warnings: list[str]) -> None:
        self._parse, self.problems, self.warnings = ref, problems, warnings

    def check(self, data: Mapping[str, Any]) -> tuple[MixtureSchema, ModelRef, Mixture] | None:
        """The keys, the base and the mixture; None where something is wrong, which `problems` then tells."""
        schema = self._schema(data)
        base = self._ref(("base_model",), data.get("base_model")) if "base_model" in data else None
        experts = tuple(self._experts("experts", data))
        shared = tuple(self._experts("shared_experts", data))
        if schema is None:
            return None
        self._check_whole(schema)
        if base is None or self.problems:
            return None
        mixture = Mixture(experts, shared, schema.gate_mode, schema.experts_per_token, schema.architecture)
        self._warn(mixture)
        return schema, base, mixture

    def _schema(self, data: Mapping[str, Any]) -> MixtureSchema | None:
        try:
            return MixtureSchema.model_validate(data)
        except ValidationError as error:
            for problem in error.errors():
                path = tuple(problem["loc"])
                self.problems.append((path, _said(path, problem["type"], problem["msg"], problem["input"])))
            return None

    def _ref(self, path: Place, raw: Any) -> ModelRef | None:
        before = len(self.problems)
        found = self._parse(path, raw) if isinstance(raw, str | dict) else None
        if found is None and len(self.problems) == before:
            self.problems.append((path, f"`{path[-1]}` is a folder, org/name or org/name@revision, not {raw!r}"))
        return found

    def _experts(self, key: str, data: Mapping[str, Any]) -> Iterable[Expert]:
        listed = data.get(key)
        for index, raw in enumerate(listed if isinstance(listed, list) else []):
            if not isinstance(raw, dict) or "source_model" not in raw:
                continue  # the schema has said so
            ref = self._ref((key, index, "source_model"), raw["source_model"])
            try:
                own = ExpertSchema.model_validate(raw)
            except ValidationError:
                continue
            if ref is not None:
                yield Expert(
                    ref, tuple(own.positive_prompts or ()), tuple(own.negative_prompts or ()),
                    own.noise_scale or 0.0, 1.0 if own.residual_scale is None else own.residual_scale,
                )  # fmt: skip

    def _check_whole(self, schema: MixtureSchema) -> None:
        """What no key alone can tell."""
        count, each = len(schema.experts), schema.experts_per_token
        if each > count:
            self.problems.append((("experts_per_token",), f"{each} experts per token, of {count}: list as many"))
        if schema.architecture is not None and not named(schema.architecture):
            self.problems.append((("architecture",), unknown(schema.architecture)))
        if len(schema.shared_experts or ()) > 1:
            self.problems.append((("shared_experts", 1), "no architecture has more than one shared expert: keep one"))
        if schema.gate_mode not in RANDOM:
            self._check_prompts(schema)

    def _check_prompts(self, schema: MixtureSchema) -> None:
        for key, experts in (("experts", schema.experts), ("shared_experts", schema.shared_experts or [])):
            for index, expert in enumerate(experts):
                if not expert.positive_prompts:
                    self.problems.append(
                        ((key, index), f"`gate_mode: {schema.gate_mode}` makes gates of prompts, and "
                         f"{expert.source_model} has none: give it `positive_prompts`, texts as this expert is to "
                         "answer, or set `gate_mode: random` for a model that you train")
                    )  # fmt: skip
        prompts = {(tuple(e.positive_prompts or ()), tuple(e.negative_prompts or ())) for e in schema.experts}
        if len(schema.experts) > 1 and len(prompts) == 1 and schema.experts[0].positive_prompts:
            self.problems.append(
                (("experts", 1), "all experts have the same prompts, so that the router could not tell them apart: "
                 "give each the texts that it is for")
            )  # fmt: skip

    def _warn(self, mixture: Mixture) -> None:
        if not mixture.from_prompts and any(expert.positive or expert.negative for expert in mixture.everyone):
            self.warnings.append(f"`gate_mode: {mixture.gate_mode}` draws the gates: prompts have no effect")
        if len({expert.ref for expert in mixture.experts}) == 1 and not any(e.noise_scale for e in mixture.experts):
            self.warnings.append(
                "all experts are one model: until it is trained, the output computes what that model's feed-forward "
                "layers do, at a higher price"
            )


def _said(path: Place, kind: str, message: str, value: Any) -> str:
    """A problem of the schema in words."""
    name = str(path[-1]) if path else ""
    if kind == "extra_forbidden":
        known = MixtureSchema.model_fields if len(path) == 1 else ExpertSchema.model_fields
        return f"unknown key {name!r}{nearest(name, known)}; there are: {', '.join(known)}"
    if kind == "missing":
        return f"`{name}` is missing"
    if kind == "model_type":
        return f"an expert is a mapping with `source_model` and `positive_prompts`, not {value!r}"
    if name == "gate_mode":
        return f"no gate_mode {value!r}{nearest(str(value), GATE_MODES)}; there are: {', '.join(GATE_MODES)}"
    return f"`{'.'.join(map(str, path))}`: {message[:1].lower()}{message[1:]} (it is {value!r})"
