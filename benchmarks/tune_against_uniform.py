"""Held-out loss of tuned merges, and of what they must beat, over groups of experts and seeds of data.

    python benchmarks/tune_against_uniform.py --base DIR --experts math=DIR code=DIR \\
        --text math=test.jsonl:question,answer --text code=test.jsonl:text,code \\
        --train math=train.jsonl:question,answer --train code=train.jsonl:text,code

Every pair of experts and all of them together, for each seed of data: the windows of each `--text` are turned round by
the seed, some tune and validate, and half are compared on. λ, density and sparsity of the other methods are chosen on
the windows that tuning sees too. Coefficients are free here: the command line keeps them between 0 and 2. `--train`:
the experts' own texts, for regmean and lot. The last line is JSON; `--output` keeps it, with a figure, and what it has
is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ctl_predicts_loss import groups, named
from rich import box
from rich.console import Console
from rich.table import Table
from tune_figure import SHOWN, UNIFORM, figure, means

import ctl_merge
from ctl_merge.tuning.tuned import TUNED

BOUNDS = {"least": -math.inf, "most": math.inf}


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
    data = {"data": {"sequences": 48, "length": 128}} if train else {}
    origin = {"base_model": str(base.resolve())} if base else {}
    document = {"merge_method": method, **origin, "models": models, **data}
    return json.dumps({**document, **({"parameters": shared} if shared else {})})


def others(base: Path, experts: Mapping[str, Path], train: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The further methods, each with the settings to choose from."""
    found = {
        "dare": {
            f"density {d:g}, λ = {w:g}": recipe("dare_linear", base, experts, {"weight": w, "density": d}, {})
            for d in (0.9,) for w in (0.35, 0.5)
        },
        "localize_and_stitch": {
            f"sparsity {s:g}": recipe("localize_and_stitch", base, experts, {}, {"sparsity": s})
            for s in (0.1, 0.5)
        },
    }  # fmt: skip
    if train:
        found["regmean"] = {"α = 0.9": recipe("regmean", None, experts, {}, {"alpha": 0.9}, train)}
        found["lot"] = {f"λ = {w:g}": recipe("lot", base, experts, {}, {"lambda": w}, train) for w in (0.6, 1.0)}
    return found


def measure(
    base: Path, experts: Mapping[str, Path], texts: Mapping[str, str], train: Mapping[str, str], seed: int,
    size: Mapping[str, int],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row for each model: held-out losses, and by how much its mean is above that of plain task arithmetic."""
    began = time.process_time()
    start = ctl_merge.parse_recipe(recipe("task_arithmetic", base, experts, {"weight": 0.5}, {}), "start")
    own = {name: train[name] for name in experts if name in train}
    also = others(base, experts, own if len(own) == len(experts) else {})
    found = ctl_merge.tune(start, [texts[name] for name in experts], also=also, seed=seed, **BOUNDS, **size)
    evaluation, over = found.evaluation, "mean"
    reference = evaluation.of(UNIFORM, over, "loss")
    best = min(experts, key=lambda name: evaluation.of(name, over, "loss")["value"])
    for model in dict.fromkeys((TUNED, UNIFORM, *evaluation.models)):
        if model == "start" or (model in experts and model != best):
            continue
        mean, worst = (evaluation.of(model, name, "loss") for name in (over, "worst"))
        row = {
            "experts": "+".join(experts), "seed": seed, "model": "best expert" if model in experts else model,
            "chosen": found.chosen.get(model, model if model in experts else ""),
            "losses": {name: round(evaluation.of(model, name, "loss")["value"], 4) for name in experts},
            "mean": round(mean["value"], 4), "worst": round(worst["value"], 4),
        }  # fmt: skip
        if model == UNIFORM:  # differences are to the tuned merge: the gain over plain task arithmetic
            row["gain"] = [round(reference[key], 4) for key in ("difference", "difference_low", "difference_high")]
        yield row
    print(f"{'+'.join(experts)}, seed {seed}: {found.verdict} ({time.process_time() - began:.0f} s)", flush=True)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean held-out loss of each model for each group, at 100 columns."""
    listed = list(dict.fromkeys(row["experts"] for row in rows))
    table = Table(title="mean held-out loss, nats per token, over seeds", box=box.SIMPLE, padding=0)
    for i, column in enumerate(("experts", *SHOWN)):
        table.add_column(column.replace(" ", "\n").replace("_", "_\n"), justify="right" if i else "left")
    for group in listed:
        table.add_row(group.replace("+", " "), *(f"{means(rows, group, model):.3f}" for model in SHOWN))
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", nargs="+", type=named, required=True, metavar="NAME=DIR")
    parser.add_argument("--text", action="append", type=named, required=True, metavar="NAME=PATH[:FIELDS]")
    parser.add_argument("--train", action="append", type=named, default=[], metavar="NAME=PATH[:FIELDS]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--steps", type=int, default=5, help="of descent")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more slow very small models down")
    parser.add_argument(
        "--output", type=Path, help="file for results (.json), with a figure (.svg); what it has is kept"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = {name: getattr(options, name) for name in ("sequences", "length", "batch", "steps")}
    experts = {name: Path(path) for name, path in options.experts}
    rows = kept(options.output, size) if options.output else []
    done = {(row["seed"], row["experts"]) for row in rows}
    texts, train = ({name: f"{name}={source}" for name, source in own} for own in (options.text, options.train))
    for seed, group in itertools.product(options.seeds, groups(experts)):
        if (seed, "+".join(group)) not in done:
            rows += measure(options.base, group, texts, train, seed, size)
        if options.output:
            save(options.output, size, rows)
    show(rows)
    gains = [row["gain"] for row in rows if "gain" in row]
    print(json.dumps({"benchmark": "tune_against_uniform", **size, "runs": len(gains),
                      "tuned_better_beyond_doubt": sum(low > 0 for _, low, _ in gains),
                      "mean_gain": round(float(np.mean([gain for gain, _, _ in gains])), 4)}))  # fmt: skip


def kept(path: Path, size: Mapping[str, int]) -> list[dict[str, Any]]:
    """The rows of an earlier run of the same size."""
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found.get("rows", []) if all(found.get(name) == value for name, value in size.items()) else []


def save(path: Path, size: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> None:
    """Results, one line a row, and the figure; after every group, so that a long run leaves what it has."""
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    head = json.dumps({"benchmark": "tune_against_uniform", **size})[1:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{{head}, "rows": [\n  {lines}\n]}}\n', "utf-8")
    path.with_suffix(".svg").write_text(figure(rows, SHOWN[:8]), "utf-8")


if __name__ == "__main__":
    main()
