"""The probe's report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from ctl_merge.probing.figures import figures
from ctl_merge.probing.record import Data, best_parent, costs_of, heading, named, number, prepared, recipes, rows
from ctl_merge.probing.repair import repair
from ctl_merge.probing.svg import COLOURS, Figure
from ctl_merge.probing.tables import set_tables, tables
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
a{color:var(--s0)}
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
.figures{columns:2;column-gap:18px}
figure{margin:0 0 18px;padding:16px 18px;break-inside:avoid}
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
@media(max-width:820px){.figures{columns:1}main{padding:18px 12px 40px}
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
    title = heading(data)
    warnings = "".join(f"<p>{escape(str(line))}</p>" for line in data.get("warnings") or ())
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
{_repaired(data)}
{f'<section class="verdict warning" aria-label="Warnings">{warnings}</section>' if warnings else ""}
<section class="tiles" aria-label="Key numbers">{"".join(_tile(data, text) for text in data["sets"])}</section>
<h2>Figures</h2>
<p class="soft">Point at a mark for its numbers; the <a href="#numbers">tables</a> hold all of them.</p>
<div class="figures">{"".join(map(_figure, figures(data)))}</div>
<h2 id="numbers">Exact numbers</h2>
{"".join(set_tables(data, text) for text in data["sets"])}{tables(data)}
<h2>Terms</h2>
<dl>{"".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in _TERMS.items())}</dl>
<p class="soft">Cross-Task Linearity: Zhou et al., ICML 2024, arXiv 2402.03660. Made with ctl-merge
{escape(str(data.get("ctl_merge", "")))}{escape(_settings(data))}.</p>
</main>
</body>
</html>
"""


def _repaired(data: Data) -> str:
    """What tuning changed and what came back, where the merge was tuned."""
    said = repair(data)
    return f'<section class="verdict" aria-label="Tuning">{_sentences(said)}</section>' if said else ""


def _variables() -> str:
    colours = COLOURS | _PAGE
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in colours.items()) for i in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _described(data: Data) -> str:
    size = "; ".join(f"{n}: {f['sequences']:,} sequences, {f['tokens']:,} tokens" for n, f in data["sets"].items())
    base = str(data.get("base", ""))
    base = base.rstrip("/").rpartition("/")[2] if base.startswith(("/", ".", "~")) or "\\" in base else base
    beside = [named(merge) for merge in recipes(data)[1:]]
    others = f" Beside it: {', '.join(beside)}." if beside else ""
    return f"{' + '.join(data['parents'])}, finetuned from {base}. {size}.{others}"


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
    lines += _belonging(data, name)
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="tile"><h3>{escape(name)}</h3><strong>R {shown(value)}</strong>{paragraphs}</div>'


def _belonging(data: Data, name: str) -> list[str]:
    """The parent that is best on a data set, and whether another may be."""
    best = best_parent(data, name)
    if best is None or len(data["parents"]) < 2:
        return []
    margin = best.get("margin")
    if number(margin, "value") is None:
        return [f"best parent: {best['parent']}"]
    doubt = "" if (number(margin, "low") or 0) > 0 else ", not beyond doubt"
    return [f"best parent: {best['parent']}, by {interval(margin)} before {best.get('second')}{doubt}"]


def _figure(figure: Figure) -> str:
    title, caption = escape(figure.title), escape(figure.caption)
    return f'<figure id="{figure.name}"><h3>{title}</h3>{figure.svg}<figcaption>{caption}</figcaption></figure>'
