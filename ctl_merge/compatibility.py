"""mergekit 0.1.5 and we: what differs, key by key.

The table in the README and `ctl-merge check` are made from these rows. Verdicts: `same`: nothing but rounding differs;
`more exact`: nearer to the definition here; `ours`: another result, or none there; `refused`: an error here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ctl_merge.traits import (
    Data,
    Trait,
    a_merge,
    a_mixture,
    adapters,
    anywhere,
    below_tokenizer,
    both,
    gradients,
    key,
    lacks_its_base,
    method,
    nothing,
    parameter,
    parameters_unknown_to_the_method,
    rescales,
    revision_beside_a_model,
    shared_below_a_model,
    stacks,
    tokenizer,
    unknown_keys,
    value,
    without_base,
)  # fmt: skip

MERGEKIT = "0.1.5"

Verdict = Literal["same", "more exact", "ours", "refused"]


@dataclass(frozen=True)
class Row:
    """One key, method or behaviour. `concerns(data)`: whether it matters to a document as YAML has it."""

    subject: str
    verdict: Verdict
    note: str
    concerns: Trait


def differences(data: Data) -> list[Row]:
    """The rows that concern a document, those in which nothing differs left out, refusals first."""
    found = [row for row in ROWS if row.verdict != "same" and row.concerns(data)]
    return sorted(found, key=lambda row: row.verdict != "refused")


def markdown(rows: Iterable[Row]) -> str:
    """For the README."""
    lines = ["| | | ctl-merge, and mergekit where it differs |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row.subject} | {row.verdict} | {row.note} |" for row in rows)])


_RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")

KEYS: tuple[Row, ...] = (
    Row("`models`, `base_model`, `parameters`", "same", "precedence, gradients, filters", nothing),
    Row(
        "arithmetic", "more exact",
        "float64, rounded once; mergekit computes in `dtype`, or in the dtype of the files", a_merge,
    ),
    Row(
        "`dtype`", "ours", "of the result only; there of the arithmetic too. `out_dtype` wins in both",
        both(a_merge, key("dtype")),
    ),
    Row(
        "gradients over layers", "same", "embeddings, final norm **and head** have the first value", gradients,
    ),
    Row(
        "no `base_model`", "ours", "config and tokenizer are the first model's; there an arbitrary one's",
        lambda data: without_base(data) and not lacks_its_base(data),
    ),
    Row("a method that needs a base, without one", "refused", "by mergekit 0.1.5 too", lacks_its_base),
    Row(
        "shared parameters (`t`, `lambda`, …) under a model", "refused",
        "mergekit does not read them there, and says nothing: move them to the recipe's `parameters`",
        shared_below_a_model,
    ),
    Row(
        "parameters that the method lacks", "refused", "mergekit ignores them: remove them",
        parameters_unknown_to_the_method,
    ),
    Row("unknown keys", "refused", "mergekit ignores them, so that a typo changes the merge", unknown_keys),
    Row("shares outside [0, 1] (`density`, `gamma`, `select_topk`)", "refused", "mergekit clamps them", nothing),
    Row("`int8_mask`", "same", "has no effect on the result", nothing),
    Row("tensors that mergekit's architecture tables lack", "ours", "merged by name; there they are dropped", nothing),
    Row("tensors that only some models have", "refused", "unless `missing` is `base` or `skip`", nothing),
    Row(
        "`slices`", "ours",
        "every setting of the config that follows from a layer's number is adapted; mergekit sets the depth",
        stacks,
    ),
    Row("`residual_weight`", "refused", "mergekit reads it and does nothing with it", anywhere("residual_weight")),
    Row(
        "`override_architecture` of a model", "refused", "it chooses a table of mergekit's: tensors are known by name",
        anywhere("override_architecture"),
    ),
    Row(
        "`revision` beside a model", "refused", "mergekit ignores it: write `model: org/name@revision`",
        revision_beside_a_model,
    ),
    Row(
        "`modules`", "ours", "every tensor must be in one; mergekit drops the others", key("modules"),
    ),
    Row(
        "adapters (`model+adapter`, `lora`)", "more exact",
        "added in float64 as tensors are read; mergekit first writes a merged model, rounded, for each", adapters,
    ),
    Row(
        "several documents", "more exact", "steps are read lazily; mergekit-multi writes each, rounded",
        both(a_merge, key("name")),
    ),
    Row(
        "`genome` (mergekit-evolve)", "refused", "it describes a search: write the parameters that it found",
        key("genome"),
    ),
)  # fmt: skip

VOCABULARY: tuple[Row, ...] = (
    Row(
        "vocabularies that differ, no tokenizer key", "refused", "mergekit looks at the numbers of rows only",
        nothing,
    ),
    Row(
        "`union`: tokens of a BPE core", "ours",
        "join the core with their merges; there they become literal text: met inside of words, or, with a blank, never",
        tokenizer("union"),
    ),
    Row("`union`: ids of new tokens", "ours", "by model, then id; there in any order", tokenizer("union")),
    Row(
        "`union`: cores of different kinds, or Unigram", "refused",
        "unless only added tokens differ; mergekit adds the rest as text", nothing,
    ),
    Row(
        "rows without a token (padding)", "ours", "kept, unless `pad_to_multiple_of` is set; mergekit cuts them off",
        lambda data: tokenizer("base", "union", "model")(data) and not below_tokenizer("pad_to_multiple_of")(data),
    ),
    Row(
        "`tokenizer: tokens`", "ours", "a token without `source` follows the default rule, an error there",
        below_tokenizer("tokens"),
    ),
    Row(
        "tokenizer files with `base` or a model", "ours", "copied byte for byte, with its special ids; there re-saved",
        tokenizer("base", "model"),
    ),
    Row(
        "`chat_template: auto`", "ours", "the most common, the first where counts are equal; there an arbitrary one",
        value("chat_template", "auto"),
    ),
    Row(
        "`chat_template` by name", "ours",
        "as its authors document it; mergekit's differs in blanks, newlines or the end",
        value("chat_template", "alpaca", "llama3", "mistral", "exaone"),
    ),
)  # fmt: skip

_OURS = (
    "consensus", "fisher", "iso_c", "iso_cts", "knots", "localize_and_stitch", "lot", "metagpt", "pcb", "regmean",
    "tsv", "wudi",
)  # fmt: skip

METHODS: tuple[Row, ...] = (
    Row("`linear`, `task_arithmetic`, `passthrough`, `slerp`, `ram`", "same", "the same sums and angles", nothing),
    Row(
        "`ties`", "more exact", "all entries that equal the cut are kept; there exactly k, in no fixed order",
        both(method("ties"), parameter("density")),
    ),
    Row(
        "masks of `dare_linear`, `dare_ties`, `della`, `della_linear`", "ours",
        "random by seed, model, tensor and entry: the same in every run; there by one generator in order of use",
        method(*_RANDOM),
    ),
    Row(
        "`rescale: true` of the same four", "ours",
        "divides each entry by its probability, as the papers do; mergekit restores the L1 norm: write `rescale: l1`",
        both(method(*_RANDOM), rescales),
    ),
    Row(
        "ranks of `della`, `della_linear`", "ours", "equal magnitudes share their rank; there a sort orders them",
        method("della", "della_linear"),
    ),
    Row(
        "`breadcrumbs`, `breadcrumbs_ties`", "more exact", "all entries that equal a cut are kept",
        method("breadcrumbs", "breadcrumbs_ties"),
    ),
    Row(
        "weights that sum to 0, with `normalize`", "refused",
        "mergekit then does not divide, or (`linear`, `multislerp`) gives infinity or NaN", nothing,
    ),
    Row(
        "`sce`", "ours",
        "weighted by energy however small; mergekit weights equally where Σ mean d² < 1e-6, as in most finetunes",
        method("sce"),
    ),
    Row("`ramplus_tl`", "more exact", "its ratio is float64; there float32", method("ramplus_tl")),
    Row("`nearswap`", "more exact", "for t below 1e-6 too", method("nearswap")),
    Row(
        "`arcee_fusion`", "more exact", "exact quartiles; mergekit samples tensors above 10⁶ entries, without a seed",
        method("arcee_fusion"),
    ),
    Row(
        "`nuslerp`", "more exact", "vectors shorter than 1e-7 keep their angle", method("nuslerp"),
    ),
    Row(
        "`multislerp`", "more exact", "directions that cancel are added and reported; an error there, except for two",
        method("multislerp"),
    ),
    Row("`karcher`", "more exact", "`tol` is an angle only; there it also zeroes small tensors", method("karcher")),
    Row("`model_stock`", "more exact", "for short task vectors; `clamp` is ours", method("model_stock")),
    Row(", ".join(f"`{name}`" for name in _OURS), "ours", "mergekit has none of them", method(*_OURS)),
)  # fmt: skip

_FROM_PROMPTS = both(a_mixture, lambda data: data.get("gate_mode", "hidden") in ("hidden", "hidden_last", "hidden_avg"))

MIXTURES: tuple[Row, ...] = (
    Row(
        "gates from hidden states", "more exact", "float32, each prompt by itself; there bfloat16, padded",
        _FROM_PROMPTS,
    ),
    Row(
        "`gate_mode: hidden_avg`", "ours", "the mean over the prompt's tokens; there padding counts too",
        both(a_mixture, value("gate_mode", "hidden_avg")),
    ),
    Row(
        "random gates and noise", "ours", "by the seed: the same in every run",
        both(a_mixture, lambda data: anywhere("noise_scale")(data) or "random" in str(data.get("gate_mode"))),
    ),
    Row("sliding windows of attention", "ours", "kept; mergekit drops them for Mixtral and Qwen MoE", a_mixture),
    Row("names of Mixtral's tensors", "ours", "the Hub's; there those of transformers 5, fused", a_mixture),
    Row("biases for which the mixture has no place", "refused", "mergekit drops them for Mixtral", nothing),
    Row(
        "DeepSeek MoE", "refused", "transformers has no class for it",
        both(a_mixture, lambda data: str(data.get("architecture")).lower().startswith("deepseek")),
    ),
    Row("all experts one model", "ours", "a warning; an error there where gates come from prompts", nothing),
)  # fmt: skip

ROWS = (*KEYS, *VOCABULARY, *METHODS, *MIXTURES)
