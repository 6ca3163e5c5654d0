"""How an evaluation is made."""

from __future__ import annotations

from dataclasses import dataclass

from ctl_merge.probing.placement import Options


@dataclass(frozen=True)
class TextOptions(Options):
    """How texts become sequences whose loss is taken; the rest as for a probe.

    `rows`: each row is a sequence of its own, cut at `length` and begun as the tokenizer begins a text, instead of
    windows over all of them; `mask_prompt`: of rows with several columns only the last one's loss counts.
    """

    rows: bool = False
    mask_prompt: bool = False


@dataclass(frozen=True)
class EvaluationOptions(TextOptions):
    """How an evaluation is made; `sequences`, `length`, `batch` and where models live as for a probe.

    `parents`: evaluate each recipe's base and parents too,
    and how far the merge agrees with them. `calibration`: the expected calibration error of the next token.
    `items`: rows at most for answers, choices and programs; their prompts are joined by `join`, and so is the answer.
    `stop`: texts that end an answer. `extract`: a regular expression; the last match of its first
    group, or of all of it, is what is compared. `samples` programs are drawn at `temperature` for pass@`k`; one alone
    is greedy. They run only with `allow_code_execution`, `timeout` seconds and `memory` MB each.
    """

    parents: bool = False
    calibration: bool = False
    items: int = 200
    stop: tuple[str, ...] = ()
    extract: str | None = None
    max_new_tokens: int = 128
    samples: int = 1
    k: tuple[int, ...] = (1,)
    temperature: float = 0.8
    seed: int = 0
    allow_code_execution: bool = False
    timeout: float = 5.0
    memory: int = 1024
