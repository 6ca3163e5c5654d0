"""Peak anonymous memory of a merge against the bound that the plan states, at several model sizes.

    python benchmarks/memory.py --sizes 125M 1.1B

Every method merges a bf16 base and three finetunes in a process of its own, whose RssAnon is sampled every 2 ms
(mapped file pages are the kernel's to take back, so RSS is no measure). Linux only. The last line is JSON; the exit
code is 1 if a bound does not hold, or if memory grows with the model.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from synthetic import SIZES, write_family

from ctl_merge.merging import Merge
from ctl_merge.methods import registry

PARAMETERS = {"weight": 0.4, "density": 0.5, "t": 0.3, "scale": 1.0}


def recipe(method: str, models: list[Path], extra: str = "") -> str:
    """A recipe that merges as many of the models as the method takes."""
    row = registry()[method]
    base, *others = models
    most = row.models[1]
    if most is not None:
        others = others[: most if row.base != "required" else most - 1]
    given = {name: PARAMETERS[name] for name in row.parameters if name in PARAMETERS}
    lines = [f"merge_method: {method}", *(f"base_model: {base}" for _ in range(row.base == "required")), "models:"]
    lines += [f"  - model: {path}" for path in others]
    return "\n".join([*lines, f"parameters: {json.dumps(given)[:-1]}{extra}}}", ""])


def peak_anonymous_bytes(command: list[str]) -> tuple[int, float]:
    """Largest RssAnon of the process, and its wall time in seconds."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        except OSError:
            break
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.002)
    if process.wait() != 0:
        sys.exit(f"failed: {' '.join(command)}")
    return peak, time.perf_counter() - start


def measure(folder: Path, size: str, method: str, extra: str, workers: int) -> dict[str, object]:
    models = write_family(folder, size, models=3)
    file, output = folder / "recipe.yaml", folder / "output"
    file.write_text(recipe(method, models, extra))
    bound = Merge(file, num_workers=workers).summary()["bytes"]["memory"]
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "ctl_merge", str(file), "-o", str(output), "-q", "--num-workers", str(workers)]
    peak, seconds = peak_anonymous_bytes(command)
    label = f"{method} {extra.strip(', ')}".strip()
    return {"size": size, "method": label, "peak": peak, "bound": bound, "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["20M", "125M"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=sorted(registry()), help="default: all")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made and kept; default: temporary")
    options = parser.parse_args()
    without_text = [name for name, method in sorted(registry().items()) if method.statistic is None]
    cases = [(method, "") for method in options.methods or without_text]
    cases += [("ties", ', "trim": "model"')] if any(method == "ties" for method, _ in cases) else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        rows = [measure(folder, s, m, extra, options.workers) for m, extra in cases for s in options.sizes]
    table = Table(title=f"peak anonymous memory, {options.workers} workers, bf16 base + 3")
    for column in ("method", "size", "peak MB", "bound MB", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for r in rows:
        table.add_row(r["method"], r["size"], f"{r['peak'] / 1e6:.0f}", f"{r['bound'] / 1e6:.0f}", f"{r['seconds']}")
    Console().print(table)
    holds = all(r["peak"] <= r["bound"] for r in rows)
    print(json.dumps({"benchmark": "memory", "holds": holds, "rows": rows}))
    sys.exit(not holds)


if __name__ == "__main__":
    main()
