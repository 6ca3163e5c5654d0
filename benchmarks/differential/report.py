"""The result as tables in the terminal, and as data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from differential.behaviour import Row
from differential.sampling import Sampled
from differential.verdict import Errors, Result

Triple = tuple[float | None, float | None, float | None]  # ours, mergekit as configured, mergekit in float32


@dataclass
class Report:
    """All that was found. `absent`: methods of mergekit that ctl-merge lacks; `undefined`: that have no definition."""

    results: Mapping[str, Sequence[Result]]
    sampled: Mapping[str, Sequence[Sampled]]
    behaviour: Sequence[Row]
    absent: Sequence[str] = ()
    undefined: Sequence[str] = ()

    @property
    def failures(self) -> list[str]:
        """Every disagreement that nothing explains."""
        found = [
            f"{r.case.name} ({r.case.family.name}): {said}"
            for results in self.results.values()
            for r in results
            for said in r.failures
        ]
        found += [
            f"{s.case.name} (rescale {s.rescale[0]} and {s.rescale[1]}): {said}"
            for every in self.sampled.values()
            for s in every
            for said in s.failures
        ]
        unexpected = [row for row in self.behaviour if not row.expected]
        return found + [f"{row.what}: mergekit {row.theirs}, ctl-merge {row.ours}" for row in unexpected]

    @property
    def reasons(self) -> dict[str, int]:
        """How many of mergekit's entries differ, by method and reason."""
        found: Counter[str] = Counter()
        for method, results in self.results.items():
            for result in results:
                found.update({f"{method}: {text}": count for text, count in result.reasons.items()})
        return dict(+found)


@dataclass(frozen=True)
class Summary:
    """One method. Errors in units in the last place of the output: `mean` the median over the cases, `worst` of all."""

    method: str
    cases: int
    entries: int
    apart: int  # entries that a reason covers, and that the errors leave out
    exact: Triple  # the share of entries that are the definition rounded once
    mean: Triple
    worst: Triple
    relative: Triple  # the largest ‖error‖ / ‖result‖ of a case
    failed: int
    verdict: str


def summaries(report: Report) -> list[Summary]:
    return [_summary(method, results, report) for method, results in report.results.items()]


def _summary(method: str, results: Sequence[Result], report: Report) -> Summary:
    columns: list[list[tuple[Errors, int]]] = [
        [(errors, r.entries - r.apart) for r in results if (errors := getattr(r, tool)) is not None]
        for tool in ("ours", "theirs", "single")
    ]

    def triple(of: Any) -> Triple:
        first, second, third = (of(column) if column else None for column in columns)
        return first, second, third

    return Summary(
        method, len(results), sum(r.entries for r in results), sum(r.apart for r in results),
        exact=triple(lambda c: sum(e.exact * n for e, n in c) / max(sum(n for _, n in c), 1)),
        mean=triple(lambda c: median(e.mean for e, _ in c)),
        worst=triple(lambda c: max(e.largest for e, _ in c)),
        relative=triple(lambda c: max(e.relative for e, _ in c)),
        failed=sum(bool(r.failures) for r in results),
        verdict=_verdict(method, results, report),
    )  # fmt: skip


def _verdict(method: str, results: Sequence[Result], report: Report) -> str:
    failed = sum(bool(r.failures) for r in results)
    if failed:
        return f"{failed} failed"
    if method in report.undefined:
        return "agree (no definition yet)"
    if method in report.sampled:
        return "exact; mergekit's in distribution"
    return "exact, never further, agree in float32"


# ---- tables

HEAD = (
    "method", "cases", "entries, of them apart", "rounded once, %", "mean error", "worst error", "relative, worst",
    "verdict",
)  # fmt: skip
SAMPLED = (
    "method",
    "configurations × seeds",
    "largest z (bound)",
    "mean z²",
    "variances, t",
    "share kept, z",
    "verdict",
)
BEHAVIOUR = ("what", "mergekit", "ctl-merge")
_SHOWN = 40  # failures on the terminal; the last line has all
_LEGEND = "ours / mergekit as configured / mergekit in float32; errors in units in the last place of the output"


def rows(report: Report) -> list[list[str]]:
    return [
        [
            s.method, str(s.cases), f"{s.entries:,}" + (f", {s.apart:,}" if s.apart else ""),
            _cell(s.exact, lambda x: f"{100 * x:.2f}"), _cell(s.mean, lambda x: f"{x:.3f}"),
            _cell(s.worst, lambda x: f"{x:.2g}"), _cell(s.relative, lambda x: f"{x:.1e}"), s.verdict,
        ]
        for s in summaries(report)
    ]  # fmt: skip


