"""The keys of a recipe and their types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt

from ctl_merge.chat_template import TEMPLATES
from ctl_merge.recipe_tokenizer import MODEL, TokenizerSchema

_NAMES = "folder, org/name or org/name@revision; `+` and the same of an adapter after it"
Dtype = Literal["float32", "float16", "bfloat16", "float64"]


class ModelSchema(BaseModel):
    """A model by folder or Hub name in mergekit's long form."""

    model_config = ConfigDict(extra="forbid", strict=True)
    path: str = Field(description="folder or org/name")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")


class LongModelSchema(BaseModel):
    """mergekit's `{model: {path, revision}, lora: {path, revision}}`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: ModelSchema | str
    lora: ModelSchema | str | None = Field(None, description="an adapter that is applied to the model")


class SourceSchema(BaseModel):
    """One model that goes into the merge."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | ModelSchema | LongModelSchema = Field(description=_NAMES)
    parameters: dict[str, Any] | None = Field(None, description="the model's own parameters")
    data: str | list[str] | None = Field(None, description="the model's own text, for methods that measure on text")


class SliceSourceSchema(BaseModel):
    """Layers of one model that go into a slice."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | ModelSchema | LongModelSchema = Field(description=_NAMES)
    layer_range: list[StrictInt] = Field(min_length=2, max_length=2, description="[first, end): end is not in it")
    parameters: dict[str, Any] | None = Field(None, description="the model's own parameters")


class SliceSchema(BaseModel):
    """A run of layers of the output, and what it is merged from."""

    model_config = ConfigDict(extra="forbid", strict=True)
    sources: list[SliceSourceSchema] = Field(min_length=1, description="as many layers of each model")
    base_model: str | ModelSchema | LongModelSchema | None = Field(
        None, description="of this slice, if not the recipe's"
    )
    parameters: dict[str, Any] | None = Field(None, description="of this slice")


class ModuleSchema(BaseModel):
    """A part of a model, such as its vision tower, merged in its own way."""

    model_config = ConfigDict(extra="forbid", strict=True)
    models: list[SourceSchema] | None = Field(None, min_length=1, description="the models that are merged")
    slices: list[SliceSchema] | None = Field(None, min_length=1, description="runs of layers, stacked")
    parameters: dict[str, Any] | None = Field(None, description="of this module")


class DataSchema(BaseModel):
    """Texts on which a method measures the models."""

    model_config = ConfigDict(extra="forbid", strict=True)
    texts: str | list[str] = Field(default_factory=list, description="for models without `data` of their own")
    sequences: int = Field(default=64, ge=1, description="windows of each text")
    length: int = Field(default=256, ge=2, description="tokens of a window")
    inputs: Literal["expert", "base", "merged"] = Field(
        default="expert",
        description="whose activations a layer's inputs are: each model's own, the base's, or the merge's (RegMean++)",
    )


class ProbeSchema(BaseModel):
    """How the merge is to be probed: what `ctl-merge probe` takes as options."""

    model_config = ConfigDict(extra="forbid", strict=True)
    data: list[str] = Field(default_factory=list, description="NAME=FILE:column or org/dataset[/config]:column@split")
    sequences: int = Field(default=64, ge=1, description="windows of each data set")
    length: int | None = Field(default=None, ge=2, description="tokens of a window; unset: 256, or a shorter context")
    chat: bool = Field(False, description="columns are user and assistant turns: use the tokenizer's template")
    join: str = Field("\n", description="between a row's columns")
    end: str = Field("\n\n", description="after each row")
    special_tokens: bool = Field(False, description="put each window between the tokenizer's special tokens")
    patch: bool = Field(False, description="also replace each block's features by the linear ones")
    null_vector: bool = Field(False, description="also probe a random task vector of the same size")
    scaling: bool = Field(False, description="also scale the task vectors down, to see where linearity must hold")
    base: str | None = Field(None, description="the model that the others come from, where the recipe names none")


class LoraSchema(BaseModel):
    """One LoRA adapter, merged from adapters on one base."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rank: Annotated[
        Annotated[StrictInt, Field(ge=1)] | None,
        BeforeValidator(
            lambda value: None if value == "auto" else value, json_schema_input_type=int | Literal["auto"] | None
        ),
    ] = Field(None, description="of each module's matrices at most; `auto`: what the merge has, or `energy` needs")
    energy: float | None = Field(
        None, gt=0, le=1, description="share of a module's squared change that is enough where it is approximated"
    )


class OutputSchema(BaseModel):
    """What is written."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora: LoraSchema = Field(description="`rank` and `energy` of the adapter, or {}")


class RecipeSchema(BaseModel):
    """A merge: the method, the models, their parameters."""

    model_config = ConfigDict(extra="forbid", strict=True)
    merge_method: str = Field(description="see `ctl-merge methods`")
    name: str | None = Field(None, description="by which later documents of the file name this merge as a model")
    models: list[SourceSchema] | None = Field(None, min_length=1, description="the models that are merged")
    slices: list[SliceSchema] | None = Field(None, min_length=1, description="runs of layers, stacked into a new depth")
    modules: dict[str, ModuleSchema] | None = Field(
        None, min_length=1, description="parts of the model by the beginning of their tensors' names; `default`: all"
    )
    base_model: str | ModelSchema | LongModelSchema | None = Field(
        None, description="the model that task vectors are differences from; gives config and tokenizer"
    )
    parameters: dict[str, Any] | None = Field(None, description="shared parameters, and defaults of per-model ones")
    dtype: Dtype | None = Field(
        None, description="dtype of the merged weights (arithmetic is float64); base's if unset"
    )
    out_dtype: Dtype | None = Field(None, description="dtype of the merged weights; wins over `dtype`")
    tokenizer_source: Any = Field(
        None, description="whose vocabulary: `base`, `union` of all, or a model's", json_schema_extra=MODEL
    )
    tokenizer: TokenizerSchema | None = Field(None, description="the same, with sources of single tokens' rows")
    chat_template: str | None = Field(
        None, description=f"`auto` (what most models have), {', '.join(TEMPLATES)}, or a template in jinja"
    )
    data: DataSchema | None = Field(None, description="texts for methods that measure the models on text")
    probe: ProbeSchema | None = Field(None, description="how `--probe` and `ctl-merge probe` look at the merge")
    output: Annotated[
        OutputSchema | None,
        BeforeValidator(
            lambda value: {"lora": {}} if value == "lora" else value,
            json_schema_input_type=OutputSchema | Literal["lora"] | None,
        ),
    ] = Field(None, description="`lora`: one adapter, merged from adapters on one base, instead of a model")
    seed: StrictInt = Field(0, ge=0, description="seed of the methods that draw random numbers")
    missing: Literal["error", "base", "skip"] = Field(
        "error", description="tensors that only some models have: refuse, take the base's, or leave them out"
    )
    nonfinite: Literal["error", "allow"] = Field(
        "error", description="NaN or infinity in an input: refuse, or let it through"
    )
