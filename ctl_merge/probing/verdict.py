"""What a probe's numbers support, in plain words.

Reads the plain data of `probe.json`; every key that a probe may lack (losses, patches, null, sweep, written) is
optional. No sentence is written without the numbers it rests on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ctl_merge.probing.record import (
    FLOOR,
    Data,
    below_floor,
    bounded,
    costs_of,
    main_merge,
    number,
    place,
    prepared,
    rows,
    sweep,
)
from ctl_merge.probing.wording import degree, interval, listed, share, shown, spans

LINEAGE = 0.9  # finetunes of a base have a cosine to it above this
LEAN = 0.05  # how far ĉ has to part from the weights, between two parents, to be called a preference
_NEAR = 0.9  # blocks whose value is at least this share of the largest are named beside it


def verdict(data: Data) -> list[str]:
    """Three to six short statements: cautions, linearity, the blocks to blame, the parents followed, cost, advice."""
    data = prepared(data)
    found = [cautions(data), _linearity(data), _blame(data), _following(data), _cost(data), _advice(data)]
    return [line for line in found if line]


def _focus(data: Data) -> list[str]:
    """The data sets that are spoken of: all, or of more than two the least and the most linear at the end."""
    last = {
        n: r for n in data["sets"] if rows(data, n) and (r := number(rows(data, n)[-1], "nonlinearity")) is not None
    }
    names = sorted(last, key=lambda name: last[name], reverse=True)
    return [name for name in data["sets"] if name in (names if len(names) < 3 else (names[0], names[-1]))]


def _has_r(data: Data, name: str) -> list[dict[str, Any]]:
    return [row for row in rows(data, name) if number(row, "nonlinearity") is not None]


def cautions(data: Data) -> str:
    """What has to be known before any other number is read; empty where nothing has."""
    found = []
    for row in data.get("lineage", []):
        cosine = number(row, "cosine_to_base")
        if cosine is not None and cosine < LINEAGE:
            found.append(
                f"the weights of {row['parent']} have a cosine of {shown(cosine)} with the base (finetunes are above "
                f"{LINEAGE}): it may not descend from this base, and then the rest means little"
            )
    for name in _focus(data):
        blocks = _has_r(data, name)
        labels = [place(row) for row in blocks]
        low = [label for row, label in zip(blocks, labels, strict=True) if below_floor(row)]
        if low:
            found.append(
                f"below floor on {name}: at {spans(low, labels)} R is under {FLOOR} times that of rounding alone"
            )
        odd = [r for r in blocks if (number(r, "cos") or 0) > 0.99 and r["nonlinearity"] > 0.3]
        if odd:
            top = max(r["nonlinearity"] for r in odd)
            where = spans([place(r) for r in odd], labels)
            found.append(f"on {name} cosines at {where} exceed 0.99 while R is up to {shown(top)}: trust R, not cos")
    return f"Caution: {'; '.join(found)}." if found else ""


def _linearity(data: Data) -> str:
    names = _focus(data)
    if not names:
        return "Linearity: the parents do not disagree on these texts, or were not compared, so R is not defined."
    ends = {name: (_has_r(data, name)[0], _has_r(data, name)[-1]) for name in names}
    parts = [
        f"{share(last['nonlinearity'])} for {n} (R {_r(last)}, {degree(last['nonlinearity'])})"
        for n, (_, last) in ends.items()
    ]
    first, last = ends[names[0]]
    text = (
        f"Linearity: after the last block ({place(last)}) linear mixing explains {listed(parts)} of what the "
        "parents disagree on."
    )
    if first is not last:
        text += f" After block {place(first)} it was {listed([share(f['nonlinearity']) for f, _ in ends.values()])}."
    nulls = [
        f"{shown(r)} for {n}" for n, (_, end) in ends.items() if (r := number(end, "nonlinearity_null")) is not None
    ]
    if nulls:
        text += f" A random task vector of the same size gives R {listed(nulls)} there."
    every = [row for name in names for row in _has_r(data, name)]
    floors = [floor for row in every if (floor := number(row, "floor")) is not None]
    if floors and not any(map(below_floor, every)):
        text += f" Rounding alone gives R of at most {shown(max(floors))}: it does not matter."
    return text


def _r(row: Data) -> str:
    return interval(bounded(row, "nonlinearity"))


def _blame(data: Data) -> str:
    created, mended = [], []
    for name in _focus(data):
        blocks = [row for row in rows(data, name) if number(row, "local") is not None]
        labels = [place(row) for row in blocks]
        if blocks:
            top = max(blocks, key=lambda row: row["local"])
            near = [place(r) for r in blocks if r is not top and r["local"] >= _NEAR * top["local"] > 0]
            close = f"; {spans(near, labels)} within 10 %" if near else ""
            created.append(f"block {place(top)} on {name} (local part {shown(top['local'])}{close})")
        mended += _mended(data, name)
    text = [f"most deviation is created by {listed(created)}."] if created else []
    return f"Origin: {' '.join([*text, *mended])}" if text or mended else ""


def _mended(data: Data, name: str) -> list[str]:
    """The block after which linear features would recover the most loss, if any recovers some beyond doubt."""
    patch = (costs_of(data, name) or {}).get("patch", {})
    known = {site: gain for site, gain in patch.items() if number(gain, "value") is not None}
    if not known:
        return []
    site = max(known, key=lambda s: known[s]["value"])
    label = next((place(row) for row in rows(data, name) if row["block"] == site), site)
    if not (number(known[site], "low") or 0) > 0:
        return [f"No block's patch recovers loss beyond doubt on {name} (at best {interval(known[site])})."]
    return [f"Made linear up to block {label}, {name} would gain {interval(known[site])} nats per token."]


def leaning(data: Data, row: Data) -> str | None:
    """The parent whose ĉ exceeds its weight by at least LEAN more than another's does."""
    pairs = {p: (number(row, "effective_feature", p), number(row, "effective_weight", p)) for p in data["parents"]}
    excess = {p: f - w for p, (f, w) in pairs.items() if f is not None and w is not None}
    if len(excess) < 2 or max(excess.values()) - min(excess.values()) < LEAN:
        return None
    return max(excess, key=lambda parent: excess[parent])


