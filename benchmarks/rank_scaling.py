"""What processes and threads gain where the work is arithmetic.

    python benchmarks/rank_scaling.py --size 125M --methods ties tsv --repeats 3

A bf16 base and three finetunes are merged into shards of 50 MB by one process with 1 and 2 threads, and by 1, 2 and 4
ranks of torchrun with one thread each, interleaved; whatever writes the output, its bytes must be the same. The ceiling
is the number of cores: with as many threads or ranks as those, the time after start-up would be that of one divided by
them. Start-up is `--dry-run` in one process or as many ranks. Medians of wall and of CPU time, the ranks' and
torchrun's own together. The exit code is 1 where bytes differ. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from merge_speed import recipe
from rich.console import Console
from rich.table import Table
from synthetic import SIZES, write_family

CASES = {"1 thread": (1, 1), "2 threads": (1, 2), "1 rank": (1, 1), "2 ranks": (2, 1), "4 ranks": (4, 1)}


def command(case: str, file: Path, output: Path) -> list[str]:
    ranks, threads = CASES[case]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if "rank" in case else []
    started = [
        sys.executable,
        *launcher,
        "-m",
        "ctl_merge",
        str(file),
        "-o",
        str(output),
        "--num-workers",
        str(threads),
    ]
    return [*started, "--max-shard-size", "50MB", "--no-hash", "-q"]


def timed(arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command and all that it starts."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def measure(file: Path, method: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each case."""
    output = file.parent / "output"
    walls: dict[str, list[float]] = {case: [] for case in CASES}
    work: dict[str, list[float]] = {case: [] for case in CASES}
    starts: dict[str, list[float]] = {case: [] for case in CASES}
    bytes_of: dict[str, str] = {}
    for _ in range(repeats):
        for case in CASES:
            shutil.rmtree(output, ignore_errors=True)
            starts[case].append(timed([*command(case, file, output), "--dry-run"])[0])
            wall, cpu = timed(command(case, file, output))
            walls[case].append(wall)
            work[case].append(cpu)
            bytes_of[case] = digest(output)
    same = len(set(bytes_of.values())) == 1
    rows = []
    for case in CASES:
        wall, start = statistics.median(walls[case]), statistics.median(starts[case])
        rows.append({"method": method, "case": case, "wall": round(wall, 2), "start": round(start, 2),
                     "after_start": round(wall - start, 2), "cpu": round(statistics.median(work[case]), 2),
                     "same_bytes": same})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="125M")
    parser.add_argument("--methods", nargs="+", default=["ties", "tsv"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made and kept; default: temporary")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        models = write_family(folder, options.size, models=3)
        for method in options.methods:
            file = folder / "recipe.yaml"
            file.write_text(recipe(method, models))
            rows += measure(file, method, options.repeats)
    table = Table(title=f"{options.size}, bf16, base + 3, {os.cpu_count()} cores")
    for column in ("method", "case", "wall s", "start-up s", "after start-up s", "gain", "CPU s"):
        table.add_column(column, justify="left" if column in ("method", "case") else "right")
    for r in rows:
        one = next(o for o in rows if o["method"] == r["method"])["after_start"]
        gain = f"{one / r['after_start']:.2f}" if r["after_start"] > 0 else "-"
        table.add_row(
            r["method"], r["case"], *(str(r[key]) for key in ("wall", "start", "after_start")), gain, str(r["cpu"])
        )
    Console().print(table)
    holds = all(r["same_bytes"] for r in rows)
    load = os.getloadavg()[0]
    print(json.dumps({"benchmark": "rank_scaling", "size": options.size, "load": load, "holds": holds, "rows": rows}))
    sys.exit(not holds)


if __name__ == "__main__":
    main()
