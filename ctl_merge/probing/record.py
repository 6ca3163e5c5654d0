"""What probe.json holds, and under which names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Data = Mapping[str, Any]
FLOOR = 3  # R below this many times the rounding floor cannot be told from rounding


def printable(data: Any) -> Any:
    """The same data with its texts in one line each and without control characters: names come from outside."""
    if isinstance(data, str):
        return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in data)
    if isinstance(data, Mapping):
        return {printable(str(key)): printable(value) for key, value in data.items()}
    return [printable(item) for item in data] if isinstance(data, list | tuple) else data


def prepared(data: Data) -> dict[str, Any]:
    """The data with clean texts, and in each row its `place` for people."""
    data = printable(data)
    every = [row for found in data["sets"].values() for row in found["blocks"]]
    split = [stack.split(".") for stack in dict.fromkeys(row["stack"] for row in every)]
    common = next((i for i, parts in enumerate(zip(*split, strict=False)) if len(set(parts)) > 1), 0)
    for row in every:
        own = "input" if row["index"] is None else str(row["index"])
        row["place"] = f"{row['stack'].split('.')[common]} {own}" if len(split) > 1 else own
    return data  # type: ignore[return-value]


def number(found: Any, *keys: str) -> float | None:
    """The finite number at a path of keys, or None."""
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    usable = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if usable else None


def mean(values: Iterable[Any]) -> float | None:
    """The mean of the numbers among the values, or None."""
    known = [v for value in values if (v := number(value)) is not None]
    return sum(known) / len(known) if known else None


def bounded(row: Data, key: str, *inner: str) -> dict[str, float | None]:
    """A number of a row with its 95 % interval, which lies beside it as `key_low` and `key_high`."""
    ends = {"value": key, "low": f"{key}_low", "high": f"{key}_high"}
    return {end: number(row, name, *inner) for end, name in ends.items()}


def main_merge(data: Data) -> dict[str, Any]:
    """The merge that the report is about: the one marked `main`, else the first."""
    return next((merge for merge in data["merges"] if merge.get("main")), data["merges"][0])


def heading(data: Data) -> str:
    """What was probed: the recipe and its method, where the report names them."""
    return f"Probe of {named(main_merge(data))}"


def named(merge: Data) -> str:
    """A merge by its recipe's name and its method, as far as the report has them: `ties.yaml (ties)`."""
    name, method = merge.get("recipe") or merge["name"], merge.get("method")
    return f"{name} ({method})" if method and method != name else str(name)


def rows(data: Data, name: str, merge: str | None = None, parts: Iterable[str] = ("block",)) -> list[dict[str, Any]]:
    """The rows of a data set by depth: of one merge (None: the main one), at blocks or other parts."""
    merge, wanted = main_merge(data)["name"] if merge is None else merge, set(parts)
    return [row for row in data["sets"][name]["blocks"] if row["merge"] == merge and row["part"] in wanted]


def focus(data: Data) -> list[str]:
    """The data sets that are spoken of: all, or of more than two the least and the most linear at the end."""
    last = {
        n: r for n in data["sets"] if rows(data, n) and (r := number(rows(data, n)[-1], "nonlinearity")) is not None
    }
    names = sorted(last, key=lambda name: last[name], reverse=True)
    return [name for name in data["sets"] if name in (names if len(names) < 3 else (names[0], names[-1]))]


def place(row: Data) -> str:
    """Where a row of prepared data is: `3`, `input`, or `encoder 3` where a model has several stacks."""
    return row["place"]


def costs_of(data: Data, name: str) -> dict[str, Any] | None:
    """The main merge's loss against the best parent of a data set, and the two costs that it is made of."""
    losses = data["sets"][name].get("losses")
    merge = main_merge(data)["name"]
    if not losses or merge not in losses.get("merges", {}):
        return None
    best, own = (best_parent(data, name) or {}).get("parent"), losses["merges"][merge]
    loss = number(losses["nll"].get(best), "value")
    if loss is None:
        return None
    return {
        "parent": best, "loss": loss, "base": number(losses["nll"].get("base"), "value"),
        "merged": number(losses["nll"].get(merge), "value"), "ensemble": own["ensemble"],
        "dilution": own["dilution_cost"].get(best), "nonlinearity": own["nonlinearity_cost"],
        "patch": own.get("patch") or {}, "blame": own.get("blame") or {},
    }  # fmt: skip


def best_parent(data: Data, name: str) -> dict[str, Any] | None:
    """The parent of the lowest loss on a data set; by how much the second loses more is its `margin`, if known."""
    found = data["sets"][name]
    if found.get("best_parent"):
        return dict(found["best_parent"])
    nll = (found.get("losses") or {}).get("nll", {})
    known = {p: loss for p in data["parents"] if (loss := number(nll.get(p), "value")) is not None}
    return {"parent": min(known, key=lambda parent: known[parent])} if known else None


def recipes(data: Data) -> list[dict[str, Any]]:
    """The merges that are recipes over the same models, the main one first; empty unless there are two."""
    found = [merge for merge in data["merges"] if number(merge, "alpha") is None]
    main = main_merge(data)
    return sorted(found, key=lambda merge: merge is not main) if len(found) > 1 else []


def against_main(data: Data, name: str, merge: str) -> Data | None:
    """The loss of another recipe minus the main one's, with its interval. It was paired with the first of them."""
    losses = data["sets"][name].get("losses") or {}
    first = main_merge(data) is data["merges"][0]
    return losses.get("merges", {}).get(merge, {}).get("against_first") if first else None


def quadratic(row: Data) -> bool | None:
    """Whether the deviation grows as the square of the task vectors here; None where that is unknown."""
    return row.get("quadratic")


def sweep(data: Data) -> list[dict[str, Any]]:
    """The merges that have an α, by α; empty unless there are two."""
    found = sorted((m for m in data["merges"] if number(m, "alpha") is not None), key=lambda merge: merge["alpha"])
    return found if len(found) > 1 else []


def below_floor(row: Data) -> bool:
    """Whether R cannot be told from rounding."""
    value, floor = number(row, "nonlinearity"), number(row, "floor")
    return value is not None and floor is not None and value < FLOOR * floor
