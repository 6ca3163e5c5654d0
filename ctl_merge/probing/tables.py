"""The exact numbers of a probe as HTML tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from ctl_merge.probing.comparisons import SLOPES
from ctl_merge.probing.record import (
    Data,
    against_main,
    below_floor,
    bounded,
    costs_of,
    mean,
    number,
    place,
    quadratic,
    recipes,
    rows,
    sweep,
)
from ctl_merge.probing.wording import interval, shown

_OPTIONAL = {"nonlinearity_null": "null", "nonlinearity_written": "written", "floor": "floor"}
_TOLD = {True: "yes", False: "no", None: "too small to tell"}


def set_tables(data: Data, name: str) -> str:
    """The tables of one data set."""
    made = (_block_table, _recipe_table, _sweep_table, _scaling_table, _loss_table, _patch_table)
    return "".join(table for make in made for table in make(data, name))


def tables(data: Data) -> str:
    """The tables of the whole report."""
    return "".join((*_lineage(data), *_strata(data)))


def _block_table(data: Data, name: str) -> Iterator[str]:
    blocks = rows(data, name, parts={row["part"] for row in data["sets"][name]["blocks"]})
    optional = {key: text for key, text in _OPTIONAL.items() if any(number(row, key) is not None for row in blocks)}
    head = ["block", "part", "R [95 %]", "R robust", "cos", "cos token", "coef", "cos parents", "local", "propagated"]
    head += [f"ĉ {parent} (weights)" for parent in data["parents"]]
    head += ["R² of ĉ", "R² weights", *optional.values()]
    yield _table(f"Blocks on {name}", head, [_cells(data, row, list(optional)) for row in blocks])


def _cells(data: Data, row: Data, optional: Sequence[str]) -> list[str]:
    cells = ["" if row["index"] is None else place(row), row["part"], interval(bounded(row, "nonlinearity"))]
    cells.append(shown(number(row, "nonlinearity_robust"), digits=4))
    cells += [shown(number(row, key), digits=5) for key in ("cos", "cos_token", "coef", "cos_parents")]
    cells += [interval(bounded(row, key)) for key in ("local", "propagated")]
    for parent in data["parents"]:
        feature, weight = bounded(row, "effective_feature", parent), number(row, "effective_weight", parent)
        cells.append(f"{interval(feature)} ({shown(weight)})")
    cells += [shown(number(row, key)) for key in ("explained_feature", "explained_weight")]
    cells += [interval(bounded(row, key), digits=4) for key in optional]
    if "floor" in optional and below_floor(row):
        cells[-1] += " (R below 3×)"
    return cells


def _recipe_table(data: Data, name: str) -> Iterator[str]:
    """R and loss of the other recipes, beside the main one's."""
    merges = [merge["name"] for merge in recipes(data)]
    if not merges:
        return
    main, *others = merges
    by = _by_place(data, name, merges)
    head = ["block", f"R {main}", *(text for merge in others for text in (f"R {merge}", f"minus {main}"))]
    body = []
    for label, row in by[main].items():
        body.append([label, interval(bounded(row, "nonlinearity"))])
        for found in (by[merge].get(label, {}) for merge in others):
            apart = interval(bounded(found, "nonlinearity_against_first"), signed=True)
            body[-1] += [interval(bounded(found, "nonlinearity")), apart]
    losses = [[m, interval(cost, signed=True)] for m in others if (cost := against_main(data, name, m))]
    more = [(["recipe", f"loss minus that of {main}"], losses)] if losses else []
    yield _table(f"Recipes on {name}", head, body, *more)


def _sweep_table(data: Data, name: str) -> Iterator[str]:
    """R of each α by block."""
    merges = [merge["name"] for merge in sweep(data)]
    by = _by_place(data, name, merges)
    if any(by.values()):
        labels = dict.fromkeys(label for found in by.values() for label in found)
        body = [[s, *(interval(bounded(by[m].get(s, {}), "nonlinearity")) for m in merges)] for s in labels]
        means = [mean(number(row, "nonlinearity") for row in by[m].values()) for m in merges]
        yield _table(f"Sweep on {name}", ["block", *(f"R {m}" for m in merges)], [*body, ["mean", *map(shown, means)]])


def _by_place(data: Data, name: str, merges: Sequence[str]) -> dict[str, dict[str, Data]]:
    return {merge: {place(row): row for row in rows(data, name, merge)} for merge in merges}


def _scaling_table(data: Data, name: str) -> Iterator[str]:
    blocks = [row for row in rows(data, name) if any(number(row, key) is not None for key in SLOPES)]
    if blocks:
        head = ["block", *(f"slope of {text}, {expected} expected" for text, expected in SLOPES.values()), "quadratic"]
        body = [[place(row), *(interval(bounded(row, key)) for key in SLOPES), _TOLD[quadratic(row)]] for row in blocks]
        yield _table(f"Scaling on {name}", head, body)


def _loss_table(data: Data, name: str) -> Iterator[str]:
    losses = data["sets"][name].get("losses")
    if not losses:
        return
    body = [[model, interval(found), "", "", "", ""] for model, found in losses["nll"].items()]
    for merge, found in losses.get("merges", {}).items():
        row = next((row for row in body if row[0] == merge), None)
        more = [interval(found.get(key)) for key in ("ensemble", "nonlinearity_cost", "kl", "agreement")]
        if row is not None:
            row[2:] = more
    head = ["model", "loss, nats per token", "ensemble", "non-linearity cost", "KL to ensemble", "top-1 agreement"]
    dilution = [
        [merge, parent, interval(cost, signed=True)]
        for merge, found in losses.get("merges", {}).items() for parent, cost in found["dilution_cost"].items()
    ]  # fmt: skip
    yield _table(f"Losses on {name}", head, body, (["merge", "against parent", "dilution cost"], dilution))


def _patch_table(data: Data, name: str) -> Iterator[str]:
    costs = costs_of(data, name) or {}
    patch, blame = costs.get("patch", {}), costs.get("blame", {})
    head = ["after", "loss recovered, nats per token", *(["own share"] if blame else [])]
    body = [
        [site, *(interval(found.get(site), signed=True) for found in (patch, *([blame] if blame else [])))]
        for site in dict.fromkeys((*patch, *blame))
    ]
    if body:
        yield _table(f"Causal patch on {name}", head, body)


def _lineage(data: Data) -> Iterator[str]:
    keys = ("relative_norm", "cosine_to_base", "cosine_to_others")
    body = [[r["parent"], *(shown(number(r, key), digits=4) for key in keys)] for r in data.get("lineage") or ()]
    if body:
        yield _table("Lineage", ["parent", "‖τ‖ / ‖base‖", "cos to base", "cos(τ, τ) with another"], body)


def _strata(data: Data) -> Iterator[str]:
    names = list(dict.fromkeys(s for found in data["sets"].values() for s in found.get("strata") or ()))
    body = [
        [name, place(row), *(shown(number(row, "by_stratum", s)) for s in names)]
        for name in data["sets"] for row in rows(data, name)
    ]  # fmt: skip
    if names:
        yield _table("R by kind of token", ["data", "block", *names], body)


def _table(title: str, head: Sequence[str], body: Sequence[Sequence[str]], *more: tuple[Any, Any]) -> str:
    """Tables that unfold under one title; they scroll by themselves where the screen is narrow."""
    parts = []
    for columns, lines in ((head, body), *more):
        top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in columns)
        rest = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
        table = f"<table><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table>"
        parts.append(f'<div class="wide" tabindex="0" role="region" aria-label="{escape(title)}">{table}</div>')
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"
