"""Does the nonlinearity ratio R predict what a merge costs in loss? Rank correlations over many merges of one family.

    python benchmarks/ctl_predicts_loss.py --base BASE --experts math=MATH code=CODE french=FRENCH \\
        --text math=test.jsonl:question,answer --text code=code.jsonl:prompt,solution --text french=val.fr

Every pair of experts and the set of all of them is merged in a dozen ways; each merge is probed on its experts' own
texts (a text is named like its expert). Measured, as means over those texts, in nats per token:

  gap    L(merged) - L(the text's own expert): what the merge costs. 0 is a merge as good as its experts.
  cost   L(merged) - L(logit ensemble): the part of it that linearity does not explain. 0 where linearity is exact.

R is taken over blocks and texts. Its floor as a predictor is what weights alone tell, without running anything: how far
the merge is from its experts. Its ceiling is ±1. Dilution, L(ensemble) - L(own expert), is listed for comparison: the
gap is the cost plus that. Columns: correlation over all merges; partial, of ranks, given ‖τ‖, cos(τ_i, τ_j) and the sum
of coefficients (and its square); given the distance to the experts as well; mean over merges of the same experts, and
over merges by the same recipe. Tables: all merges, and those that do not extrapolate (coefficients sum to ≤ 1.05),
as extrapolated logits are a poor ensemble. Intervals (95 %) resample groups of experts, or recipes in the last column;
groups that share an expert are not independent, so they are narrower than they should be. Those that resample merges,
as if these were independent, are in the JSON only.

`--scale` moves the experts towards the base first.
`--output DIR` gets results as JSON and a figure. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from predicts_loss_figure import figure
from rich import box
from rich.console import Console
from rich.table import Table

import ctl_merge
from ctl_merge.reference import ModelRef
from ctl_merge.stored import open_checkpoint
from ctl_merge.weights import task_grams

PREDICTORS = {
    "R": "R, mean of blocks",
    "R_last": "R, last block",
    "local": "local parts, sum",
    "deviation": "‖dev‖ / ‖I‖, mean",
    "angle": "1 - cos, mean",
    "distance": "weights: ‖θ_m - θ_i‖",
    "tau_merged": "weights: ‖τ_m‖",
    "dilution": "dilution (losses)",
}
COLUMNS = {
    "all": "all",
    "partial": "partial",
    "given_distance": "given distance",
    "same_experts": "same experts",
    "same_recipe": "same recipe",
}
OUTCOMES = {"gap": "L(merged) - L(own expert)", "cost": "L(merged) - L(logit ensemble)"}
DRAWS = 2000
REACH = 1.05  # sum of coefficients beyond which a merge extrapolates
Array = np.ndarray


@dataclass(frozen=True)
class Setting:
    """A method with its parameters. `weights`: one per expert, for groups of that size (None: `weight`, or 1/k)."""

    label: str
    method: str
    parameters: Mapping[str, float]
    weights: tuple[float, ...] | None = None

    def recipe(self, base: Path, experts: Sequence[Path]) -> str | None:
        """The recipe, or None where the method does not take so many models."""
        weights = self.weights or (self.parameters.get("weight", 1 / len(experts)),) * len(experts)
        models = [{"model": str(e), "parameters": {"weight": w}} for e, w in zip(experts, weights, strict=False)]
        if self.method == "slerp":
            if len(experts) != 2:
                return None
            base, models = experts[0], [{"model": str(experts[1])}]
        elif len(weights) != len(experts):
            return None
        elif self.method == "linear":  # the base is an input there; named, all recipes have the same reference
            models.insert(0, {"model": str(base), "parameters": {"weight": 0.0}})
        content = {"merge_method": self.method, "base_model": str(base), "models": models}
        return json.dumps({**content, "parameters": dict(self.parameters)})


ARITHMETIC = (0.3, 0.7, 1.0)
SETTINGS = [
    Setting("linear", "linear", {}),
    Setting("linear 1:3", "linear", {}, (0.25, 0.75)),
    Setting("linear 3:1", "linear", {}, (0.75, 0.25)),
    *(Setting(f"task_arithmetic λ {s:g}", "task_arithmetic", {"weight": s}) for s in ARITHMETIC),
    Setting("ties density 0.2", "ties", {"density": 0.2}),
    Setting("ties density 0.5", "ties", {"density": 0.5}),
    Setting("ties density 0.2, λ 0.5", "ties", {"density": 0.2, "lambda": 0.5}),
    Setting("dare_linear density 0.5", "dare_linear", {"density": 0.5}),
    Setting("dare_linear density 0.8", "dare_linear", {"density": 0.8}),
    Setting("slerp t 0.5", "slerp", {"t": 0.5}),
]


# Measuring


def measure(
    setting: Setting, base: Path, experts: Mapping[str, Path], texts: Mapping[str, str], sequences: int, length: int
) -> dict[str, object] | None:
    """One merge of the experts, probed on their texts."""
    text = setting.recipe(base, list(experts.values()))
    if text is None:
        return None
    recipe = ctl_merge.parse_recipe(text)
    report = ctl_merge.probe(recipe, [texts[name] for name in experts], sequences=sequences, length=length)
    found: dict[str, list[float]] = {name: [] for name in ("gap", "cost", "dilution", *list(PREDICTORS)[:5])}
    for name, path in experts.items():
        losses = report.data["sets"][name]["losses"]
        nll = {model: loss["value"] for model, loss in losses["nll"].items()}
        own = nll.get(path.name, nll["base"])  # slerp's first expert is the base of its probe
        ensemble = losses["merges"]["merged"]["ensemble"]["value"]
        rows = [row for row in report.rows if row["set"] == name and row["part"] == "block"]
        ratios = [row["nonlinearity"] for row in rows]
        found["gap"].append(nll["merged"] - own)
        found["cost"].append(nll["merged"] - ensemble)
        found["dilution"].append(ensemble - own)
        found["R"].append(float(np.mean(ratios)))
        found["R_last"].append(ratios[-1])
        found["local"].append(sum(row["local"] for row in rows))
        found["deviation"].append(float(np.mean([row["relative_deviation"] for row in rows])))
        found["angle"].append(float(np.mean([1 - row["cos"] for row in rows])))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {"recipe": setting.label, "method": setting.method, **means, **weight_space(base, experts, recipe)}


def weight_space(base: Path, experts: Mapping[str, Path], recipe: ctl_merge.Recipe) -> dict[str, float]:
    """Norms in units of ‖θ_0‖: of the task vectors (mean), of the merge's, from the merge to its experts (mean); the
    task vectors' mean cosine; the sum of the merge's effective coefficients."""
    opened = [open_checkpoint(ModelRef.parse(str(path))) for path in (base, *experts.values())]
    grams = task_grams(opened[0], opened[1:], [ctl_merge.open_merge(recipe)])
    gram, k = grams.total(), len(experts)
    norms = np.sqrt(np.diag(gram) / gram[k, k])
    apart = [math.sqrt(max(gram[i, i] - 2 * gram[i, -1] + gram[-1, -1], 0) / gram[k, k]) for i in range(k)]
    cosines = [gram[i, j] / math.sqrt(gram[i, i] * gram[j, j]) for i, j in itertools.combinations(range(k), 2)]
    return {
        "distance": float(np.mean(apart)), "tau_merged": float(norms[-1]), "tau": float(norms[:k].mean()),
        "cosine": float(np.mean(cosines)), "coefficients": float(grams.coefficients(gram, 0)[0].sum()),
    }  # fmt: skip


def groups(experts: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Every pair, and all experts together."""
    for names in itertools.combinations(experts, 2):
        yield {name: experts[name] for name in names}
    if len(experts) > 2:
        yield dict(experts)


