"""The probe's report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ctl_merge.probing.figures import figures
from ctl_merge.probing.record import Data, below_floor, bounded, costs_of, main_merge, number, place, prepared, rows
from ctl_merge.probing.svg import COLOURS, Figure
from ctl_merge.probing.verdict import verdict
from ctl_merge.probing.wording import degree, interval, share, shown

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.5;
 font-family:system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 24px 56px}
h1{font-size:1.75rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:36px 0 12px}
p{margin:0 0 8px}
.soft{color:var(--soft);overflow-wrap:anywhere}
.verdict{background:var(--paper);border:1px solid var(--grid);border-left:5px solid var(--s0);border-radius:8px;
 padding:14px 20px 6px;margin:20px 0 0;font-size:1.02rem}
.verdict p{margin:0 0 10px;overflow-wrap:anywhere}
.warning{border-left-color:var(--s1)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(250px,1fr));gap:14px;margin:16px 0 0}
.tile,figure,details{background:var(--paper);border:1px solid var(--grid);border-radius:8px}
.tile{padding:14px 18px}
.tile strong{display:block;font-size:1.9rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile h3{margin:0 0 4px;font-size:.95rem;overflow-wrap:anywhere}
.tile p{margin:0;font-size:.88rem;color:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px;align-items:start}
figure{margin:0;padding:16px 18px}
figure h3{margin:0 0 6px;font-size:1.02rem}
figure svg{display:block;width:100%;height:auto}
figcaption{font-size:.88rem;color:var(--soft);margin-top:8px}
details{margin:0 0 10px;padding:0 16px}
summary{cursor:pointer;padding:11px 0;font-weight:600;overflow-wrap:anywhere}
.wide{overflow-x:auto;margin-bottom:14px}
table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid var(--grid)}
th:first-child,td:first-child{text-align:left}
th{color:var(--soft);font-weight:600}
dt{font-weight:600}dd{margin:0 0 8px;color:var(--soft)}
:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
@media(max-width:820px){.figures{grid-template-columns:minmax(0,1fr)}main{padding:18px 12px 40px}
 figure{padding:12px 8px}figure h3,figcaption{padding:0 6px}h1{font-size:1.4rem}.verdict{padding:12px 14px 4px}}
@media print{body{background:none}figure,.tile,.verdict{break-inside:avoid}}
"""
_PAGE = {"page": ("#f4f5f7", "#0e1013")}
_TERMS = {
    "linear mix": "base + Σ c (parent − base), of features, with the coefficients c that the merge has in its weights. "
    "Cross-Task Linearity says that the merge's features are this mix.",
    "R": "size of (merge − linear mix) against the size of the parents' disagreement. 1 − R² is the share of the "
    "disagreement that linear mixing explains.",
    "local, propagated": "what a block adds when it reads the exact linear mix, and what it passes on of the deviation "
    "it inherits.",
    "ĉ": "least-squares coefficients of the parents in the merge's features (or weights), with the R² of that fit.",
    "dilution cost": "loss of the linear mix of the parents' logits, minus the loss of a parent: paid even if merging "
    "were perfectly linear.",
    "non-linearity cost": "loss of the merge, minus the loss of that linear mix.",
    "intervals": "95 %, by bootstrap over sequences. Values without one have none.",
}


