"""What both tools do with a configuration that is wrong, or a family that does not fit: probes, each with what is seen.

A row is a claim that is checked: an outcome other than the one that stands here is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from differential.families import config_of, make, write
from differential.tools import Mergekit, Ours, Outcome

REFUSED, ACCEPTED, WITHOUT_EFFECT = "refused", "accepted", "accepted, without effect"


@dataclass(frozen=True)
class Probe:
    """A configuration, what mergekit and we are seen to do with it. `plain`: the same without what is probed."""

    what: str
    theirs: str
    ours: str
    config: Mapping[str, Any]
    plain: Mapping[str, Any] | None = None
    seen: Callable[[Outcome], str] | None = None
    same: str = WITHOUT_EFFECT  # what it is called if it gives what the plain configuration does


@dataclass(frozen=True)
class Row:
    """What was seen. `expected` is whether that is what the table says."""

    what: str
    theirs: str
    ours: str
    expected: bool
    messages: tuple[str | None, str | None]


def observe(folder: Path, ours: Ours, mergekit: Mergekit) -> list[Row]:
    """Run every probe through both tools."""
    rows = []
    for each in probes(folder):
        (theirs, message), (own, reply) = seen_by(mergekit, each), seen_by(ours, each)
        rows.append(Row(each.what, theirs, own, (theirs, own) == (each.theirs, each.ours), (message, reply)))
    return rows


def _text(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False)


def seen_by(tool: Ours | Mergekit, each: Probe) -> tuple[str, str | None]:
    """What a tool does, and its message where it refuses."""
    outcome = tool.run(_text(each.config))
    if outcome.error is not None:
        return REFUSED, " ".join(outcome.error.split())
    if each.plain is not None:
        plain = tool.run(_text(each.plain))
        return (each.same if _equal(plain.tensors, outcome.tensors) else ACCEPTED), None
    return (each.seen(outcome) if each.seen else ACCEPTED), None


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _models(folder: Path) -> None:
    """A family, and models that do not fit it."""
    family = make(folder, "tied", "float32")
    config = config_of("tied", 41, "float32")
    odd = {name: dict(family.models[name]) for name in ("base", "a")}
    name = "model.layers.0.self_attn.q_proj.weight"
    bias = name.replace("weight", "bias")
    for model, tensors in odd.items():
        write(folder / "biased" / model, {**tensors, bias: torch.full((20,), 0.5)}, {**config, "attention_bias": True})
    broken = odd["a"][name].clone()
    broken[0, 0] = torch.nan
    same = {**odd["a"], name: odd["base"][name]}
    for copy in ("same", "again", "more"):
        write(folder / copy, same, config)
    narrow = {m: {n: t.half() for n, t in tensors.items()} for m, tensors in (("narrow", odd["base"]), ("tuned", same))}
    for model, tensors in narrow.items():
        write(folder / model, tensors, {**config, "torch_dtype": "float16"})
    write(folder / "nan", {**odd["a"], name: broken}, config)
    write(folder / "large", {**odd["a"], name: odd["a"][name] * 1e6}, config)
    write(folder / "short", {n: t for n, t in odd["a"].items() if n != name}, config)
    write(folder / "half", {n: t.bfloat16() for n, t in odd["a"].items()}, {**config, "torch_dtype": "bfloat16"})
    longer = torch.cat([odd["a"]["model.embed_tokens.weight"], torch.ones(3, 20)])
    write(folder / "longer", {**odd["a"], "model.embed_tokens.weight": longer}, {**config, "vocab_size": len(longer)})
    head = odd["a"]["model.embed_tokens.weight"] + 0.5
    write(folder / "headed", {**odd["a"], "lm_head.weight": head}, {**config, "tie_word_embeddings": False})


def probes(folder: Path) -> list[Probe]:
    """The probes, over models that are made in `folder`."""
    _models(folder)
    family = folder / "tied-float32"
    base, a, b = (str(family / name) for name in ("base", "a", "b"))

    def own(model: str, **parameters: Any) -> dict[str, Any]:
        return {"model": str(folder / model) if "/" not in model else model, "parameters": parameters}

    def linear(*models: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
        return {"merge_method": "linear", "models": list(models), **keys}

    def ties(*models: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
        return {"merge_method": "ties", "base_model": base, "models": list(models), **keys}

    even = (own(a, weight=0.5), own(b, weight=0.5))
    sparse = (own(a, weight=0.5, density=0.5), own(b, weight=0.5, density=0.5))
    biased = linear(own(str(folder / "biased/base"), weight=0.5), own(str(folder / "biased/a"), weight=0.5))
    return [
        Probe("an unknown key: `normalise: false`", WITHOUT_EFFECT, REFUSED,
              linear(*even, normalise=False), linear(*even)),
        Probe("a misspelt parameter: `densty: 0.5`", WITHOUT_EFFECT, REFUSED,
              ties(own(a, weight=1.0, densty=0.5), own(b, weight=1.0)), ties(own(a, weight=1.0), own(b, weight=1.0))),
        Probe("`lambda`, which all models share, under one model", WITHOUT_EFFECT, REFUSED,
              ties(own(a, weight=1.0, **{"lambda": 0.1}), even[1]), ties(own(a, weight=1.0), even[1])),
        Probe("`revision` beside a model that has none", WITHOUT_EFFECT, REFUSED,
              linear({**even[0], "revision": "v2"}, even[1]), linear(*even)),
        Probe("`density: 1.5`", ACCEPTED, REFUSED, ties(own(a, weight=1.0, density=1.5))),
        Probe("tensors that the architecture's table lacks (biases of a Llama)", "dropped", "merged", biased,
              seen=lambda o: "merged" if any("bias" in name for name in o.tensors) else "dropped"),
        Probe("NaN in an input", "NaN in the result", REFUSED,
              linear(own("nan", weight=0.5), even[1]), seen=_nonfinite),
        Probe("values that float16 cannot hold", "infinity in the result", REFUSED,
              linear(own("large", weight=1.0), dtype="float16"), seen=_nonfinite),
        Probe("weights that sum to zero, normalized", "infinity in the result", REFUSED,
              linear(own(a, weight=1.0), own(b, weight=-1.0)), seen=_nonfinite),
        Probe("a tensor that one model lacks", REFUSED, REFUSED, linear(own("short", weight=0.5), even[1])),
        Probe("vocabularies that differ, no `tokenizer_source`", REFUSED, REFUSED,
              linear(own("longer", weight=0.5), even[1])),
        Probe("one model listed twice", REFUSED, ACCEPTED, linear(even[0], even[0], even[1])),
        Probe("`linear` with a `base_model` that is not listed, weight for all", "merged too", "merged too",
              {**linear({"model": a}, {"model": b}), "base_model": base, "parameters": {"weight": 1.0}},
              linear(*({"model": m, "parameters": {"weight": 1.0}} for m in (a, b, base))), same="merged too"),
        Probe("a float32 base, bfloat16 finetunes, no `dtype`: the result's dtype", "float32", "float32",
              {"merge_method": "task_arithmetic", "base_model": base, "models": [own("half", weight=1.0)]},
              seen=_dtype),
        Probe("bfloat16 listed first, float32 second, no base, no `dtype`: the result's dtype", "float32", "bfloat16",
              linear(own("half", weight=0.5), even[1]), seen=_dtype),
        Probe("a tied base, one finetune with a head of its own", "a head, and tied", "a head, and untied",
              {"merge_method": "task_arithmetic", "base_model": base, "models": [own("headed", weight=1.0)]},
              seen=_head),
        Probe("`multislerp` in float16, a tensor that one model did not change", "NaN in the result", "a finite result",
              {"merge_method": "multislerp", "base_model": str(folder / "narrow"), "models": [own("tuned", weight=1.0),
               own(a, weight=1.0)], "dtype": "float16"}, seen=_nonfinite),
        Probe("`multislerp` of three models, a tensor that none changed", REFUSED, ACCEPTED,
              {"merge_method": "multislerp", "base_model": base, "models": [own(m, weight=w) for m, w in
               ((str(folder / "same"), 1.0), (str(folder / "again"), 0.5), (str(folder / "more"), 0.7))]}),
        Probe("a gradient of whole numbers: `max_iter: [5, 10]`", REFUSED, ACCEPTED,
              {"merge_method": "karcher", "models": [own(a), own(b)], "parameters": {"max_iter": [5, 10]}}),
        Probe("`rescale: true` in `ties`", ACCEPTED, ACCEPTED,
              ties(*sparse, parameters={"rescale": True}), ties(*sparse)),
        Probe("`density: 0.5` in `task_arithmetic`, which drops nothing", WITHOUT_EFFECT, REFUSED,
              {**ties(*sparse), "merge_method": "task_arithmetic"}, {**ties(*even), "merge_method": "task_arithmetic"}),
        Probe("`int8_mask: true`", WITHOUT_EFFECT, WITHOUT_EFFECT,
              ties(*sparse, parameters={"int8_mask": True}), ties(*sparse)),
        Probe("`arcee_fusion` or `ramplus_tl` with `dtype: bfloat16`: the result's dtype", "float32", "bfloat16",
              {**ties(own(a)), "merge_method": "arcee_fusion", "dtype": "bfloat16"}, seen=_dtype),
        Probe("`density: 0.5` in `linear`, which has none", WITHOUT_EFFECT, REFUSED,
              linear(*sparse), linear(*even)),
    ]  # fmt: skip


def _nonfinite(outcome: Outcome) -> str:
    values = torch.cat([tensor.flatten().float() for tensor in outcome.tensors.values()])
    if values.isinf().any():
        return "infinity in the result"
    return "NaN in the result" if values.isnan().any() else "a finite result"


def _dtype(outcome: Outcome) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in outcome.tensors.values()}))


def _head(outcome: Outcome) -> str:
    tied = (outcome.config or {}).get("tie_word_embeddings", True)
    head = "a head" if "lm_head.weight" in outcome.tensors else "no head"
    return f"{head}, and {'tied' if tied else 'untied'}"
