"""Time and memory of a merge: this tool, mergekit, averaging by hand, and the floor.

    python benchmarks/merge_speed.py --sizes 125M 1.1B --mergekit mergekit-env/bin/python --by-hand

Merges Llama-shaped bf16 checkpoints, a base and three finetunes (as many of them as the method takes), every tool in a
process of its own, in turn, `--repeats` times; shown are medians. The floor: every byte of the inputs read once and the
output written once, warm, with as many threads. Start-up is `--dry-run` (mergekit: `--help`), and is part of the
wall time. Anonymous memory is sampled every 10 ms and compared with the bound that `--dry-run` states: the exit code is
1 if a bound does not hold. `--cold` adds rows for which the inputs were put out of the page cache before. mergekit has
an environment of its own, see against_mergekit.py. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import speed_report
from measured import Cost, cost_of, drop, floor, warm
from synthetic import SIZES, write_family, write_tokenizer

from ctl_merge.methods import registry

PARAMETERS = {"weight": 0.4, "density": 0.5, "t": 0.3, "scale": 1.0}
# Besides every method with the parameters above. The label, the method, what is set beside or instead.
VARIANTS = (("ties 0.2", "ties", {"density": 0.2}), ("ties model", "ties", {"trim": "model"}))
_BY_HAND = """
import sys, torch
from transformers import AutoModelForCausalLM
*models, output = sys.argv[1:]
merged = AutoModelForCausalLM.from_pretrained(models[0], dtype="auto")
total = {name: tensor.float() for name, tensor in merged.state_dict().items()}
for path in models[1:]:
    for name, tensor in AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict().items():
        total[name] += tensor.float()
merged.load_state_dict({name: tensor / len(models) for name, tensor in total.items()})
merged.save_pretrained(output)
"""


@dataclass(frozen=True)
class Case:
    """One merge: its recipe's file, the models that it reads, whether mergekit can run it."""

    label: str
    method: str
    size: str
    recipe: Path
    models: list[Path]
    shared: bool


def recipe(method: str, models: Sequence[Path], extra: Mapping[str, Any] | None = None, **keys: Any) -> str:
    """A recipe that merges as many of the models, a base and finetunes, as the method takes."""
    row = registry()[method]
    base, *others = map(str, models)
    most = row.models[1]
    others = others[: len(others) if most is None else most - (row.base == "required" and row.space == "weights")]
    named = {"base_model": base} if row.base == "required" else {}
    given = {name: PARAMETERS[name] for name in row.parameters if name in PARAMETERS} | dict(extra or {})
    listed = [{"model": path} for path in others]
    found = {"merge_method": method, **named, "models": listed, **keys, **({"parameters": given} if given else {})}
    return json.dumps(found, indent=1) + "\n"


def make_case(folder: Path, size: str, label: str, method: str, extra: dict[str, Any]) -> Case:
    family = write_family(folder, size, models=3, max_shard_bytes=10**9)
    measures = registry()[method].statistic is not None
    texts = {"data": {"texts": str(_text(folder, size, family)), "sequences": 4, "length": 64}} if measures else {}
    file = folder / f"{size}-{label.replace(' ', '-')}.yaml"
    file.write_text(recipe(method, family, extra, **texts))
    read = [path for path in family if f'"{path}"' in file.read_text()]
    return Case(label, method, size, file, read, method in MERGEKITS and "trim" not in extra)


# Those of the methods that mergekit 0.1.5 has.
MERGEKITS = frozenset(
    "arcee_fusion breadcrumbs breadcrumbs_ties dare_linear dare_ties della della_linear karcher linear model_stock "
    "multislerp nearswap nuslerp passthrough ram ramplus_tl sce slerp task_arithmetic ties".split()
)


def _text(folder: Path, size: str, models: list[Path]) -> Path:
    for model in models:
        if not (model / "tokenizer.json").exists():
            write_tokenizer(model, size)
    words, text = random.Random(0), folder / "text.txt"
    text.write_text(" ".join(f"w{words.randrange(SIZES[size][3])}" for _ in range(400)))
    return text


def weights_of(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def _bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in weights_of(model))


