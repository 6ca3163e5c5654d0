"""Models and texts of tune_against_uniform.py."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
PARTS = 6  # of a text: a seed's own, so that runs of several seeds share no data
_MBPP_TEST = range(11, 511)  # task numbers that no expert has seen

_AS_WRITTEN = "<bos>{% for message in messages %}{{ message.content }}{% endfor %}<eos>"


@dataclass(frozen=True)
class Family:
    """A base and its experts, each with a text that it was not trained on (`texts`, by seed) and one that it was."""

    name: str
    base: Path
    experts: Mapping[str, Path]
    texts: Mapping[int, Mapping[str, str]]
    train: Mapping[str, str]
    how: Mapping[str, Any] = field(default_factory=dict)


def shipped(folder: Path, seeds: Sequence[int]) -> Family:
    """The quickstart's models; every seed draws held-out words anew, and the answer's loss alone counts.

    A row is written as the models know it: copies of them, whose chat template adds nothing, read prompt and answer.
    """
    sys.path.insert(0, str(QUICKSTART))
    from tasks import TASKS, examples

    for name in ("base", *TASKS):
        copied = shutil.copytree(QUICKSTART / name, folder / name)
        own = json.loads((copied / "tokenizer_config.json").read_text("utf-8"))
        own["chat_template"] = _AS_WRITTEN
        (copied / "tokenizer_config.json").write_text(json.dumps(own), "utf-8")
    texts: dict[int, dict[str, str]] = {seed: {} for seed in seeds}
    train = {}
    for name, task in TASKS.items():
        for seed in seeds:
            path = folder / f"{name}-{seed}.jsonl"
            rows = (json.dumps({"prompt": e.prompt, "answer": e.answer}) for e in examples(task, "held-out", 96, seed))
            path.write_text("\n".join(rows), "utf-8")
            texts[seed][name] = f"{name}={path}:prompt,answer"
        path = folder / f"{name}.txt"
        lines = (f"<bos>{e.prompt}{e.answer}<eos>" for e in examples(task, "train", 500, 0))
        path.write_text("".join(lines), "utf-8")
        train[name] = f"{name}={path}"
    experts = {name: folder / name for name in TASKS}
    return Family(
        "shipped", folder / "base", experts, texts, train, {"mask_prompt": True, "chat": True, "sequences": 96}
    )


def stories(models: Path, data: Path, folder: Path, seeds: Sequence[int]) -> Family:
    """Four finetunes of llama2.c's stories260K, in `models`; GSM8K, MBPP, Multi30k and WikiText-2, in `data`."""
    mbpp = (data / "mbpp/mbpp.jsonl").read_text("utf-8").splitlines()
    tested = [json.loads(line)["task_id"] in _MBPP_TEST for line in mbpp]
    held_out = {
        "math": (_lines(data / "gsm8k/test.jsonl"), ".jsonl:question,answer"),
        "code": ([line for line, own in zip(mbpp, tested, strict=True) if own], ".jsonl:text,code"),
        "french": (_lines(data / "multi30k/val.fr"), ".txt"),
        "wiki": (_lines(data / "wikitext2/test.txt"), ".txt"),
    }
    code = folder / "mbpp-train.jsonl"
    code.write_text("\n".join(line for line, own in zip(mbpp, tested, strict=True) if not own), "utf-8")
    train = {
        "math": f"math={data / 'gsm8k/train.jsonl'}:question,answer", "code": f"code={code}:text,code",
        "french": f"french={data / 'multi30k/train.fr'}", "wiki": f"wiki={data / 'wikitext2/valid.txt'}",
    }  # fmt: skip
    texts = {
        seed: {name: _part(name, lines, seed, kind, folder) for name, (lines, kind) in held_out.items()}
        for seed in seeds
    }
    experts = {name: models / name for name in held_out}
    return Family("stories260K", models / "stories260K", experts, texts, train, {"sequences": 64})


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def _part(name: str, lines: Sequence[str], seed: int, kind: str, folder: Path) -> str:
    """The seed's part of the lines, as a data set."""
    start, end = (len(lines) * i // PARTS for i in (seed, seed + 1))
    suffix, colon, columns = kind.partition(":")
    path = folder / f"{name}-{seed}{suffix}"
    path.write_text("\n".join(lines[start:end]), "utf-8")
    return f"{name}={path}{colon}{columns}"