# Statistics


def ranks(values: Array) -> Array:
    """Ranks, their mean where values are equal: (n,) -> (n,)."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[places]


def spearman(x: Array, y: Array, controls: Array | None = None) -> float:
    """Rank correlation; of what a linear fit to the controls' ranks (n, c) leaves of both, if there are any."""
    a, b = ranks(x), ranks(y)
    known = [np.ones(len(x))]
    if controls is not None:
        known += [ranks(column) for column in controls.T]
        known += [(known[-1] - known[-1].mean()) ** 2]  # the last control's effect need not be monotone
    fit = np.stack(known, axis=1)
    a, b = (v - fit @ np.linalg.lstsq(fit, v, rcond=1e-9)[0] for v in (a, b))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 1e-9 else math.nan


def within(x: Array, y: Array, labels: Array) -> Array:
    """The rank correlation in each group of equal labels that has at least four merges."""
    chosen = [labels == label for label in dict.fromkeys(labels)]
    return np.array([spearman(x[c], y[c]) for c in chosen if c.sum() > 3])


def interval(statistic: Callable[[Array], float], clusters: Sequence[Array]) -> list[float]:
    """95 % bootstrap interval of a statistic of rows, from resampled clusters of rows."""
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(clusters), (DRAWS, len(clusters)))
    found = [statistic(np.concatenate([clusters[i] for i in draw])) for draw in draws]
    return [round(float(bound), 3) for bound in np.nanquantile(found, [0.025, 0.975])]


