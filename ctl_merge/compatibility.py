"""mergekit 0.1.5 and we: what differs, key by key.

The table in the README and `ctl-merge check` are made from these rows. Verdicts: `same`; `more exact`: the same up to
rounding, where ours is nearer to the definition; `ours`: another result or none there, on purpose; `refused`: an error
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

MERGEKIT = "0.1.5"

Verdict = Literal["same", "more exact", "ours", "refused"]
Data = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One key, method or behaviour. `concerns(data)`: whether it matters to a document as YAML has it."""

    subject: str
    verdict: Verdict
    note: str
    concerns: Callable[[Data], bool]


def differences(data: Data) -> list[Row]:
    """The rows that concern a document, those in which nothing differs left out."""
    return [row for row in (*KEYS, *METHODS) if row.verdict != "same" and row.concerns(data)]


def markdown(rows: Iterable[Row]) -> str:
    """For the README."""
    lines = ["| | against mergekit | |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row.subject} | {row.verdict} | {row.note} |" for row in rows)])


# ---- what a document has


def _key(*names: str) -> Callable[[Data], bool]:
    return lambda data: any(data.get(name) is not None for name in names)


def _method(*names: str) -> Callable[[Data], bool]:
    return lambda data: data.get("merge_method") in names


def _always(data: Data) -> bool:
    return isinstance(data.get("merge_method"), str)


def _never(data: Data) -> bool:
    """For the README only: no document tells whether it matters."""
    return False


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key in a document with its value, however deep."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


def _has(name: str) -> Callable[[Data], bool]:
    return lambda data: any(key == name for key, _ in _walk(data))


def _adapters(data: Data) -> bool:
    return any(
        key == "lora" or (key in ("model", "base_model") and isinstance(value, str) and "+" in value)
        for key, value in _walk(data)
    )


def _gradient(data: Data) -> bool:
    return any(key == "parameters" and _lists(value) for key, value in _walk(data))


def _lists(parameters: Any) -> bool:
    values = parameters.values() if isinstance(parameters, Mapping) else ()
    return any(isinstance(v, list) or (key == "value" and isinstance(v, list)) for p in values for key, v in _items(p))


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for item in value:
            yield from _walk(item)
    elif isinstance(value, Mapping):
        yield from _walk(value)
    else:
        yield "", value


def _shared_below(data: Data) -> bool:
    """Whether a model has parameters that its method takes for all models together."""
    shared = {"t", "lambda", "normalize", "rescale", "epsilon", "select_topk"}
    listed = [model for key, models in _walk(data) if key in ("models", "sources") for model in _dicts(models)]
    return any(name in shared for model in listed for name in model.get("parameters") or ())


def _dicts(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _no_base(data: Data) -> bool:
    return _always(data) and data.get("base_model") is None


KEYS: tuple[Row, ...] = (
    Row(
        "arithmetic",
        "more exact",
        "float64, rounded once to the output's dtype; mergekit computes most methods in the "
        "dtype of the files or of `dtype`",
        _always,
    ),
    Row("`models`, `base_model`, `parameters`", "same", "precedence, gradients, filters as there", _always),
    Row(
        "gradients over layers",
        "same",
        "embeddings, final norm and head have the first value, as there: the head too, "
        "although it is the last to be used",
        _gradient,
    ),
    Row(
        "shared parameters under a model",
        "refused",
        "mergekit does not read `t`, `lambda`, `normalize` under a model and says nothing",
        _shared_below,
    ),
    Row(
        "unknown keys and parameters",
        "refused",
        "mergekit ignores them: a typo changes the merge and nobody is told",
        _never,
    ),
    Row(
        "`slices`",
        "same",
        "the config follows: depth, lists with an entry for each layer, lists of layers, kinds of "
        "attention (mergekit sets the depth only)",
        _key("slices"),
    ),
    Row(
        "`modules`",
        "same",
        "by mergekit's names or by the beginning of tensors' names; every tensor must be in one",
        _key("modules"),
    ),
    Row("a slice's base that is not among its sources", "same", "an error in both", _key("slices")),
    Row(
        "`revision` beside a source's model",
        "refused",
        "mergekit ignores it and takes the main branch; write `model: org/name@revision`",
        _has("revision"),
    ),
    Row("`residual_weight`", "refused", "mergekit reads it and does nothing with it", _has("residual_weight")),
    Row(
        "`dtype`",
        "ours",
        "the dtype of the result; there also that of the arithmetic. `out_dtype` wins in both",
        _key("dtype"),
    ),
    Row("`int8_mask`", "same", "without effect on the result", _has("int8_mask")),
    Row(
        "config and tokenizer without `base_model`",
        "ours",
        "of the first model listed; there of one from an unordered set, another one from run to run",
        _no_base,
    ),
    Row(
        "`model+adapter`, `lora`",
        "more exact",
        "added in float64 as tensors are read: no merged model is made and written for each adapter, or rounded "
        "before the merge; a head that is tied to an adapted embedding is untied, as the adapter was trained",
        _adapters,
    ),
    Row(
        "several documents, `name`",
        "same",
        "as mergekit-multi, but steps are read lazily: nothing intermediate is written or rounded",
        _key("name"),
    ),
    Row(
        "tensors that an architecture table lacks",
        "ours",
        "merged by the names in the files; mergekit drops what its table does not list, or refuses the architecture",
        _always,
    ),
    Row("tensors that only some models have", "refused", "unless the recipe says `missing: base` or `skip`", _never),
    Row(
        "`genome` (mergekit-evolve)",
        "refused",
        "write the parameters that it found, or `ctl-merge probe` to see what to change",
        _key("genome"),
    ),
)

METHODS: tuple[Row, ...] = (
    Row(
        "`linear`, `task_arithmetic`, `passthrough`",
        "more exact",
        "the same sums",
        _method("linear", "task_arithmetic"),
    ),
    Row("`slerp`", "more exact", "one angle a tensor, as there", _method("slerp")),
    Row(
        "`ties`",
        "more exact",
        "entries that equal the cut are all kept; mergekit keeps exactly k, in an order that its sort does not fix",
        _method("ties"),
    ),
    Row(
        "`dare_linear`, `dare_ties`",
        "ours",
        "`rescale: true` divides by the density, as the paper does (`l1` is "
        "mergekit's); masks depend on seed, model and entry alone, not on the order of the run",
        _method("dare_linear", "dare_ties"),
    ),
)