def _cell(values: Triple, shown: Any) -> str:
    return " / ".join(shown(value) for value in values if value is not None)


def sampled_rows(report: Report) -> list[list[str]]:
    return [_sampled_row(method, every) for method, every in report.sampled.items() if every]


def _sampled_row(method: str, every: Sequence[Sampled]) -> list[str]:
    def worst(name: str) -> str:
        return f"{max((abs(s.numbers[name]) for s in every if name in s.numbers), default=0):.2f}"

    squares = [s.numbers["mean z²"] for s in every if "mean z²" in s.numbers] or [0.0]
    failed = sum(bool(s.failures) for s in every)
    return [
        method, f"{len(every)} × {every[0].seeds}", f"{worst('largest z')} ({worst('bound')})",
        f"{min(squares):.3f} to {max(squares):.3f}", worst("variance t"),
        f"{worst('ours share z')} / {worst('mergekit share z')}", f"{failed} failed" if failed else "the same",
    ]  # fmt: skip


def show(report: Report) -> None:
    """On the terminal."""
    console = Console()
    _print(console, _LEGEND, HEAD, rows(report))
    for text in _notes(report):
        console.print(text, highlight=False, markup=False)
    if sampled_rows(report):
        _print(console, "in distribution", SAMPLED, sampled_rows(report))
    if report.behaviour:
        _print(console, "behaviour", BEHAVIOUR, [[r.what, r.theirs, r.ours] for r in report.behaviour])
    for failure in report.failures[:_SHOWN]:
        console.print(f"FAILED {failure}", style="red", highlight=False, markup=False)
    if len(report.failures) > _SHOWN:
        console.print(f"and {len(report.failures) - _SHOWN} more failures", style="red")


def _oddities(report: Report) -> list[str]:
    """What mergekit does in whole configurations; each note ends in the method."""
    found = [
        f"mergekit gives NaN or infinity in {count} of {len(results)} configurations: {method}"
        for method, results in report.results.items()
        if (count := sum(r.theirs is not None and not math.isfinite(r.theirs.largest) for r in results))
    ]
    found += [
        f"mergekit writes float32 where 16 bits are asked for in {count} of {len(results)} configurations: {method}"
        for method, results in report.results.items()
        if (count := sum(r.widened for r in results))
    ]
    return found


def _notes(report: Report) -> list[str]:
    found = [f"{count:,} entries of mergekit's differ: {text}" for text, count in report.reasons.items()]
    return [*_oddities(report), *found, *([f"not there yet: {', '.join(report.absent)}"] if report.absent else [])]


def _print(console: Console, title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for name in head:
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Results of which the later ones replace those of the same methods. Both as `as_json` gives them."""
    if not earlier:
        return later
    again = [summary["method"] for summary in later["methods"]]

    def kept(text: str) -> bool:  # `ties: equal magnitudes` and `ties-007 (odd): ...` are of ties
        return not any(text.startswith((f"{method}:", f"{method}-")) for method in again)

    names = [summary["method"] for summary in earlier["methods"]]
    rows = {summary["method"]: summary for summary in (*earlier["methods"], *later["methods"])}
    behaviour = later["behaviour"] or earlier["behaviour"]
    failures = [*filter(kept, earlier["failures"]), *later["failures"]]
    return {
        **later,
        "holds": not failures,
        "methods": [rows[name] for name in dict.fromkeys((*names, *again))],
        "reasons": {text: n for text, n in earlier["reasons"].items() if kept(text)} | later["reasons"],
        "notes": [*(note for note in earlier["notes"] if not note.endswith(tuple(again))), *later["notes"]],
        "sampled": earlier["sampled"] | later["sampled"],
        "behaviour": behaviour,
        "failures": failures,
    }


def as_json(report: Report) -> dict[str, Any]:
    """The last line."""
    return {
        "benchmark": "against_mergekit",
        "holds": not report.failures,
        "methods": [_finite(asdict(summary)) for summary in summaries(report)],
        "absent": list(report.absent),
        "notes": _oddities(report),
        "reasons": report.reasons,
        "sampled": {m: [{"rescale": s.rescale, **s.numbers} for s in every] for m, every in report.sampled.items()},
        "behaviour": [{"what": r.what, "mergekit": r.theirs, "ours": r.ours} for r in report.behaviour],
        "failures": report.failures,
    }


def _finite(summary: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: null."""

    def kept(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: [kept(v) for v in value] if isinstance(value, tuple) else value for name, value in summary.items()}