def _following(data: Data) -> str:
    parts = []
    for name in _focus(data) if len(data["parents"]) > 1 else []:
        blocks = rows(data, name)
        labels, leads = [place(row) for row in blocks], [leaning(data, row) for row in blocks]
        texts = []
        for parent in sorted({lead for lead in leads if lead}, key=leads.count, reverse=True)[:2]:
            chosen = [row for row, lead in zip(blocks, leads, strict=True) if lead == parent]
            kept = {p: _kept(chosen, p) for p in data["parents"]}
            least = min(kept, key=lambda p: kept[p][0] - kept[p][1])
            numbers = ", ".join(
                f"{p} {shown(kept[p][0], digits=2)} / {shown(kept[p][1], digits=2)}" for p in (parent, least)
            )
            where = spans([place(row) for row in chosen], labels)
            texts.append(f"{where} lean{'s' * (len(chosen) == 1)} to {parent} (ĉ in features / weights: {numbers})")
        parts.append(f"on {name} {listed(texts)}" if texts else f"on {name} no block prefers one by {LEAN} or more")
    return f"Parents: {'; '.join(parts)}." if parts else ""


def _kept(chosen: Sequence[Data], parent: str) -> tuple[float, float]:
    """Mean effective coefficient of a parent in features and in weights."""
    spaces = ("effective_feature", "effective_weight")
    feature, weight = (_mean(number(row, space, parent) for row in chosen) or 0.0 for space in spaces)
    return feature, weight


def _mean(values: Iterable[Any]) -> float | None:
    known = [v for value in values if (v := number(value)) is not None]
    return sum(known) / len(known) if known else None


def _cost(data: Data) -> str:
    texts: list[str] = []
    for name in _focus(data) or list(data["sets"])[:2]:
        costs = costs_of(data, name)
        if costs is None or costs["merged"] is None:
            continue
        gap = costs["merged"] - costs["loss"]
        side = f"{shown(abs(gap))} {'worse' if gap > 0 else 'better'} than its best parent {costs['parent']}"
        base = f" (base {shown(costs['base'])})" if costs["base"] is not None else ""
        texts.append(
            f"{'On' if texts else 'on'} {name} the merge's loss is {shown(costs['merged'])} nats per token{base}, "
            f"{side}: "
            f"dilution {_costing(costs['dilution'])}, non-linearity {_costing(costs['nonlinearity'])}."
        )
    return f"Cost: {' '.join(texts)}" if texts else ""


def _costing(found: Any) -> str:
    value, low, high = (number(found, key) for key in ("value", "low", "high"))
    if value is None:
        return "unknown"
    if value < 0 and low is not None and high is not None:
        value, low, high, verb = -value, -high, -low, "gains"
    else:
        verb = "costs" if value >= 0 else "gains"
        value = abs(value)
    doubt = ", an interval that includes 0" if low is not None and high is not None and low <= 0 <= high else ""
    return f"{verb} {interval({'value': value, 'low': low, 'high': high})}{doubt}"


def _advice(data: Data) -> str:
    names = _focus(data)
    costs = {name: found for name in names if (found := costs_of(data, name))}
    paying = [name for name, found in costs.items() if (number(found["nonlinearity"], "low") or 0) > 0]
    bent = [name for name in names if (number(rows(data, name)[-1], "nonlinearity") or 0) >= 0.3]
    tips = []
    blamed = list(dict.fromkeys(place(row) for name in paying or bent for row in _top_local(data, name)))
    if paying or (bent and not costs):
        where = f", or smaller ones only in block{'s' if len(blamed) > 1 else ''} {listed(blamed)}" if blamed else ""
        tips.append(f"smaller coefficients{where}: the deviation shrinks with their square where linearity holds")
    elif costs:
        tips.append("leave linearity alone: its cost is not above 0 beyond doubt")
    diluted = [
        n for n, f in costs.items() if (number(f["dilution"], "low") or 0) > 0 and (f["merged"] or 0) > f["loss"]
    ]
    for parent in dict.fromkeys(costs[n]["parent"] for n in diluted):
        own = " or ".join(n for n in diluted if costs[n]["parent"] == parent)
        tips.append(f"more weight on {parent} if {own} matters most")
    if any(below_floor(row) for name in names for row in rows(data, name)):
        tips.append("writing the merge in float32, since rounding is as large as what is measured")
    tips += [
        f"α = {alpha:g}, the best of the sweep on {n}" for n in costs if (alpha := _best_alpha(data, n)) is not None
    ]
    return f"To try: {'; '.join(tips)}." if tips else ""


def _best_alpha(data: Data, name: str) -> float | None:
    """The α of lowest loss, where it is not the main merge's."""
    nll = data["sets"][name]["losses"]["nll"]
    known = [(loss, m) for m in sweep(data) if (loss := number(nll.get(m["name"]), "value")) is not None]
    best = min(known, key=lambda pair: pair[0])[1] if known else None
    return best["alpha"] if best and best["name"] != main_merge(data)["name"] else None


def _top_local(data: Data, name: str) -> list[dict[str, Any]]:
    known = [row for row in rows(data, name) if (number(row, "local") or 0) > 0]
    return [max(known, key=lambda row: row["local"])] if known else []