def render_page(data: Data) -> str:
    """report.html: the verdict, figures, and the exact numbers; needs no network and no script."""
    data = prepared(data)
    name = main_merge(data)["name"]
    title = f"Probe of {name}"
    warnings = "".join(f"<p>{escape(str(line))}</p>" for line in data.get("warnings") or ())
    tables = "".join(_tables(data, text) for text in data["sets"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_variables()}{_STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p class="soft">{escape(_described(data))}</p></header>
<section class="verdict" aria-label="Verdict">{_sentences(verdict(data))}</section>
{f'<section class="verdict warning" aria-label="Warnings">{warnings}</section>' if warnings else ""}
<section class="tiles" aria-label="Key numbers">{"".join(_tile(data, text) for text in data["sets"])}</section>
<h2>Figures</h2>
<div class="figures">{"".join(map(_figure, figures(data)))}</div>
<h2>Exact numbers</h2>
{tables}{_lineage(data)}{_strata(data)}
<h2>Terms</h2>
<dl>{"".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in _TERMS.items())}</dl>
<p class="soft">Cross-Task Linearity: Zhou et al., ICML 2024, arXiv 2402.03660. Made with ctl-merge
{escape(str(data.get("ctl_merge", "")))}{escape(_settings(data))}.</p>
</main>
</body>
</html>
"""


def _variables() -> str:
    colours = COLOURS | _PAGE
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in colours.items()) for i in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _described(data: Data) -> str:
    size = "; ".join(f"{n}: {f['sequences']:,} sequences, {f['tokens']:,} tokens" for n, f in data["sets"].items())
    base = str(data.get("base", ""))
    base = base.rstrip("/").rpartition("/")[2] if base.startswith(("/", ".", "~")) or "\\" in base else base
    return f"{' + '.join(data['parents'])}, finetuned from {base}. {size}."


def _settings(data: Data) -> str:
    return "".join(f", {key} {value}" for key, value in (data.get("settings") or {}).items() if value is not None)


def _sentences(lines: Iterable[str]) -> str:
    """A paragraph each, with the word before the colon in bold."""
    parts = (line.partition(": ") for line in lines)
    return "".join(f"<p><strong>{escape(head)}{colon}</strong>{escape(rest)}</p>" for head, colon, rest in parts)


def _tile(data: Data, name: str) -> str:
    """R after the last block and what the merge costs, large."""
    known = [row for row in rows(data, name) if number(row, "nonlinearity") is not None]
    if not known:
        return f'<div class="tile"><h3>{escape(name)}</h3><strong>R –</strong><p>no disagreement to explain</p></div>'
    value, costs = number(known[-1], "nonlinearity"), costs_of(data, name)
    lines = [f"after the last block; {share(value)} explained: {degree(value or 0)}"]
    if costs:
        lines.append(f"non-linearity {interval(costs['nonlinearity'], signed=True)} nats per token")
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="tile"><h3>{escape(name)}</h3><strong>R {shown(value)}</strong>{paragraphs}</div>'


def _figure(figure: Figure) -> str:
    title, caption = escape(figure.title), escape(figure.caption)
    return f'<figure id="{figure.name}"><h3>{title}</h3>{figure.svg}<figcaption>{caption}</figcaption></figure>'


def _tables(data: Data, name: str) -> str:
    blocks = rows(data, name, parts={row["part"] for row in data["sets"][name]["blocks"]})
    optional = [(key, text) for key, text in (
        ("nonlinearity_null", "null"), ("nonlinearity_written", "written"), ("floor", "floor"),
    ) if any(number(row, key) is not None for row in blocks)]  # fmt: skip
    head = ["block", "part", "R [95 %]", "R robust", "cos", "cos token", "coef", "cos parents", "local", "propagated"]
    head += [f"ĉ {parent} (weights)" for parent in data["parents"]]
    head += ["R² of ĉ", "R² weights", *(text for _, text in optional)]
    body = [_cells(data, row, [key for key, _ in optional]) for row in blocks]
    return _table(f"Blocks on {name}", head, body) + _loss_table(data, name) + _patch_table(data, name)


def _cells(data: Data, row: Data, optional: Sequence[str]) -> list[str]:
    cells = ["" if row["index"] is None else place(row), row["part"], interval(bounded(row, "nonlinearity"))]
    cells += [shown(number(row, key), digits=4) for key in ("nonlinearity_robust",)]
    cells += [shown(number(row, key), digits=5) for key in ("cos", "cos_token", "coef", "cos_parents")]
    cells += [shown(number(row, key)) for key in ("local", "propagated")]
    for parent in data["parents"]:
        feature, weight = (number(row, f"effective_{space}", parent) for space in ("feature", "weight"))
        cells.append(f"{shown(feature)} ({shown(weight)})")
    cells += [shown(number(row, key)) for key in ("explained_feature", "explained_weight")]
    cells += [shown(number(row, key), digits=4) for key in optional]
    if "floor" in optional and below_floor(row):
        cells[-1] += " (R below 3×)"
    return cells


def _loss_table(data: Data, name: str) -> str:
    losses = data["sets"][name].get("losses")
    if not losses:
        return ""
    body = [[model, interval(found), "", "", "", ""] for model, found in losses["nll"].items()]
    for merge, found in losses.get("merges", {}).items():
        row = next((row for row in body if row[0] == merge), None)
        more = [interval(found.get(key)) for key in ("ensemble", "nonlinearity_cost", "kl", "agreement")]
        if row is not None:
            row[2:] = more
    head = ["model", "loss, nats per token", "ensemble", "non-linearity cost", "KL to ensemble", "top-1 agreement"]
    dilution = [
        [merge, parent, interval(cost, signed=True)]
        for merge, found in losses.get("merges", {}).items() for parent, cost in found["dilution_cost"].items()
    ]  # fmt: skip
    return _table(f"Losses on {name}", head, body, (["merge", "against parent", "dilution cost"], dilution))


def _patch_table(data: Data, name: str) -> str:
    patch = (costs_of(data, name) or {}).get("patch", {})
    body = [[site, interval(gain, signed=True)] for site, gain in patch.items()]
    return _table(f"Causal patch on {name}", ["after", "loss recovered, nats per token"], body) if body else ""


def _lineage(data: Data) -> str:
    keys = ("relative_norm", "cosine_to_base")
    body = [[r["parent"], *(shown(number(r, key), digits=4) for key in keys)] for r in data.get("lineage") or ()]
    return _table("Lineage", ["parent", "‖τ‖ / ‖base‖", "cos to base"], body) if body else ""


def _strata(data: Data) -> str:
    names = list(dict.fromkeys(s for found in data["sets"].values() for s in found.get("strata") or ()))
    body = [
        [name, place(row), *(shown(number(row, "by_stratum", s)) for s in names)]
        for name in data["sets"] for row in rows(data, name)
    ]  # fmt: skip
    return _table("R by kind of token", ["data", "block", *names], body) if names else ""


def _table(title: str, head: Sequence[str], body: Sequence[Sequence[str]], *more: tuple[Any, Any]) -> str:
    """Tables that unfold under one title; they scroll by themselves where the screen is narrow."""
    parts = []
    for columns, lines in ((head, body), *more):
        top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in columns)
        rest = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
        table = f"<table><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table>"
        parts.append(f'<div class="wide" tabindex="0" role="region" aria-label="{escape(title)}">{table}</div>')
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"
