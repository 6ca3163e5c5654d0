"""What a probe found, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ctl_merge
from ctl_merge.probing.grams import Grams
from ctl_merge.probing.grams import save as save_grams
from ctl_merge.probing.metrics import DRAWS, disagreement, inner, interpolation, ratio, site_metrics, unit
from ctl_merge.probing.run import BASE, INPUT, Observations, Rider, Subject

FORMAT = 1
_SEED = 0  # of the bootstrap


@dataclass(frozen=True)
class ProbeReport:
    """The report as plain data (`data`, the content of probe.json) and as flat rows (`rows`, one a block and merge)."""

    data: dict[str, Any]
    statistics: Mapping[str, Grams]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each data set, merge and site: `pandas.DataFrame(report.rows)`."""
        return [{"set": name, **row} for name, found in self.data["sets"].items() for row in found["blocks"]]

    def to_json(self) -> str:
        """probe.json: numbers as they are, null where a number does not exist."""
        return json.dumps(_plain(self.data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write probe.json, report.html, the figures and the statistics into a folder."""
        from ctl_merge.probing.figures import write_figures
        from ctl_merge.probing.page import render_page

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        plain = json.loads(self.to_json())
        (folder / "probe.json").write_text(self.to_json(), "utf-8")
        (folder / "report.html").write_text(render_page(plain), "utf-8")
        write_figures(plain, folder / "figures")
        save_grams(folder / "grams.npz", self.statistics)


def build_report(
    subject: Subject, riders: Sequence[Rider], observed: Mapping[str, Observations], settings: Mapping[str, Any]
) -> ProbeReport:
    """All metrics of a run."""
    merges = [
        {
            "name": name,
            "effective_weight": dict(zip(subject.parents, subject.coefficients(i)[0].tolist(), strict=True)),
            "explained_weight": subject.coefficients(i)[1],
        }
        for i, name in enumerate(subject.merges)
    ]
    return ProbeReport(
        {
            "format": FORMAT, "ctl_merge": ctl_merge.__version__,
            "base": subject.base.name, "parents": list(subject.parents), "merges": merges,
            "settings": dict(settings), "warnings": [], "lineage": lineage(subject),
            "sets": {name: _set(subject, riders, found) for name, found in observed.items()},
        },
        {name: found.grams for name, found in observed.items()},
    )  # fmt: skip


def lineage(subject: Subject) -> list[dict[str, Any]]:
    """How far each parent is from the base: ‖τ‖/‖θ_0‖ and cos(θ_i, θ_0), over the whole model.

    Finetunes have cosines above 0.9 as a rule; far below it, the base is not the base.
    """
    gram, k = subject.weights.total(), len(subject.parents)
    own = gram[k, k]
    found = []
    for i, name in enumerate(subject.parents):
        both = gram[i, i] + 2 * gram[i, k] + own
        cosine = (gram[i, k] + own) / math.sqrt(both * own) if both > 0 and own > 0 else math.nan
        found.append({"parent": name, "relative_norm": math.sqrt(gram[i, i] / own), "cosine_to_base": cosine})
    return found


def _set(subject: Subject, riders: Sequence[Rider], found: Observations) -> dict[str, Any]:
    tokens = torch.stack(found.grams.tokens)
    blocks = [
        _row(subject, riders, found, site, place) for site in found.grams.sites for place in range(len(subject.merges))
    ]
    return {
        "sequences": len(tokens), "tokens": int(tokens.sum()),
        "strata": dict(zip(found.grams.strata, tokens.sum(0).int().tolist(), strict=True)),
        "blocks": blocks, "losses": _losses(subject, found, riders),
    }  # fmt: skip


def _row(subject: Subject, riders: Sequence[Rider], found: Observations, site: str, place: int) -> dict[str, Any]:
    grams = found.grams.sites[site]
    name = riders[place].name
    merged = grams.sources.index(name)
    ghost = grams.sources.index(f"{name}/ghost") if f"{name}/ghost" in grams.sources else None
    gram, robust = (torch.stack(part).numpy() for part in (grams.gram, grams.robust))  # (N, S, M, M)
    cosines = torch.stack(grams.cosines).sum((0, 1)) / torch.stack(grams.tokens).sum()
    c = found.coefficients[site][place]
    metrics = site_metrics(
        gram.sum(1), robust.sum(1), float(cosines[place]), c, merged, ghost, np.random.default_rng(_SEED)
    )
    values = asdict(metrics)
    low, high = values.pop("nonlinearity_interval")
    stack, block, part = _address(site)
    parents = list(subject.parents)
    return {
        "block": site, "stack": stack, "index": block, "part": part, "merge": name,
        **values, "nonlinearity_low": low, "nonlinearity_high": high,
        "cos_to_parents": dict(zip(parents, metrics.cos_to_parents, strict=True)),
        "effective_feature": dict(zip(parents, metrics.effective_feature, strict=True)),
        "effective_weight": dict(zip(parents, c.tolist(), strict=True)),
        "explained_weight": found.explained[site][place] if site in found.explained else math.nan,
        "by_stratum": _by_stratum(gram, c, merged, found.grams.strata), "massive": grams.massive,
        **_variants(gram.sum(1), c, merged, grams.sources, name),
    }  # fmt: skip


def _address(site: str) -> tuple[str, int | None, str]:
    """`model.layers.3.mlp` -> its stack, index and part."""
    stack, _, last = site.rpartition(".")
    if last == INPUT:
        return stack, None, INPUT
    if last.isdigit():
        return stack, int(last), "block"
    stack, _, index = stack.rpartition(".")
    return stack, int(index), last


def _by_stratum(gram: np.ndarray, c: np.ndarray, merged: int, strata: list[str]) -> dict[str, float]:
    size = gram.shape[-1]
    deviation = unit(merged, size) - interpolation(c, size)
    totals = {name: gram[:, i].sum(0) for i, name in enumerate(strata)}
    return {n: float(ratio(inner(g, deviation, deviation), disagreement(g, c))) for n, g in totals.items()}


def _variants(gram: np.ndarray, c: np.ndarray, merged: int, sources: list[str], name: str) -> dict[str, float]:
    """R of the merge as written, and the floor: what rounding alone would look like."""
    size, found = gram.shape[-1], {}
    if f"{name}/written" in sources:
        written, total = unit(sources.index(f"{name}/written"), size), gram.sum(0)
        apart = disagreement(total, c)
        for key, other in (("nonlinearity_written", interpolation(c, size)), ("floor", unit(merged, size))):
            found[key] = float(ratio(inner(total, written - other, written - other), apart))
    if f"{name}/null" in sources:
        null, total, centre = unit(sources.index(f"{name}/null"), size), gram.sum(0), interpolation(c, size)
        swapped = _swap(centre, len(c), sources.index(f"{name}/null-parent"))
        apart = disagreement(_permuted(total, len(c), sources.index(f"{name}/null-parent")), c)
        found["nonlinearity_null"] = float(ratio(inner(total, null - swapped, null - swapped), apart))
    return found


def _swap(combination: np.ndarray, one: int, other: int) -> np.ndarray:
    found = combination.copy()
    found[[one, other]] = found[[other, one]]
    return found


def _permuted(gram: np.ndarray, one: int, other: int) -> np.ndarray:
    order = np.arange(len(gram))
    order[[one, other]] = order[[other, one]]
    return gram[np.ix_(order, order)]


def _losses(subject: Subject, found: Observations, riders: Sequence[Rider]) -> dict[str, Any] | None:
    """Nats per token with 95 % intervals over sequences, and what a merge's loss is made of.

    L(merged) - L_i = [L(merged) - L(ensemble)] + [L(ensemble) - L_i]: non-linearity cost and dilution cost.
    """
    losses = found.losses
    if losses is None:
        return None
    tokens = np.array(losses.tokens, dtype=float)
    draws = np.random.default_rng(_SEED).integers(0, len(tokens), (DRAWS, len(tokens)))

    def mean(sums: Sequence[float]) -> dict[str, float]:
        values = np.array(sums)
        low, high = np.quantile(values[draws].sum(1) / tokens[draws].sum(1), [0.025, 0.975])
        return {"value": float(values.sum() / tokens.sum()), "low": float(low), "high": float(high)}

    nll = {name: np.array(losses.nll[name]) for name in losses.models}
    merges = {}
    main = riders[0].name
    for name in subject.merges:
        ensemble = np.array(losses.ensemble[name])
        merges[name] = {
            "ensemble": mean(losses.ensemble[name]), "nonlinearity_cost": mean(nll[name] - ensemble),  # type: ignore[arg-type]
            "dilution_cost": {p: mean(ensemble - nll[p]) for p in subject.parents},  # type: ignore[arg-type]
            "against_first": mean(nll[name] - nll[main]) if name != main else None,  # type: ignore[arg-type]
            "kl": mean(losses.kl[name]), "agreement": mean(losses.agree[name]),
            "patch": {r.patch: mean(nll[name] - nll[r.name]) for r in _patches(riders, name)},  # type: ignore[arg-type]
        }  # fmt: skip
    shown = [BASE, *subject.parents, *subject.merges]
    return {"nll": {name: mean(losses.nll[name]) for name in shown}, "merges": merges}


def _patches(riders: Sequence[Rider], name: str) -> list[Rider]:
    return [rider for rider in riders if rider.patch and rider.name.startswith(f"{name}/")]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
