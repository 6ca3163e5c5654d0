"""What a probe costs: time against plain forwards of the same models, and peak memory against depth.

    python benchmarks/probe_cost.py --time 125M --depths 4 8 16 32

A base and two finetunes, Llama-shaped, bf16, are probed at a task-arithmetic merge.

Time. The floor is what nobody can go below: the forwards of base, finetunes and merge (k + 2 models) over the same
tokens with transformers, float32, all in memory and loaded before the clock starts. The probe is timed whole: it opens
and loads the checkpoints, merges, compares them in weight space, runs the blocks of k + 4 models (the merge once more
on interpolated inputs, and once more as rounded to bf16), keeps statistics in float64, and bootstraps. So the ratio
has two parts: what is spent once, and what every further token costs; the second is measured from twice the tokens.
Medians of interleaved repeats, by the wall clock and by CPU time, which other work on the machine disturbs less. The
probe runs its models in threads of their own: with one torch thread it uses more cores than the plain forwards.

Memory. Peak anonymous memory (as in measured.py; Linux only) of a fresh process per depth. Streamed, it must not grow
with depth; resident it does. The ceiling is 15 % from the least to the greatest depth: the exit code is 1 if it is
exceeded. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from measured import cost_of
from rich.console import Console
from rich.table import Table
from synthetic import SIZES, write_family, write_tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import ctl_merge

HOW = {"resident": "cpu", "streamed": "disk"}
GROWTH = 1.15
_PROBE = """
import sys, ctl_merge
recipe, text, device_map, sequences, length = sys.argv[1:]
ctl_merge.probe(recipe, text, device_map=device_map, sequences=int(sequences), length=int(length))
"""


def make(folder: Path, size: str, blocks: int | None, tokens: int) -> tuple[list[Path], Path, str]:
    """A family, a recipe that merges it, and a text of random words, as the probe takes it."""
    models = write_family(folder, size, models=2, blocks=blocks)
    write_tokenizer(models[0], size)
    recipe = folder / f"{models[0].name}.yaml"
    listed = "".join(f"  - model: {model}\n" for model in models[1:])
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {models[0]}\nmodels:\n{listed}parameters: {{weight: 0.5}}\n"
    )
    generator, text = random.Random(0), folder / "text.txt"
    text.write_text(" ".join(f"w{generator.randrange(SIZES[size][3])}" for _ in range(tokens)))
    return models, recipe, f"text={text}"


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall time, and CPU time of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def plain(folders: Sequence[Path], ids: torch.Tensor) -> Callable[[], None]:
    """A forward of every model over ids (N, T), in the probe's batches of 8; the models are loaded here."""
    loaded = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]

    @torch.inference_mode()
    def run() -> None:
        for model in loaded:
            for batch in ids.split(8):
                _ = model(input_ids=batch, use_cache=False).logits

    return run


def measure_time(folder: Path, size: str, sequences: int, length: int, repeats: int) -> list[dict[str, object]]:
    """Median seconds of the plain forwards, and of probes of as many and of twice as many tokens."""
    models, recipe, text = make(folder, size, None, 2 * sequences * length)
    merged = ctl_merge.merge(recipe, folder / "merged", overwrite=True).folder
    ids = torch.randint(SIZES[size][3], (sequences, length), generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], object]] = {"plain": plain([*models, merged], ids)}
    for how, device_map in HOW.items():
        for times in (1, 2):
            calls[f"{how} {times}"] = lambda device_map=device_map, times=times: ctl_merge.probe(
                recipe, text, sequences=times * sequences, length=length, device_map=device_map
            )
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    calls["plain"]()
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return [
        {"clock": clock, "how": how, **_compare({n: statistics.median(v[i] for v in f) for n, f in found.items()}, how)}
        for i, clock in enumerate(("wall", "cpu"))
        for how in HOW
    ]


def _compare(medians: Mapping[str, float], how: str) -> dict[str, float]:
    """What a probe takes against the plain forwards: the seconds of N tokens are once + N × each."""
    floor, single, double = medians["plain"], medians[f"{how} 1"], medians[f"{how} 2"]
    found = {
        "plain_seconds": floor, "probe_seconds": single, "ratio": single / floor,
        "seconds_spent_once": 2 * single - double, "ratio_of_further_tokens": (double - single) / floor,
    }  # fmt: skip
    return {name: round(value, 3) for name, value in found.items()}


def measure_memory(folder: Path, size: str, depths: Sequence[int]) -> list[dict[str, object]]:
    """Peak anonymous memory of a probe by depth, streamed and resident."""
    rows = []
    for blocks in depths:
        _, recipe, text = make(folder, size, blocks, 4 * 64)
        row: dict[str, object] = {"blocks": blocks}
        for how, device_map in HOW.items():
            command = [sys.executable, "-c", _PROBE, str(recipe), text, device_map, "4", "64"]
            cost = cost_of(command)
            row |= {f"{how}_megabytes": round(cost.anonymous / 1e6, 1), f"{how}_seconds": round(cost.wall, 1)}
        rows.append(row)
    return rows


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", choices=SIZES, default="125M", help="size of the models that are timed")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch, in the plain forwards as in the probe")
    parser.add_argument("--width", choices=SIZES, default="125M", help="size whose width the memory's models have")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made and kept; default: temporary")
    parser.add_argument("--output", type=Path, help="folder for the results")
    options = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        times = measure_time(folder, options.time, options.sequences, options.length, options.repeats)
        peaks = measure_memory(folder, options.width, options.depths)
    keys = ("plain_seconds", "probe_seconds", "ratio", "seconds_spent_once", "ratio_of_further_tokens")
    show(
        f"{options.time}, base + 2, {options.sequences} × {options.length} tokens, {torch.get_num_threads()} threads",
        ("probe, clock", "forwards, s", "probe, s", "ratio", "once, s", "ratio of further tokens"),
        [(f"{r['how']}, {r['clock']}", *(f"{r[key]:.2f}" for key in keys)) for r in times],
    )
    show(
        f"peak anonymous memory, width of {options.width}, base + 2",
        ("blocks", *(f"{how}, {unit}" for how in HOW for unit in ("MB", "s"))),
        [
            (str(r["blocks"]), *(f"{r[f'{how}_{unit}']:.1f}" for how in HOW for unit in ("megabytes", "seconds")))
            for r in peaks
        ],
    )
    streamed = [row["streamed_megabytes"] for row in sorted(peaks, key=lambda row: row["blocks"])]  # type: ignore[arg-type,return-value]
    growth = streamed[-1] / streamed[0]  # type: ignore[operator]
    result = {
        "benchmark": "probe_cost", "flat": growth <= GROWTH, "growth": round(growth, 3), "size": options.time,
        "tokens": options.sequences * options.length, "threads": torch.get_num_threads(), "width": options.width,
        "time": times, "memory": peaks,
    }  # fmt: skip
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "probe_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    sys.exit(growth > GROWTH)


if __name__ == "__main__":
    main()
