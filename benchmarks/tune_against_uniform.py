"""Held-out loss of tuned merges, and of what they must beat, over groups of experts and seeds of data.

    python benchmarks/tune_against_uniform.py [--models FOLDER --data FOLDER]

The shipped family, and with `--models` and `--data` (laid out as tune_families.py says) four finetunes of stories260K:
every pair of experts and all of them together, for each seed. A seed has texts of its own; of their windows some tune,
some validate, and half are compared on. λ, density, sparsity of the other methods are chosen on the windows that tuning
sees. Coefficients are free here: the command line keeps them between 0 and 2. regmean and lot measure the experts on
texts that these were trained on. Results, table and figure, in `results` and in the project's README, are written anew;
`--keep` keeps what an earlier run has measured. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ctl_predicts_loss import groups
from rich import box
from rich.console import Console
from rich.table import Table
from tune_families import PARTS, Family, shipped, stories
from tune_figure import BEST, SHOWN, counted, figure, means, tasks

import ctl_merge
from ctl_merge.tuning.tuned import TUNED

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tune_against_uniform.json"
BOUNDS = {"least": -math.inf, "most": math.inf}
DARE = [(density, weight) for density in (0.7, 0.9) for weight in (0.35, 0.5, 0.65)]
SPARSITIES, ALPHAS, LOT = (0.3, 0.6, 0.9), (0.7, 0.9, 0.98), (0.8, 1.0, 1.2, 1.4, 1.6)


def recipe(
    method: str, base: Path | None, experts: Mapping[str, Path], own: Mapping[str, Any], shared: Mapping[str, Any],
    train: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """A recipe's text; JSON is YAML."""
    models = [
        {
            "model": str(path.resolve()),
            **({"parameters": own} if own else {}),
            **({"data": train[name].partition("=")[2]} if train else {}),
        }
        for name, path in experts.items()
    ]
    data = {"data": {"sequences": 96, "length": 64}} if train else {}
    origin = {"base_model": str(base.resolve())} if base else {}
    document = {"merge_method": method, **origin, "models": models, **data}
    return json.dumps({**document, **({"parameters": shared} if shared else {})})


