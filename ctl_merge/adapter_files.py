"""An adapter's config and tensor names, as PEFT has them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ctl_merge.adapter_targets import Target, Targets
from ctl_merge.stored import ADAPTER_CONFIG

PREFIX = "base_model.model."
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip

# How a parameter's change is held: by two thin matrices; whole, with its module; whole, beside a layer; by rows.
Form = Literal["low_rank", "whole", "bias", "rows"]


@dataclass(frozen=True)
class Held:
    """What an adapter holds of one parameter. `squares`: ‖change‖²; `lost`: that of what is not held of it."""

    target: Target
    form: Form
    how: str
    rank: int = 0
    scale: float = 1.0
    squares: float = 0.0
    lost: float = 0.0
    rows: tuple[int, ...] = ()

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    @property
    def pattern(self) -> str:
        """By which `rank_pattern` names it."""
        return self.target.parameter if self.target.kind == "parameter" else self.target.module

    @property
    def patterns(self) -> tuple[str, ...]:
        """The same, and those of what is tied to it."""
        return (self.pattern, *self.target.tied)

    @property
    def kept(self) -> float:
        """The share of ‖change‖² that is held."""
        return 1.0 - self.lost / self.squares if self.squares else 1.0

    @property
    def error(self) -> float:
        """‖what is lost‖ / ‖change‖."""
        return (self.lost / self.squares) ** 0.5 if self.squares else 0.0


class AdapterLayout:
    """The names and the config of what is held; `targets`: all of the model's parameters."""

    def __init__(self, held: Sequence[Held], targets: Targets) -> None:
        self.held, self.targets = held, targets
        self.low = [own for own in held if own.form == "low_rank"]
        self._layers = {own.target.module for own in self.low if own.target.kind != "parameter"}

    def names(self, own: Held) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Key in the adapter, which part it is (`a`, `b`, turned `at` and `bt`, `whole`), and its shape."""
        target = own.target
        module, leaf = f"{PREFIX}{target.module}", target.parameter.rpartition(".")[2]
        if own.form == "whole":
            for path in (target.module, *target.tied):
                yield f"{PREFIX}{path}.{leaf}", "whole", target.shape
        elif own.form == "bias":
            inner = ".base_layer" if target.module in self._layers else ""
            yield f"{module}{inner}.{leaf}", "whole", target.shape
        elif own.form == "rows":
            yield f"{module}.token_adapter.trainable_tokens_delta", "whole", (len(own.rows), *target.shape[1:])
        else:
            yield from self._factors(own, module)

    def _factors(self, own: Held, module: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        target, rank = own.target, own.rank * own.target.count
        outputs, inputs = target.matrix
        if target.kind == "embedding":
            yield f"{module}.lora_embedding_A", "a", (rank, inputs)
            yield f"{module}.lora_embedding_B", "b", (outputs, rank)
            for path in target.tied:
                yield f"{PREFIX}{path}.lora_A.weight", "bt", (rank, outputs)
                yield f"{PREFIX}{path}.lora_B.weight", "at", (inputs, rank)
            return
        kernel = target.shape[2:] if target.kind == "kernel" else ()
        module += ".base_layer" * self._depth(own)
        yield f"{module}.lora_A.weight", "a", (rank, *target.shape[1:]) if kernel else (rank, inputs)
        yield f"{module}.lora_B.weight", "b", (outputs, rank, *[1] * len(kernel))

    def _depth(self, own: Held) -> int:
        """How deep PEFT's wrapper of a parameter lies: those of one module are nested, the last one outermost."""
        if own.target.kind != "parameter":
            return 0
        low = {other.target.parameter for other in self.low}
        nested = [t.parameter for t in self.targets.of(own.target.module) if t.parameter in low]
        return len(nested) - 1 - nested.index(own.target.parameter)

    # ---- the config

    def write_config(self, folder: Path, base: str | None, revision: str | None, config: Mapping[str, Any]) -> None:
        """adapter_config.json, by PEFT. `config`: the base model's."""
        from peft import LoraConfig

        ranks = Counter((own.rank, own.alpha) for own in self.low)
        (rank, alpha), _ = ranks.most_common(1)[0]
        by_length = sorted(self.low, key=lambda own: -len(own.pattern))  # a pattern also fits the end of others
        rows = {own.target.module: list(own.rows) for own in self.held if own.form == "rows"}
        saved = [path for own in self.held if own.form == "whole" for path in self._saved(own.target)]
        LoraConfig(
            r=rank, lora_alpha=_plain(alpha),
            target_modules=self._short([own.target.module for own in self.low if own.target.kind != "parameter"], 1),
            target_parameters=self._short_parameters() or None,
            rank_pattern={path: own.rank for own in by_length if own.rank != rank for path in own.patterns},
            alpha_pattern={path: _plain(own.alpha) for own in by_length if own.alpha != alpha for path in own.patterns},
            modules_to_save=list(dict.fromkeys(saved)) or None, trainable_token_indices=rows or None,
            bias="all" if any(own.form == "bias" for own in self.held) else "none",
            fan_in_fan_out=any(own.target.kind == "linear" and own.target.transposed for own in self.low),
            ensure_weight_tying=any(
                own.target.tied and own.target.tied_by_peft and own.form in ("low_rank", "whole") for own in self.held
            ),
            task_type=_task(config), base_model_name_or_path=base, revision=revision, inference_mode=True,
        ).save_pretrained(str(folder))  # fmt: skip
        path = folder / ADAPTER_CONFIG
        written = json.loads(path.read_text("utf-8"))
        if isinstance(written["target_modules"], list):  # a set in PEFT, whose order differs from run to run
            written["target_modules"].sort()
        path.write_text(json.dumps(written, indent=2, sort_keys=True), "utf-8")

    def _saved(self, target: Target) -> tuple[str, ...]:
        return (target.module,) if target.tied_by_peft else (target.module, *target.tied)

    def _short_parameters(self) -> list[str]:
        return self._short([own.target.parameter for own in self.low if own.target.kind == "parameter"], 2)

    def _short(self, paths: list[str], parts: int) -> list[str]:
        """The last `parts` of the names where all of the model that end so are meant, else whole names."""
        known = self.targets.modules if parts == 1 else [target.parameter for target in self.targets.parameters]
        ends: dict[str, set[str]] = {}
        for path in known:
            ends.setdefault(_end(path, parts), set()).add(path)
        return list(dict.fromkeys(_end(p, parts) if ends[_end(p, parts)] <= set(paths) else p for p in paths))


def _end(path: str, parts: int) -> str:
    return ".".join(path.split(".")[-parts:])


def _plain(number: float) -> Any:
    return int(number) if number == int(number) else number


def _task(config: Mapping[str, Any]) -> str | None:
    """What PEFT calls the task of the model's class; None where it has no name for it."""
    name = str((config.get("architectures") or [""])[0])
    if name.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)