def correlate(rows: Sequence[Mapping[str, object]], predictor: str, outcome: str) -> dict[str, object]:
    """All correlations of a predictor with an outcome, each with its interval."""
    x, y = (np.array([row[name] for row in rows], dtype=float) for name in (predictor, outcome))
    known = ("distance", "tau", "cosine", "coefficients")
    controls = np.array([[row[name] for name in known] for row in rows], dtype=float)
    experts, recipes = (np.array([row[name] for row in rows]) for name in ("experts", "recipe"))
    grouped = [np.flatnonzero(experts == name) for name in dict.fromkeys(experts)]
    overall: dict[str, Callable[[Array], float]] = {"all": lambda at: spearman(x[at], y[at])}
    overall["partial"] = lambda at: spearman(x[at], y[at], controls[at, 1:])
    if predictor != "distance":
        overall["given_distance"] = lambda at: spearman(x[at], y[at], controls[at])
    found: dict[str, object] = {"predictor": predictor, "outcome": outcome}
    for name, statistic in overall.items():
        found[name] = round(statistic(np.arange(len(rows))), 3)
        found[f"{name}_interval"] = interval(statistic, grouped)
        found[f"{name}_by_merge"] = interval(statistic, list(np.arange(len(rows))[:, None]))
    for name, labels in (("same_experts", experts), ("same_recipe", recipes)):
        each = within(x, y, labels)
        found[name] = round(float(each.mean()), 3)
        found[f"{name}_interval"] = interval(
            lambda at, e=each: float(e[at].mean()), list(np.arange(len(each))[:, None])
        )
    return found


