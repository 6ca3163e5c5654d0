"""What a plan predicts against what the merge then takes: time and memory.

    python benchmarks/plan_against_run.py --size 125M --repeats 3

For each method `--dry-run --calibrate` predicts, and the merge runs right after it, each in a process of its own;
medians of the repeats. The prediction of time should be within 30 % of the measurement, that of memory is a bound: the
peak of anonymous memory (as in measured.py; Linux only) must not exceed it. The exit code is 1 if one does not hold. On
a machine that does other work at the same time the calibration and the run meet different loads: the load is told. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured import cost_of
from merge_speed import recipe
from rich.console import Console
from rich.table import Table
from synthetic import SIZES, write_family

METHODS = ["linear", "task_arithmetic", "slerp", "model_stock", "sce", "ties", "ties model", "dare_ties", "della"]
WITHIN = 0.3


def measure(folder: Path, size: str, method: str, repeats: int) -> dict[str, Any]:
    models = write_family(folder, size, models=3)
    file, output = folder / "recipe.yaml", folder / "output"
    name, _, model = method.partition(" ")
    file.write_text(recipe(name, models, {"trim": "model"} if model else {}))
    command = [sys.executable, "-m", "ctl_merge", str(file), "-o", str(output), "-q"]
    seconds, predicted, peaks = [], [], []
    bound = 0
    for _ in range(repeats):
        shutil.rmtree(output, ignore_errors=True)
        said = subprocess.run([*command, "--dry-run", "--calibrate", "--json"], check=True, capture_output=True)
        plan = json.loads(said.stdout)
        predicted.append(plan["time"]["seconds"])
        bound = plan["bytes"]["memory"]
        cost = cost_of(command)
        peak, wall = cost.anonymous, cost.wall
        peaks.append(peak)
        seconds.append(wall)
    return {
        "method": method, "size": size, "predicted": round(statistics.median(predicted), 2),
        "seconds": round(statistics.median(seconds), 2),
        "ratio": round(statistics.median(p / s for p, s in zip(predicted, seconds, strict=True)), 2),
        "bound": bound, "peak": max(peaks), "calibration": plan["time"]["calibrated_in"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="125M")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made and kept; default: temporary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        rows = [measure(folder, options.size, method, options.repeats) for method in options.methods]
    table = Table(title=f"{options.size}, bf16, base + 3, {os.cpu_count()} workers")
    for column in ("method", "predicted s", "measured s", "ratio", "bound MB", "peak MB", "peak / bound"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for r in rows:
        memory = (f"{r['bound'] / 1e6:.0f}", f"{r['peak'] / 1e6:.0f}", f"{r['peak'] / r['bound']:.2f}")
        table.add_row(r["method"], str(r["predicted"]), str(r["seconds"]), str(r["ratio"]), *memory)
    Console(width=100).print(table)
    holds = all(abs(r["ratio"] - 1) <= WITHIN and r["peak"] <= r["bound"] for r in rows)
    print(json.dumps({"benchmark": "plan_against_run", "load": os.getloadavg()[0], "holds": holds, "rows": rows}))
    sys.exit(not holds)


if __name__ == "__main__":
    main()