class Bench:
    """The tools, each as a function of a case and a folder to write."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.log, self.output = folder / "log.txt", folder / "output"

    def tools(self, case: Case, cold: bool) -> dict[str, Callable[[], Cost]]:
        found = {"floor": lambda: self.floor(case), "ctl-merge": lambda: self.ours(case)}
        if self.options.mergekit and case.shared and not cold:
            found["mergekit"] = lambda: self.mergekit(case)
        if self.options.by_hand and case.label == "linear" and not cold:
            found["by hand"] = lambda: self.by_hand(case)
        return found

    def floor(self, case: Case) -> Cost:
        inputs = [file for model in case.models for file in weights_of(model)]
        return floor(inputs, self.output, _bytes(case.models[0]), self.options.workers)

    def ours(self, case: Case, *more: str) -> Cost:
        flags = ["-q", "--num-workers", str(self.options.workers), *self.options.flags.split(), *more]
        return self._run([sys.executable, "-m", "ctl_merge", str(case.recipe), "-o", str(self.output), *flags])

    def mergekit(self, case: Case) -> Cost:
        tool = Path(self.options.mergekit).with_name("mergekit-yaml")
        return self._run([str(tool), str(case.recipe), str(self.output)])

    def by_hand(self, case: Case) -> Cost:
        models = [str(model) for model in case.models]
        return self._run([sys.executable, "-c", _BY_HAND, *models, str(self.output)])

    def start_up(self, case: Case) -> dict[str, Callable[[], Cost]]:
        found: dict[str, Callable[[], Cost]] = {"ctl-merge": lambda: self.ours(case, "--dry-run")}
        if self.options.mergekit:
            tool = str(Path(self.options.mergekit).with_name("mergekit-yaml"))
            found["mergekit"] = lambda: self._run([tool, "--help"])
        return found

    def _run(self, command: list[str]) -> Cost:
        return cost_of(command, self.log)

    def clear(self) -> None:
        """Remove what the run before wrote."""
        shutil.rmtree(self.output) if self.output.is_dir() else self.output.unlink(missing_ok=True)

    def prepare(self, case: Case, cold: bool) -> None:
        """Inputs in the page cache or out of it, no pages left to be written, and memory at hand.

        A virtual machine gives back what has lain free for a few seconds, and having it again takes longer than
        anything that is measured here (README.md has a command that shows it). So twice the output is written, and
        removed right before a run.
        """
        self.clear()
        os.sync()
        floor([], self.output, 2 * _bytes(case.models[0]), self.options.workers)
        (drop if cold else warm)(file for model in case.models for file in weights_of(model))
        self.clear()

    def bound(self, case: Case) -> int:
        """Anonymous memory at most, as the plan states it."""
        from ctl_merge.merging import Merge

        return Merge(case.recipe, num_workers=self.options.workers).summary()["bytes"]["memory"]

    def measure(self, case: Case, cold: bool = False) -> list[dict[str, Any]]:
        """A row for each tool: medians over the repeats, the tools in turn."""
        tools, found = self.tools(case, cold), {}
        for repeat in range(self.options.repeats):
            for tool, run in tools.items():
                if tool in ("mergekit", "by hand") and repeat >= (self.options.others_repeats or self.options.repeats):
                    continue
                self.prepare(case, cold)
                found.setdefault(tool, []).append(run())
                print(f"{case.size} {case.label} {tool}: {found[tool][-1].wall:.1f} s", file=sys.stderr)
        about = {"size": case.size, "case": case.label, "cold": cold}
        bound = {} if cold else {"bound": self.bound(case)}
        return [
            about | {"tool": tool, "repeats": len(costs)} | median(costs) | (bound if tool == "ctl-merge" else {})
            for tool, costs in found.items()
        ]


def median(costs: list[Cost]) -> dict[str, float]:
    return {f.name: statistics.median(asdict(cost)[f.name] for cost in costs) for f in fields(Cost)}


def chosen(options: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    cases = [(name, name, {}) for name in sorted(registry())] + list(VARIANTS)
    asked = options.methods
    return [case for case in cases if not asked or case[0] in asked]


def whole_matrices(method: str) -> bool:
    """Whether it works on whole matrices: hours at a billion parameters."""
    row = registry()[method]
    return row.grain == "tensor" or row.statistic is not None


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["125M"])
    variants = ", ".join(label for label, _, _ in VARIANTS)
    parser.add_argument("--methods", nargs="+", metavar="CASE", help=f"default: all, and {variants}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--others-repeats", type=int, help="of mergekit and by hand; default: as --repeats")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--flags", default="", help="more options of ctl-merge, in one argument")
    parser.add_argument("--mergekit", metavar="PYTHON", help="the Python of an environment that has mergekit 0.1.5")
    parser.add_argument("--by-hand", action="store_true", help="average with transformers too")
    parser.add_argument("--cold", action="store_true", help="also with the inputs out of the page cache")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made and kept; default: temporary")
    parser.add_argument("--results", type=Path, help="a JSON file of rows to put these into; speed_report.py shows it")
    return parser.parse_args()


def main() -> None:
    asked, rows = options(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (asked.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, asked)
        for size in asked.sizes:
            cases = [c for c in chosen(asked) if asked.methods or size in ("20M", "125M") or not whole_matrices(c[1])]
            made = [make_case(folder, size, *case) for case in cases]
            bench.clear()  # of a run that was broken off
            for tool, run in bench.start_up(made[0]).items():
                costs = [run() for _ in range(asked.repeats)]
                rows.append({"size": size, "case": "start-up", "cold": False, "tool": tool} | median(costs))
            for case in made:
                rows += bench.measure(case)
                rows += bench.measure(case, cold=True) if asked.cold else []
                if asked.results:
                    speed_report.add(asked.results, rows)
            bench.clear()
    speed_report.show(rows)
    holds = all(row["anonymous"] <= row["bound"] for row in rows if "bound" in row)
    print(json.dumps({"benchmark": "merge_speed", "holds": holds, "rows": rows}))
    sys.exit(not holds)


if __name__ == "__main__":
    main()