def others(base: Path, experts: Mapping[str, Path], train: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The further methods, each with the settings to choose from."""
    return {
        "dare": {
            f"density {d:g}, λ = {w:g}": recipe("dare_linear", base, experts, {"weight": w, "density": d}, {})
            for d, w in DARE
        },
        "localize_and_stitch": {
            f"sparsity {s:g}": recipe("localize_and_stitch", base, experts, {}, {"sparsity": s}) for s in SPARSITIES
        },
        "regmean": {f"α = {a:g}": recipe("regmean", None, experts, {}, {"alpha": a}, train) for a in ALPHAS},
        "lot": {f"λ = {w:g}": recipe("lot", base, experts, {}, {"lambda": w}, train) for w in LOT},
    }


def measure(family: Family, group: Mapping[str, Path], seed: int, size: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row for each model: held-out losses, and by how much its mean is above that of the tuned merge."""
    began = time.process_time()
    start = ctl_merge.parse_recipe(recipe("task_arithmetic", family.base, group, {"weight": 0.5}, {}), "start")
    also = others(family.base, group, {name: family.train[name] for name in group})
    texts = [family.texts[seed][name] for name in group]
    found = ctl_merge.tune(start, texts, also=also, seed=seed, **BOUNDS, **{**size, **family.how})
    rows = list(_rows(found, family, group, seed))
    rows[0] |= {"verdict": found.verdict, "recommended": found.recommended, "tried": len(found.curve),
                "seconds": round(time.process_time() - began)}  # fmt: skip
    return rows


def _rows(found: Any, family: Family, group: Mapping[str, Path], seed: int) -> Iterator[dict[str, Any]]:
    evaluation, over = found.evaluation, "mean"
    best = min(group, key=lambda name: evaluation.of(name, over, "loss")["value"])
    models = [name for name in evaluation.models if name != "start"]
    rival = min((m for m in models if m != TUNED), key=lambda name: evaluation.of(name, over, "loss")["value"])
    for model in models:
        mean, worst = (evaluation.of(model, name, "loss") for name in (over, "worst"))
        row = {
            "family": family.name, "experts": "+".join(group), "seed": seed, "model": BEST if model == best else model,
            "chosen": found.chosen.get(model, model if model == best else ""),
            "losses": {name: round(evaluation.of(model, name, "loss")["value"], 4) for name in group},
            "mean": round(mean["value"], 4), "worst": round(worst["value"], 4),
        }  # fmt: skip
        if model != TUNED:  # differences are to the tuned merge: what it gains
            row["gain"] = [round(mean[key], 4) for key in ("difference", "difference_low", "difference_high")]
            row["best_of_others"] = model == rival
        yield row


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean held-out loss of each model for each group, at 100 columns."""
    table = Table(title="mean held-out loss, nats per token, over seeds", box=box.SIMPLE, padding=0)
    for i, column in enumerate(("experts", *SHOWN)):
        table.add_column(column.replace(" ", "\n").replace("_", "_\n"), justify="right" if i else "left")
    for group in dict.fromkeys(row["experts"] for row in rows):
        table.add_row(group.replace("+", " "), *(f"{means(rows, group, model):.3f}" for model in SHOWN))
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder with stories260K, math, code, french, wiki")
    parser.add_argument("--data", type=Path, help="folder with gsm8k, mbpp, multi30k, wikitext2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], choices=range(PARTS))
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--steps", type=int, default=5, help="of descent")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--keep", action="store_true", help="measure only what the output lacks")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file for results (.json); .svg and .md go beside")
    options = parser.parse_args()
    if (options.models is None) != (options.data is None):
        parser.error("--models and --data go together")
    size = {name: getattr(options, name) for name in ("length", "batch", "steps")}
    rows = kept(options.output, size) if options.keep else []
    with tempfile.TemporaryDirectory() as folder:
        families = [shipped(Path(folder), options.seeds)]
        if options.models:
            families.append(stories(options.models, options.data, Path(folder), options.seeds))
        done = {(row["seed"], row["experts"]) for row in rows}
        runs = [(family, group, seed, size) for seed in options.seeds for family in families
                for group in groups(family.experts) if (seed, "+".join(group)) not in done]  # fmt: skip
        runs.sort(key=lambda run: -len(run[1]))  # the longest first
        with multiprocessing.get_context("spawn").Pool(options.jobs, torch.set_num_threads, (1,)) as pool:
            for own in pool.imap_unordered(_measured, runs):
                rows += own
                save(options.output, size, _ordered(rows, families))
                print(f"{own[0]['experts']}, seed {own[0]['seed']}: {own[0]['verdict']} ({own[0]['seconds']} s)",
                      flush=True)  # fmt: skip
        rows = _ordered(rows, families)
    show(rows)
    if options.output == RESULTS:
        subprocess.run([sys.executable, str(ROOT / "tests" / "readme.py")], check=True)
    print(json.dumps({"benchmark": "tune_against_uniform", **size, **counted(rows)}, ensure_ascii=False))


def _measured(run: tuple[Family, Mapping[str, Path], int, Mapping[str, int]]) -> list[dict[str, Any]]:
    return measure(*run)


def _ordered(rows: Sequence[dict[str, Any]], families: Sequence[Family]) -> list[dict[str, Any]]:
    """By seed and group, as the families have them."""
    places = {"+".join(group): i for i, group in enumerate(g for f in families for g in groups(f.experts))}
    return sorted(rows, key=lambda row: (row["seed"], places.get(row["experts"], len(places))))


def kept(path: Path, size: Mapping[str, int]) -> list[dict[str, Any]]:
    """The rows of an earlier run of the same size."""
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found.get("rows", []) if all(found.get(name) == value for name, value in size.items()) else []


def save(path: Path, size: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> None:
    """Results, one line a row, figure and table of tasks; after every group, so that a long run leaves what it has."""
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    head = json.dumps({"benchmark": "tune_against_uniform", **size})[1:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{{head}, "rows": [\n  {lines}\n]}}\n', "utf-8")
    path.with_suffix(".svg").write_text(figure(rows, SHOWN[:8]), "utf-8")
    path.with_suffix(".md").write_text(tasks(rows), "utf-8")


if __name__ == "__main__":
    main()
