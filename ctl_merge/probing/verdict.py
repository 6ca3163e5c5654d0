"""What a probe's numbers support, in plain words.

Reads the plain data of `probe.json`; every key that a probe may lack (losses, patches, null, sweep, written) is
optional. No sentence is written without the numbers it rests on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctl_merge.kinship import STRAIGHT
from ctl_merge.probing.advice import advice
from ctl_merge.probing.record import (
    FLOOR,
    Data,
    below_floor,
    bounded,
    costs_of,
    focus,
    mean,
    number,
    place,
    prepared,
    quadratic,
    rows,
)
from ctl_merge.probing.wording import degree, interval, listed, share, shown, spans

LINEAGE = 0.9  # finetunes of a base have a cosine to it above this
LEAN = 0.05  # how far ĉ has to part from the weights, between two parents, to be called a preference
UNEVEN = 0.1  # by so much a parent's coefficient in the weights may differ between blocks without a word
UNSEEN = 5e-4  # nats that would be written as 0.000
_NEAR = 0.9  # blocks whose value is at least this share of the largest are named beside it


def verdict(data: Data) -> list[str]:
    """Three to six short statements: cautions, linearity, the blocks to blame, the parents followed, cost, advice."""
    data = prepared(data)
    found = [cautions(data), _linearity(data), _blame(data), _following(data), _cost(data), advice(data)]
    return [line for line in found if line]


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
    found += _nearer_base(data)
    found += _uneven(data)
    for name in focus(data):
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


def _nearer_base(data: Data) -> list[str]:
    """Parents whose task vectors share much: they may have a nearer common ancestor than this base."""
    near = {r["parent"]: c for r in data.get("lineage", []) if (c := number(r, "cosine_to_others") or 0) > STRAIGHT}
    if not near:
        return []
    most = shown(max(near.values()))
    return [
        f"the task vectors of {listed([str(parent) for parent in near])} have cosines of up to {most} "
        f"(finetunes that were trained apart are below {STRAIGHT}): if they have a nearer common ancestor than this "
        "base, name that as the base"
    ]


def _uneven(data: Data) -> list[str]:
    """The parent whose coefficient differs most between blocks: what a block reads was then mixed otherwise."""
    blocks = rows(data, next(iter(data["sets"])))
    found = {p: [c for row in blocks if (c := number(row, "effective_weight", p)) is not None] for p in data["parents"]}
    spread = {parent: max(own) - min(own) for parent, own in found.items() if own}
    parent = max(spread, key=lambda p: spread[p], default=None)
    if parent is None or spread[parent] < UNEVEN:
        return []
    ends = f"{shown(min(found[parent]), digits=2)} to {shown(max(found[parent]), digits=2)}"
    return [
        f"the coefficient of {parent} in the weights goes from {ends} over the blocks: where it changes, features "
        "still carry what the blocks before have mixed otherwise, and that counts in R and in the local part too"
    ]


def _linearity(data: Data) -> str:
    names = focus(data)
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
    text += _null({name: last for name, (_, last) in ends.items()})
    text += _scaling(data, names)
    every = [row for name in names for row in _has_r(data, name)]
    floors = [floor for row in every if (floor := number(row, "floor")) is not None]
    if floors and not any(map(below_floor, every)):
        text += f" Rounding alone gives R of at most {shown(max(floors))}: it does not matter."
    return text


def _null(ends: Data) -> str:
    """R of a random task vector, and whether the parents' are any more linear."""
    known = {n: (end["nonlinearity"], r) for n, end in ends.items() if (r := number(end, "nonlinearity_null"))}
    if not known:
        return ""
    nulls = listed([f"{shown(null)} for {name}" for name, (_, null) in known.items()])
    alike = [name for name, (own, null) in known.items() if own >= _NEAR * null]
    so = f": on {listed(alike)} the parents mix hardly more linearly than that" if alike else ""
    return f" A random task vector of the same size gives R {nulls} there{so}."


def _scaling(data: Data, names: Sequence[str]) -> str:
    """Where the deviation was seen to shrink with the square of the task vectors."""
    parts = []
    for name in names:
        known = [row for row in rows(data, name) if quadratic(row) is not None]
        good = [place(row) for row in known if quadratic(row)]
        if known:
            some = spans(good, [place(row) for row in known]) if good else "no block"
            parts.append(f"{'every block' if len(good) == len(known) else some} on {name}")
    return f" Scaled down, the deviation shrinks with the task vectors' square at {listed(parts)}." if parts else ""


def _r(row: Data) -> str:
    return interval(bounded(row, "nonlinearity"))


def _blame(data: Data) -> str:
    created, mended = [], []
    for name in focus(data):
        blocks = [row for row in rows(data, name) if number(row, "local") is not None]
        labels = [place(row) for row in blocks]
        if blocks:
            top = max(blocks, key=lambda row: row["local"])
            near = [place(r) for r in blocks if r is not top and r["local"] >= _NEAR * top["local"] > 0]
            close = f"; {spans(near, labels)} within 10 %" if near else ""
            created.append(f"block {place(top)} on {name} (local part {shown(top['local'])}{close})")
        mended += _charged(data, name) or _mended(data, name)
    text = [f"most deviation is created by {listed(created)}."] if created else []
    return f"Origin: {' '.join([*text, *mended])}" if text or mended else ""


def _charged(data: Data, name: str) -> list[str]:
    """The blocks whose own share of the non-linearity cost is above 0 beyond doubt, the largest two."""
    blame = (costs_of(data, name) or {}).get("blame", {})
    if not blame:
        return []
    sure = {site: found for site, found in blame.items() if (number(found, "low") or 0) > 0}
    labels = {row["block"]: f"block {place(row)}" for row in rows(data, name)} | {"logits": "the final norm and head"}
    top = sorted(sure, key=lambda site: -sure[site]["value"])[:2]
    shares = [f"{labels.get(site, site)} {interval(sure[site])}" for site in top]
    if not shares:
        return [f"On {name} no block's share of the non-linearity cost is above 0 beyond doubt."]
    return [f"Of the non-linearity cost on {name}, most comes from {listed(shares)} (nats per token)."]


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
    for name in focus(data) if len(data["parents"]) > 1 else []:
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
    feature, weight = (mean(number(row, space, parent) for row in chosen) or 0.0 for space in spaces)
    return feature, weight


def _cost(data: Data) -> str:
    texts: list[str] = []
    for name in focus(data) or list(data["sets"])[:2]:
        costs = costs_of(data, name)
        if costs is None or costs["merged"] is None:
            continue
        gap = costs["merged"] - costs["loss"]
        side = f"{shown(abs(gap))} {'worse' if gap > 0 else 'better'} than its best parent {costs['parent']}"
        side = f"that of its best parent {costs['parent']}" if abs(gap) < UNSEEN else side
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
    if max(abs(end) for end in (value, low or 0, high or 0)) < UNSEEN:
        return "costs nothing"
    if value < 0 and low is not None and high is not None:
        value, low, high, verb = -value, -high, -low, "gains"
    else:
        verb = "costs" if value >= 0 else "gains"
        value = abs(value)
    doubt = ", an interval that includes 0" if low is not None and high is not None and low <= 0 <= high else ""
    return f"{verb} {interval({'value': value, 'low': low, 'high': high})}{doubt}"
