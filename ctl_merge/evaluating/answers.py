"""Answers, choices and programs of one model, measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ctl_merge.errors import DataError
from ctl_merge.evaluating import items
from ctl_merge.evaluating.batches import in_batches
from ctl_merge.evaluating.execution import run_all
from ctl_merge.evaluating.generation import generate
from ctl_merge.evaluating.likelihood import losses
from ctl_merge.evaluating.metrics import ChoiceAccuracy, ChoiceAccuracyPerCharacter, ExactMatch, Measured, PassAtK
from ctl_merge.evaluating.options import EvaluationOptions
from ctl_merge.evaluating.passages import Passage, continuation, opening
from ctl_merge.evaluating.subjects import Evaluated
from ctl_merge.merging import Meter
from ctl_merge.probing.rows import DataSpec
from ctl_merge.processes import Ranks

_FENCED = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)


def check_answers(code: bool, options: EvaluationOptions) -> None:
    """Refuse what cannot be measured, before any model is opened. Raises DataError."""
    if code and not options.allow_code_execution:
        raise DataError(
            "programs that a model writes are run to be judged: that is off until you allow it with "
            "--allow-code-execution, best in a container"
        )
    if code and max(options.k) > options.samples:
        raise DataError(f"pass@{max(options.k)} needs at least as many samples: --samples {max(options.k)}")
    try:
        re.compile(options.extract or "")
    except re.error as error:
        raise DataError(f"--extract {options.extract!r} is no regular expression ({error})") from None


def measure_answers(
    model: Evaluated, running: Any, specs: Mapping[str, Sequence[DataSpec]], options: EvaluationOptions, length: int,
    device: str, ranks: Ranks, meter: Meter,
) -> tuple[dict[str, dict[str, Measured]], dict[str, list[dict[str, Any]]]]:  # fmt: skip
    """Of each data set its metrics, and what the model wrote; `ranks` share the work."""
    metrics: dict[str, dict[str, Measured]] = {}
    written: dict[str, list[dict[str, Any]]] = {}
    asked = ranks.together(lambda: _read(specs, options))
    writer = _Writer(model, running, options, device, ranks, meter)
    for spec in specs["match"]:
        found = _matched(asked[spec.name], writer, options)
        given, wanted = ([each[key] for each in found] for key in ("answer", "wanted"))
        measured = ExactMatch.items(given, wanted, options.extract)
        written[spec.name] = [
            {**answer, "right": bool(right)} for answer, right in zip(found, measured.numerator, strict=True)
        ]
        metrics[spec.name] = {ExactMatch.key: measured}
    for spec in specs["choice"]:
        chosen = _chosen(asked[spec.name], writer, options, length)
        metrics[spec.name] = {
            metric.key: metric.items([each[place] for each in chosen], [right for *_, right in chosen])
            for place, metric in enumerate((ChoiceAccuracy, ChoiceAccuracyPerCharacter))
        }
    for spec in specs["code"]:
        found = _programmed(asked[spec.name], writer, options)
        written[spec.name] = found
        metrics[spec.name] = {
            PassAtK.key.format(k=k): PassAtK.items(
                [each["right"] for each in found], [options.samples] * len(found), k=k
            )
            for k in options.k
        }
    return metrics, written


def _read(specs: Mapping[str, Sequence[DataSpec]], options: EvaluationOptions) -> dict[str, list[Any]]:
    """The items of each data set."""
    return {
        **{spec.name: items.questions(spec, options.items, options.join) for spec in specs["match"]},
        **{spec.name: items.choices(spec, options.items, options.join) for spec in specs["choice"]},
        **{spec.name: items.problems(spec, options.items) for spec in specs["code"]},
    }


class _Writer:
    """One model, writing as the options say."""

    def __init__(
        self, model: Evaluated, running: Any, options: EvaluationOptions, device: str, ranks: Ranks, meter: Meter
    ) -> None:
        self.model, self.running, self.options, self.device = model, running, options, device
        self.ranks, self.meter = ranks, meter

    def write(self, prompts: Sequence[str], stop: Sequence[str], samples: int = 1) -> list[list[str]]:
        options, tokenizer = self.options, self.model.tokenizer
        if options.chat:
            prompts = self.ranks.together(lambda: list(map(self._asked, prompts)))
        with self.meter("answering", len(prompts)) as told:
            return generate(
                self.running, tokenizer, prompts, ends=self.model.ends, stop=stop, new_tokens=options.max_new_tokens,
                batch=options.batch, samples=samples, temperature=options.temperature, seed=options.seed,
                device=self.device, templated=options.chat, told=told, ranks=self.ranks,
            )  # fmt: skip

    def _asked(self, prompt: str) -> str:
        import jinja2

        message = [{"role": "user", "content": prompt.rstrip("\n")}]
        if not getattr(self.model.tokenizer, "chat_template", None):
            raise DataError(f"{self.model.name}: the tokenizer has no chat template: leave --chat out")
        try:
            return self.model.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise DataError(f"{self.model.name}: the chat template refuses a prompt ({error})") from None


def _matched(asked: Sequence[items.Question], writer: _Writer, options: EvaluationOptions) -> list[dict[str, Any]]:
    stop = options.stop or ("\n\n",)
    given = writer.write([question.prompt for question in asked], stop)
    return [
        {"prompt": question.prompt, "answer": answer, "wanted": question.answer}
        for question, (answer,) in zip(asked, given, strict=True)
    ]


def _chosen(
    asked: Sequence[items.Choice], writer: _Writer, options: EvaluationOptions, length: int
) -> list[tuple[int, int, int]]:
    """The likeliest choice, the likeliest for its length in characters, and the right one."""
    tokenizer = writer.model.tokenizer
    passages = writer.ranks.together(
        lambda: [_asked(choice, text, tokenizer, length) for choice in asked for text in choice.choices]
    )
    nll = iter(losses(writer.running, passages, options.batch, writer.device, writer.ranks).nll)
    found = []
    for choice in asked:
        own = [next(nll) for _ in choice.choices]
        by_length = [loss / max(len(text), 1) for loss, text in zip(own, choice.choices, strict=True)]
        found.append((own.index(min(own)), by_length.index(min(by_length)), choice.right))
    return found


def _asked(choice: items.Choice, text: str, tokenizer: Any, length: int) -> Passage:
    """A choice after its prompt. Raises DataError where part of it would not be judged, which would seem likelier."""
    whole, passage = (continuation(choice.prompt, text, tokenizer, most) for most in (1 << 30, length))
    said = f"the choice {text[:60]!r} after {choice.prompt[-60:]!r}"
    if not whole.counted.any():
        raise DataError(f"{said} has no token to be predicted: leave the row out")
    if passage.counted.sum() < whole.counted.sum():
        raise DataError(f"{said} has {int(whole.counted.sum())} tokens, too many for {length}: give a longer --length")
    if not choice.prompt and not opening(tokenizer):
        raise DataError(f"{said} has nothing to be predicted from: the tokenizer puts no token before a text")
    return passage


def _programmed(asked: Sequence[items.Problem], writer: _Writer, options: EvaluationOptions) -> list[dict[str, Any]]:
    stop = options.stop or (asked[0].stop if asked else ())
    given = writer.write([problem.prompt for problem in asked], stop, options.samples)
    programs = [p.before + extracted(text) + p.after for p, texts in zip(asked, given, strict=True) for text in texts]
    ranks = writer.ranks

    def run(rows: list[int]) -> list[str]:
        return run_all([programs[i] for i in rows], options.timeout, options.memory, ranks.cores)

    share = max(1, -(-len(programs) // ranks.count))
    failures = iter(in_batches([0] * len(programs), share, ranks, run))
    found = []
    for problem, texts in zip(asked, given, strict=True):
        why = [next(failures) for _ in texts]
        found.append({"prompt": problem.prompt, "answers": texts, "failures": why, "right": why.count("")})
    return found


def extracted(text: str) -> str:
    """The program in an answer: its first fenced block, else all of it."""
    block = _FENCED.search(text)
    return block.group(1) if block else text
