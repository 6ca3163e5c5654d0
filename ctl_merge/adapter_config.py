"""What an adapter's config says; other kinds refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ctl_merge.errors import CheckpointError

_ADVICE = "merge it into its base with PEFT (merge_and_unload) and name the result"
# Variants of LoRA whose merge is another one, or that have none: key of the config -> what it is.
_VARIANTS = {
    "alora_invocation_tokens": "Activated LoRA, which acts on some tokens only and cannot be merged",
    "arrow_config": "Arrow, which chooses among adapters token by token and cannot be merged",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication; stack the layers with `slices` instead",
    "megatron_config": "LoRA on Megatron's layers",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
}
# Initialisations that take their start out of the base's weights: the adapter belongs to what is left of them.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterConfig(BaseModel):
    """The part of a LoRA's adapter_config.json on which the merged weights depend."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())
    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8, allow_inf_nan=False)
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    @property
    def kind(self) -> str:
        """What it is called."""
        return "DoRA" if self.use_dora else "rsLoRA" if self.use_rslora else "LoRA"

    def rank(self, module: str) -> int:
        """The rank of the module's matrices."""
        return _matched(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA (2312.03732)."""
        rank = self.rank(module)
        return _matched(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, parameter: str) -> bool:
        """Whether the parameter is of a module that is stored whole."""
        return any(f".{name}." in f".{parameter}" for name in self.modules_to_save or ())

    def tokens(self, module: str) -> list[int] | None:
        """The rows of a table that are replaced, in the order in which they are stored."""
        rows = self.trainable_token_indices
        if isinstance(rows, dict):
            return next((found for name, found in rows.items() if f".{module}".endswith(f".{name}")), None)
        return rows


def parse_adapter_config(data: Mapping[str, Any], name: str) -> AdapterConfig:
    """Check what adapter_config.json holds. Raises CheckpointError for adapters of other kinds, and for nonsense."""
    kind = data.get("peft_type")
    if kind != "LORA":
        what = f"is of the kind {kind}" if isinstance(kind, str) else "does not say of which kind it is (peft_type)"
        raise CheckpointError(f"{name}: the adapter {what}; only LORA can be read: {_ADVICE}")
    for key, what in _VARIANTS.items():
        if data.get(key):
            raise CheckpointError(f"{name}: the adapter is {what} ({key}): {_ADVICE}")
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{name}: init_lora_weights is {start!r}, which takes a part out of the base's weights. Save the adapter "
            "as a difference from the base itself (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    try:
        config = AdapterConfig.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][:2]))
        raise CheckpointError(
            f"{name}: adapter_config.json: {place}: {first['msg']} (it is {first['input']!r})"
        ) from None
    _check(config, name)
    return config


def _check(config: AdapterConfig, name: str) -> None:
    for key, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for expression, value in (pattern or {}).items():
            if not math.isfinite(value) or (key == "rank_pattern" and value < 1):
                raise CheckpointError(f"{name}: adapter_config.json: {key} of {expression!r} is {value}")
            try:
                re.compile(expression)
            except re.error as error:
                raise CheckpointError(f"{name}: adapter_config.json: {key}: {expression!r}: {error}") from None


def _matched(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """As PEFT: the first expression that matches the end of the name, from a dot on."""
    return next((v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)
