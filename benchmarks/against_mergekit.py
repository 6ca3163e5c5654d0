"""mergekit 0.1.5 and ctl-merge on the same random configurations, both against a float64 definition.

    python benchmarks/against_mergekit.py --mergekit mergekit-env/bin/python

mergekit has an environment of its own, made by

    python3 -m venv mergekit-env
    mergekit-env/bin/pip install torch==2.13.0
    mergekit-env/bin/pip install mergekit==0.1.5

torch first: any other build of it is a download of gigabytes. For every method that both tools have, configurations
are drawn (weights, densities and the like as scalars, gradients, filters; whole models and slices; dtypes) over tiny
checkpoints of odd sizes, and over real ones with `--real`. Judged is: every entry of ours is the definition (the tests'
NumPy one, on parameters that a second resolver reads) rounded once; ours is never further from it than mergekit, in
the mean and at worst; mergekit agrees with it when it computes in float32. Where it does not, the entries must have a
reason in `differential/reasons.py`. Methods that draw random numbers are compared in distribution. At the end come
probes of what both do with configurations that are wrong. The last line is JSON; the exit code is 1 if anything is
unexplained.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from differential import report as reporting
from differential.behaviour import observe
from differential.cases import generate
from differential.families import Family, make_families, real_family
from differential.methods import METHODS
from differential.reference import defined
from differential.sampling import sample
from differential.tools import INSTALL, Mergekit, Ours
from differential.verdict import Result, judge

from ctl_merge.methods import registry


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    if options.mergekit is None:
        sys.exit(INSTALL)
    try:
        mergekit = Mergekit(options.mergekit)
    except (OSError, RuntimeError) as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory() as folder, mergekit:
        report = compare(Path(folder), mergekit, options)
    reporting.show(report)
    print(json.dumps(reporting.as_json(report), ensure_ascii=False))
    sys.exit(bool(report.failures))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", metavar="PYTHON", help="the Python of an environment that has mergekit 0.1.5")
    parser.add_argument("--cases", type=int, default=40, help="configurations of each method (default 40)")
    parser.add_argument("--methods", type=lambda text: text.split(","), metavar="A,B", help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the configurations (default 0)")
    parser.add_argument("--seeds", type=int, default=64, help="runs of each random configuration (default 64)")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="also over the checkpoints in its subfolders")
    parser.add_argument("--real-base", default="stories260K", help="the one of them that the others come from")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep results here, beside those of other methods")
    options = parser.parse_args()
    unknown = set(options.methods or ()) - set(METHODS)
    if unknown:
        parser.error(f"mergekit {'and '.join(unknown)}: no such method; there are {', '.join(METHODS)}")
    return options


def compare(folder: Path, mergekit: Mergekit, options: argparse.Namespace) -> reporting.Report:
    ours, there = Ours(), registry()
    families = list(make_families(folder / "families").values())
    real = real_family(options.real, options.real_base) if options.real else None
    chosen = options.methods or list(METHODS)
    report = reporting.Report({}, {}, [], absent=[name for name in chosen if name not in there])
    report.undefined = [name for name in chosen if name in there and not defined(name)]
    for method in (name for name in chosen if name in there):
        start = time.perf_counter()
        report.results[method] = judged(method, families, real, options, ours, mergekit)
        if METHODS[method].random:
            count = max(2, options.cases // 10)
            runs = sample(method, families, count, options.seeds, options.seed, ours, mergekit)
            report.sampled[method] = list(runs)
        print(f"{method}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        _keep(report, options.results)
    report.behaviour = observe(folder / "behaviour", ours, mergekit)
    _keep(report, options.results)
    return report


def _keep(report: reporting.Report, results: Path | None) -> None:
    """What is there so far, in the file: an hour's run that is interrupted has not been for nothing."""
    if results is None:
        return
    earlier = json.loads(results.read_text("utf-8")) if results.is_file() else {}
    found = reporting.joined(earlier, reporting.as_json(report))
    results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


def judged(
    method: str, families: Sequence[Family], real: Family | None, options: argparse.Namespace, ours: Ours,
    mergekit: Mergekit,
) -> list[Result]:  # fmt: skip
    cases = generate(method, options.cases, families, options.seed)
    if real:
        cases += generate(method, max(1, options.cases // 4), [real], options.seed)
    return [judge(case, ours, mergekit) for case in cases]


if __name__ == "__main__":
    main()