def analyse(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """All predictors with all outcomes, over all merges and over those that do not extrapolate."""
    within_reach = [row for row in rows if row["coefficients"] <= REACH]  # type: ignore[operator]
    return [
        {"merges": name, "count": len(chosen), **correlate(chosen, predictor, outcome)}
        for name, chosen in (("all", rows), ("not extrapolating", within_reach))
        for outcome in OUTCOMES
        for predictor in PREDICTORS
        if predictor != outcome
    ]


# Showing


def show(rows: Sequence[Mapping[str, object]], correlations: Sequence[Mapping[str, object]]) -> None:
    """Means by recipe, then correlations, at 100 columns."""
    table = Table(title=f"{len(rows)} merges, means over groups of experts", box=box.SIMPLE)
    for column in ("recipe", "merges", "R", "R last", "gap", "cost"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for label in dict.fromkeys(str(row["recipe"]) for row in rows):
        own = [row for row in rows if row["recipe"] == label]
        means = [np.mean([float(row[name]) for row in own]) for name in ("R", "R_last", "gap", "cost")]  # type: ignore[arg-type]
        table.add_row(label, str(len(own)), *(f"{mean:.2f}" for mean in means))
    Console(width=100).print(table)
    for merges, (outcome, title) in itertools.product(
        dict.fromkeys(c["merges"] for c in correlations), OUTCOMES.items()
    ):
        chosen = [c for c in correlations if c["merges"] == merges and c["outcome"] == outcome]
        heading = f"{merges}: {chosen[0]['count']} merges, rank correlation with the {outcome}, {title}"
        table = Table(title=heading, box=box.SIMPLE, padding=0)
        for i, column in enumerate(("predictor", *COLUMNS.values())):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for found in chosen:
            cells = [_cell(found, name) for name in COLUMNS]
            table.add_row(PREDICTORS[str(found["predictor"])], *cells)
        Console(width=100).print(table)


def _cell(found: Mapping[str, object], name: str) -> str:
    if name not in found:
        return "–"
    low, high = found[f"{name}_interval"]  # type: ignore[misc]
    return f"{found[name]:+.2f}\n[{low:.2f}, {high:.2f}]"


# Running


def named(text: str) -> tuple[str, str]:
    name, separator, rest = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=...")
    return name, rest


def scaled(base: Path, experts: Mapping[str, Path], scale: float, folder: Path) -> dict[str, Path]:
    """The experts θ_0 + scale τ."""
    if scale == 1:
        return dict(experts)
    setting = Setting("", "task_arithmetic", {}, (scale,))
    for path in experts.values():
        ctl_merge.merge(ctl_merge.parse_recipe(setting.recipe(base, [path]) or ""), folder / path.name)
    return {name: folder / path.name for name, path in experts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", nargs="+", type=named, required=True, metavar="NAME=DIR")
    parser.add_argument("--text", action="append", type=named, required=True, metavar="NAME=PATH[:FIELDS]")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--scale", type=float, default=1.0, help="experts are moved to base + SCALE τ first")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more slow very small models down")
    parser.add_argument("--output", type=Path, help="folder for results and figure")
    options = parser.parse_args()
    if len(options.experts) < 3:
        parser.error("three experts at least: within a recipe, groups of experts are compared")
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        texts = {name: f"{name}={source}" for name, source in options.text}
        experts = scaled(options.base, {n: Path(p) for n, p in options.experts}, options.scale, Path(temporary))
        for group, setting in itertools.product(groups(experts), SETTINGS):
            row = measure(setting, options.base, group, texts, options.sequences, options.length)
            if row is not None:
                rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                rows.append({"experts": "+".join(group), **rounded})
    shape = {"sequences": options.sequences, "length": options.length, "scale": options.scale}
    correlations = analyse(rows)
    show(rows, correlations)
    if options.output:
        save(options.output, shape, rows, correlations)
    print(json.dumps({"benchmark": "ctl_predicts_loss", **shape, "merges": len(rows), "correlations": correlations}))


def save(
    folder: Path,
    shape: Mapping[str, float],
    rows: Sequence[Mapping[str, object]],
    found: Sequence[Mapping[str, object]],
) -> None:
    """Results, one line a correlation or merge, and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    scale = "" if shape["scale"] == 1 else f"_scale_{shape['scale']:g}"
    path = folder / f"ctl_predicts_loss{scale}.json"
    parts = [f'"{name}": {json.dumps(value)}' for name, value in {"benchmark": "ctl_predicts_loss", **shape}.items()]
    for name, listed in (("correlations", found), ("rows", rows)):
        lines = ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in listed)
        parts.append(f'"{name}": [\n  {lines}\n]')
    path.write_text("{" + ",\n".join(parts) + "}\n", "utf-8")
    path.with_suffix(".svg").write_text(
        figure([row for row in rows if row["coefficients"] <= REACH], found, OUTCOMES), "utf-8"
    )


if __name__ == "__main__":
    main()
