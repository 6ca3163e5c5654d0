"""The probe's page, figures, verdict and terminal output, from plain data made by hand."""

from __future__ import annotations

import copy
import io
import math
import re
import shutil
import struct
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from ctl_merge.probing import raster
from ctl_merge.probing.figures import figures, standing_alone, write_figures
from ctl_merge.probing.page import render_page
from ctl_merge.probing.section import markdown
from ctl_merge.probing.svg import COLOURS
from ctl_merge.probing.terminal import render
from ctl_merge.probing.verdict import verdict
from ctl_merge.probing.wording import share, spans

HOSTILE = '<script>alert("x")</script>'
VOID = {"meta", "link", "br"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def interval(value: float, width: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def make_row(
    parents: list[str], stack: str, index: int | None, part: str, merge: str, **changes: Any
) -> dict[str, Any]:
    r = 0.1 * (1 + (index or 0))
    name = f"{stack}.{'input' if index is None else index}" + (f".{part}" if part in ("attention", "mlp") else "")
    return {
        "block": name, "stack": stack, "index": index, "part": part, "merge": merge,
        "nonlinearity": r, "nonlinearity_low": 0.9 * r, "nonlinearity_high": 1.1 * r, "nonlinearity_robust": r,
        "cos": 1 - r * r / 2, "cos_token": 1 - r * r / 2, "coef": 1.01,
        "cos_parents": 0.7 if len(parents) > 1 else None,
        "effective_feature": dict.fromkeys(parents, 0.4), "effective_weight": dict.fromkeys(parents, 0.5),
        "explained_feature": 0.9, "explained_weight": 1.0, "relative_deviation": 0.1,
        "local": None if index is None else 0.7 * r, "propagated": None if index is None else 0.6 * r,
        "by_stratum": {"first": r, "other": None}, "massive": [1], **changes,
    }  # fmt: skip


def make_full_row(row: dict[str, Any], place: int) -> dict[str, Any]:
    """A row with all that a probe may measure, no two numbers alike."""
    own = 0.001 * place
    known = {
        "local": 0.31, "propagated": 0.41, "nonlinearity_null": 0.91, "floor": 0.051, "nonlinearity_written": 0.21,
        "slope_deviation": 1.95, "slope_cos": 3.95, "slope_nonlinearity": 0.95, "nonlinearity_against_first": -0.12,
    }  # fmt: skip
    found = {key: value + own for key, value in known.items()}
    ends = {f"{k}_{end}": v + d for k, v in found.items() for end, d in (("low", -0.0004), ("high", 0.0004))}
    coefficients = {f"effective_feature{e}": dict.fromkeys(row["effective_weight"], 0.42 + d + own)
                    for e, d in (("", 0), ("_low", -0.0004), ("_high", 0.0004))}  # fmt: skip
    strata = {"by_stratum": {"prompt": 0.61 + own, "response": 0.71 + own}, "quadratic": place % 2 == 0}
    return row | found | ends | coefficients | strata


def make_full(**options: Any) -> dict[str, Any]:
    """A report with all optional parts, of two recipes."""
    data = make_data(**options)
    data["merges"] = [
        data["merges"][0] | {"name": name, "method": method, "recipe": f"{name}.yaml", "main": name == "first"}
        for name, method in (("first", "ties"), ("second", "linear"))
    ]
    for found in data["sets"].values():
        rows = [row | {"merge": m["name"]} for row in found["blocks"] for m in data["merges"]]
        found["blocks"] = [make_full_row(row, i) for i, row in enumerate(rows)]
        for row in found["blocks"]:
            if row["merge"] == "first":
                row["nonlinearity_against_first"] = row["nonlinearity_against_first_low"] = None
        found["strata"] = {"prompt": 500, "response": 524}
        found["best_parent"] = {"parent": "euler", "second": "ada", "margin": interval(0.5)}
        own = found["losses"]["merges"].pop("merged")
        blame = {site: interval(0.02 + 0.1 * i) for i, site in enumerate(own["patch"])} | {"logits": interval(0.72)}
        found["losses"]["merges"] = {
            "first": own | {"blame": blame}, "second": own | {"against_first": interval(-0.3)}
        }  # fmt: skip
        nll = found["losses"]["nll"]
        nll |= {"first": nll["merged"], "second": interval(2.2)}
        del nll["merged"]
    return data


def make_data(
    parents: list[str] | None = None, sets: tuple[str, ...] = ("maths", "code"), blocks: int = 3,
    stacks: tuple[str, ...] = ("model.layers",), alphas: tuple[float, ...] = (), losses: bool = True, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """A report; `changes` are keys of every row."""
    parents = ["euler", "ada"] if parents is None else parents
    merges: list[dict[str, Any]] = [{"name": "merged", "effective_weight": dict.fromkeys(parents, 0.5)}]
    if alphas:
        merges = [{"name": f"at {a}", "alpha": a, "main": a == 0.5} for a in alphas]
    places = [(s, i, p) for s in stacks for i in (None, *range(blocks)) for p in ("attention", "mlp", "block")]
    places = [(s, i, p if i is not None else "input") for s, i, p in places if i is not None or p == "block"]
    nll = {"base": interval(3.0), **{p: interval(2.0 + 0.5 * i) for i, p in enumerate(parents)}}
    costs = {
        "ensemble": interval(2.2), "nonlinearity_cost": interval(0.3), "kl": interval(0.1), "agreement": interval(0.8),
        "dilution_cost": {p: interval(0.2 - 0.5 * i) for i, p in enumerate(parents)},
        "patch": {f"{stacks[0]}.{i}": interval(0.1 * i) for i in range(blocks)},
    }  # fmt: skip
    found = {
        "sequences": 8, "tokens": 1024, "strata": {"first": 8, "other": 1016},
        "blocks": [make_row(parents, *place, merge["name"], **changes) for place in places for merge in merges],
        "losses": {
            "nll": nll | {m["name"]: interval(2.5) for m in merges}, "merges": {m["name"]: costs for m in merges}
        },
    }  # fmt: skip
    apart = {"relative_norm": 0.1, "cosine_to_base": 0.99, "cosine_to_others": 0.2}
    lineage = [{"parent": p, **apart} for p in parents]
    return {
        "format": 1, "ctl_merge": "0.1.0", "base": "/home/me/models/base-model", "parents": parents, "merges": merges,
        "settings": {"sequences": 8}, "lineage": lineage,
        "sets": {name: copy.deepcopy(found if losses else found | {"losses": None}) for name in sets},
    }  # fmt: skip


def said(data: dict[str, Any], head: str) -> str:
    return next((line for line in verdict(data) if line.startswith(head)), "")


def printed(data: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(data))
    return console.export_text()


class Balanced(HTMLParser):
    """Checks that tags nest; keeps the text and the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


VARIANTS: dict[str, dict[str, Any]] = {
    "two parents": make_data(),
    "one parent": make_data(["solo"]),
    "three parents": make_data(["a", "b", "c"]),
    "no losses": make_data(losses=False),
    "sweep": make_data(alphas=(0.25, 0.5, 0.75)),
    "two stacks": make_data(stacks=("encoder.block", "decoder.block")),
    "seven sets": make_data(sets=tuple("abcdefg")),
    "deep": make_data(blocks=80),
    "one block": make_data(blocks=1),
    "nothing measured": make_data(
        nonlinearity=None, nonlinearity_low=None, nonlinearity_high=None, local=None, cos=None
    ),
    "NaN": make_data(nonlinearity_robust=math.nan, cos=math.nan, coef=math.inf, local=math.nan),
    "all zero": make_data(
        nonlinearity=0.0, nonlinearity_low=0.0, nonlinearity_high=0.0, local=0.0, propagated=0.0, cos=1.0
    ),
    "huge": make_data(nonlinearity=4e6, nonlinearity_high=5e6, cos=-0.5),
    "written": make_data(nonlinearity_written=0.3, floor=0.02, nonlinearity_null=0.9),
    "full": make_full(),
    "full, long names": make_full(parents=["euler", *(f"organisation/model-of-some-length-{i}" for i in range(3))]),
    "no rows": make_data() | {"sets": {"maths": {"sequences": 1, "tokens": 2, "blocks": [], "losses": None}}},
    "hostile": make_data([HOSTILE, "a\x1b[31m|b\x00\n[bold]"], sets=(HOSTILE, '"&\ud800')),
    "bare": {k: v for k, v in make_data(losses=False).items() if k not in ("lineage", "settings", "ctl_merge", "base")},
}
every = pytest.mark.parametrize("data", VARIANTS.values(), ids=list(VARIANTS))


@every
def test_everything_renders_what_there_is(data: dict[str, Any], tmp_path: Path) -> None:
    page, text = render_page(data), printed(data) + markdown(data) + "".join(verdict(data))
    for found in (page, text):
        assert not re.search(r"\b(nan|None|inf)\b", found)
        found.encode("utf-8")
    assert max(map(len, printed(data).splitlines())) <= 100
    assert len(verdict(data)) <= 6 and all(verdict(data))
    parser = Balanced()
    parser.feed(page)
    assert not parser.open and "script" not in parser.tags
    for path in write_figures(data, tmp_path):
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
            continue
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("aria-label")
        assert "var(" not in path.read_text("utf-8")


@every
def test_marks_lie_within_their_figure(data: dict[str, Any]) -> None:
    for figure in figures(data):
        root = ET.fromstring(figure.svg)
        width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
        for element in root.iter():
            for x, y in (("x", "y"), ("cx", "cy")):
                if x in element.attrib:
                    assert -0.1 <= float(element.attrib[x]) <= width and -0.1 <= float(element.attrib[y]) <= height


def test_the_page_needs_nothing_else() -> None:
    page = render_page(make_data())
    parser = Balanced()
    parser.feed(page)
    assert parser.addresses == ["data:,", "#numbers"]
    assert "@import" not in page and "url(" not in page
    assert "prefers-color-scheme:dark" in page and 'name="viewport"' in page
    assert "/home/me" not in page and "base-model" in page


def test_the_page_shows_every_value() -> None:
    page = render_page(make_data(nonlinearity=0.4321, nonlinearity_low=0.41, nonlinearity_high=0.4599, floor=0.0123))
    for text in (
        "0.432 [0.410, 0.460]",
        "0.0123",
        "2.200 [2.150, 2.250]",
        "+0.300 [0.250, 0.350]",
        "ĉ euler",
        "0.9900",
    ):
        assert text in page
    assert page.index("Linearity:") < page.index("<figure") < page.index("<details")


def test_names_are_escaped() -> None:
    data = VARIANTS["hostile"] | {"warnings": [HOSTILE]}
    page = render_page(data)
    assert "<script" not in page and "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in page
    assert "\x1b" not in printed(data) and "\x00" not in page and "[bold]" in printed(data)
    table = [line for line in markdown(data).splitlines() if line.startswith("|")]
    assert "<script" not in markdown(data)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {8}


@pytest.mark.parametrize(
    ("variant", "missing"),
    [("no losses", {"losses", "patch", "sweep"}), ("two parents", {"sweep"}), ("sweep", set()), ("no rows", None)],
)
def test_figures_appear_where_there_is_data(variant: str, missing: set[str] | None) -> None:
    names = ["nonlinearity", "cosine", "origin", "parts", "coefficients", "patch", "losses", "sweep"]
    wanted = [] if missing is None else [name for name in names if name not in missing]
    assert [figure.name for figure in figures(VARIANTS[variant])] == wanted


def test_all_that_a_probe_may_measure_has_a_figure() -> None:
    assert [figure.name for figure in figures(make_full())] == [
        "nonlinearity", "recipes", "cosine", "origin", "parts", "strata", "coefficients", "scaling", "blame", "patch",
        "losses",
    ]  # fmt: skip


@pytest.mark.parametrize("variant", ["two parents", "two stacks", "sweep", "written", "full"])
def test_what_tooltips_say_is_in_the_tables_which_need_no_pointer(variant: str) -> None:
    page = render_page(VARIANTS[variant])
    pictures, tables = page.partition('<h2 id="numbers">')[::2]
    tips = re.findall(r"<title>([^<]*)</title>", pictures.partition("</head>")[2])
    tips = [line for tip in tips for line in tip.splitlines() if not line.startswith("1 − cos(")]  # tables have cos
    numbers = {number for tip in tips for number in re.findall(r"−?\d\.\d{3}", tip)}
    assert len(numbers) > 20 and 'href="#numbers"' in pictures
    assert not {number for number in numbers if number not in tables}


def test_tooltips_hold_exact_numbers() -> None:
    svg = {figure.name: figure.svg for figure in figures(make_data(nonlinearity_null=0.875))}
    assert "maths, block 2\nR = 0.300 [0.270, 0.330]" in svg["nonlinearity"]
    assert "random task vector: 0.875" in svg["nonlinearity"]
    assert "loss recovered: 0.200 [0.150, 0.250]" in svg["patch"]


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_can_be_told_from_their_background(theme: int) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name, pair in COLOURS.items():
        light, dark = sorted((luminance(pair[theme]), luminance(COLOURS["paper"][theme])), reverse=True)
        least = {"paper": 1, "grid": 1}.get(name, 4.5)  # the others are also colours of text
        assert (light + 0.05) / (dark + 0.05) >= least, name


# The verdict


def test_linearity_is_the_last_blocks() -> None:
    assert "(2) linear mixing explains 91 % for maths (R 0.300 [0.270, 0.330], partly linear)" in said(
        make_data(), "Lin"
    )
    assert "After block 0 it was 99.0 % and 99.0 %" in said(make_data(), "Lin")
    assert "not defined" in said(VARIANTS["nothing measured"], "Lin")
    assert "gives R 0.900 for maths" in said(VARIANTS["written"], "Lin")


def test_blame_goes_to_the_largest_local_part() -> None:
    data = make_data(sets=("maths",))
    for row in data["sets"]["maths"]["blocks"]:
        row["local"] = {0: 0.2, 1: 0.5, 2: 0.46}.get(row["index"])
    text = said(data, "Origin")
    assert "block 1 on maths (local part 0.500; block 2 within 10 %)" in text
    assert "Made linear up to block 2, maths would gain 0.200 [0.150, 0.250]" in text
    assert "in block 1:" in said(data, "To try")


def test_a_patch_of_doubtful_gain_is_said_to_be() -> None:
    data = make_data(sets=("maths",))
    data["sets"]["maths"]["losses"]["merges"]["merged"]["patch"] = {"model.layers.0": interval(0.01)}
    assert "No block's patch recovers loss beyond doubt on maths (at best 0.010 [−0.040, 0.060])" in said(
        data, "Origin"
    )


def test_the_parent_that_is_followed() -> None:
    data = make_data(sets=("maths",))
    for row in data["sets"]["maths"]["blocks"]:
        if row["index"] is not None and row["index"] >= 1:
            row["effective_feature"] = {"euler": 0.55, "ada": 0.25}
    assert "on maths blocks 1–2 lean to euler (ĉ in features / weights: euler 0.55 / 0.50, ada 0.25 / 0.50)" in said(
        data, "Parents"
    )
    assert "no block prefers one" in said(make_data(), "Parents")
    assert not said(make_data(["solo"]), "Parents")


def test_costs_are_split_and_doubts_said() -> None:
    data = make_data(sets=("maths",))
    text = said(data, "Cost")
    assert "2.500 nats per token (base 3.000), 0.500 worse than its best parent euler" in text
    assert "dilution costs 0.200 [0.150, 0.250], non-linearity costs 0.300 [0.250, 0.350]." in text
    costs = data["sets"]["maths"]["losses"]["merges"]["merged"]
    costs["nonlinearity_cost"], costs["dilution_cost"]["euler"] = interval(0.01), interval(-0.6)
    assert "dilution gains 0.600 [0.550, 0.650]" in said(data, "Cost")
    assert "0.010 [−0.040, 0.060], an interval that includes 0" in said(data, "Cost")
    assert "leave linearity alone" in said(data, "To try")
    assert not said(make_data(losses=False), "Cost")


def test_cautions_come_first() -> None:
    data = make_data(floor=0.09, cos=0.995, nonlinearity=0.35)
    data["lineage"][1]["cosine_to_base"] = 0.4
    data["lineage"][0]["cosine_to_others"] = 0.58
    text = verdict(data)[0]
    assert text.startswith("Caution: the weights of ada have a cosine of 0.400")
    assert "the task vectors of euler have cosines of up to 0.580" in text
    assert "exceed 0.99 while R is up to 0.350" in text and "below floor" not in text
    low = make_data(floor=0.09)
    assert "below floor on maths: at blocks 0–1 R is under 3 times" in verdict(low)[0]
    assert "float32" in said(low, "To try") and "below floor" in printed(low)
    assert not said(make_data(floor=0.01), "Caution") and "does not matter" in said(make_data(floor=0.01), "Lin")


def test_the_sweeps_best_alpha_is_advised() -> None:
    data = make_data(alphas=(0.25, 0.5, 0.75), sets=("maths",))
    data["sets"]["maths"]["losses"]["nll"]["at 0.75"] = interval(2.1)
    assert "α = 0.75, the best of the sweep on maths" in said(data, "To try")


def test_of_many_sets_the_extremes_are_spoken_of() -> None:
    data = make_data(sets=("a", "b", "c"))
    for factor, found in ((2.0, "b"), (0.5, "c")):
        rows = [row | {"nonlinearity": factor * row["nonlinearity"]} for row in data["sets"][found]["blocks"]]
        data["sets"][found] = data["sets"][found] | {"blocks": rows}
    text = said(data, "Lin")
    assert "for b" in text and "for c" in text and "for a" not in text


def test_the_page_says_what_was_probed() -> None:
    page = render_page(make_full())
    assert "<title>Probe of first.yaml (ties)</title>" in page and "<h1>Probe of first.yaml (ties)</h1>" in page
    assert "Beside it: second.yaml (linear)." in page
    assert "best parent: euler, by 0.500 [0.450, 0.550] before ada<" in page
    assert "<h1>Probe of merged</h1>" in render_page(make_data())
    doubtful = make_full()
    doubtful["sets"]["maths"]["best_parent"]["margin"] = interval(0.01)
    assert "before ada, not beyond doubt" in render_page(doubtful)
    assert "best parent: euler<" in render_page(make_data())


def test_recipes_are_compared_where_they_are_paired() -> None:
    page = render_page(make_full())
    assert '<th scope="col">minus first</th>' in page and "−0.300 [−0.350, −0.250]" in page
    assert "second.yaml (linear), whose loss is lower on maths and code beyond doubt" in said(make_full(), "To try")
    later = make_full()
    later["merges"][0]["main"], later["merges"][1]["main"] = False, True
    assert "whose loss is lower" not in said(later, "To try")  # the difference is to another recipe


def test_blame_is_said_where_it_is_sure() -> None:
    data = make_full(sets=("maths",))
    assert "most comes from the final norm and head 0.720 [0.670, 0.770] and block 2 0.220" in said(data, "Origin")
    blame = data["sets"]["maths"]["losses"]["merges"]["first"]["blame"]
    blame |= dict.fromkeys(blame, interval(0.01))
    assert "On maths no block's share of the non-linearity cost is above 0 beyond doubt" in said(data, "Origin")


def test_the_quadratic_regime_is_named_by_block() -> None:
    data = make_full(sets=("maths",))
    rows = [row for row in data["sets"]["maths"]["blocks"] if row["merge"] == "first" and row["part"] == "block"]
    for row, quadratic in zip(rows, (True, False, None), strict=True):
        row["quadratic"] = quadratic
    assert "shrinks with the task vectors' square at block 0 on maths" in said(data, "Linearity")
    page = render_page(data)
    assert all(f"<td>{word}</td>" in page for word in ("yes", "no", "too small to tell"))
    for row, slope in zip(rows, (1.0, 1.5, 1.2), strict=True):
        row["quadratic"], row["slope_deviation"] = False, slope
    assert "at no block on maths" in said(data, "Linearity")
    assert "halved, they leave 35 to 50 % of the deviation here" in said(data, "To try")


def test_smaller_coefficients_are_advised_where_the_cost_comes_from() -> None:
    data = make_full(sets=("maths",))
    blame = data["sets"]["maths"]["losses"]["merges"]["first"]["blame"]
    blame |= {site: interval(0.0) for site in blame} | {"model.layers.1": interval(0.3)}
    for row in data["sets"]["maths"]["blocks"]:
        row["local"] = 0.9 if row["index"] == 2 else 0.1
    assert "created by block 2 on maths" in said(data, "Origin")
    assert "smaller ones only in block 1:" in said(data, "To try")
    blame |= {site: interval(0.0) for site in blame}
    assert "smaller ones only in block 2:" in said(data, "To try")


def test_coefficients_that_differ_between_blocks_are_told() -> None:
    data = make_data(sets=("maths",))
    assert not said(data, "Caution")
    for row in data["sets"]["maths"]["blocks"]:
        row["effective_weight"] = {"euler": 0.8 if row["index"] == 0 else 0.2, "ada": 0.3}
    assert "the coefficient of euler in the weights goes from 0.20 to 0.80 over the blocks" in said(data, "Caution")


def test_a_random_task_vector_says_whether_the_parents_are_special() -> None:
    assert said(make_data(nonlinearity_null=0.9), "Lin").count("for maths and 0.900 for code there.") == 1
    assert "on maths and code the parents mix hardly more linearly" in said(make_data(nonlinearity_null=0.31), "Lin")


def test_what_costs_nothing_is_said_to() -> None:
    data = make_data(sets=("maths",))
    nothing = {"value": 0.0, "low": -1e-9, "high": 1e-9}
    data["sets"]["maths"]["losses"]["nll"]["merged"] = interval(2.0)
    data["sets"]["maths"]["losses"]["merges"]["merged"] |= {
        "nonlinearity_cost": nothing, "dilution_cost": {"euler": nothing, "ada": interval(-0.5)}
    }  # fmt: skip
    assert "that of its best parent euler: dilution costs nothing, non-linearity costs nothing." in said(data, "Cost")


def test_small_words() -> None:
    assert [share(r) for r in (0.0, 0.01, 0.6, 1.2, None)] == ["all", "over 99.9 %", "64 %", "none", "–"]
    assert spans(["0", "1", "3"], ["0", "1", "2", "3"]) == "blocks 0–1 and 3"
    assert spans(["a 1", "b 0"], ["a 0", "a 1", "b 0"]) == "blocks a 1 and b 0"
    assert spans(list("02468"), list("012345678")) == "blocks 0, 2, 4 and 2 more"


# Pictures


def test_a_png_lies_beside_every_svg_at_twice_its_size(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="the extra `figures` is not installed")
    if raster.missing():
        pytest.skip(raster.missing() or "")
    written = write_figures(make_full(), tmp_path)
    for svg in (path for path in written if path.suffix == ".svg"):
        png = svg.with_suffix(".png").read_bytes()
        size = struct.unpack(">II", png[16:24])
        root = ET.parse(svg).getroot()
        assert size == tuple(2 * int(root.attrib[side]) for side in ("width", "height"))
    for theme in (0, 1):
        with_text = standing_alone(figures(make_data())[0].svg, theme)
        without = re.sub(r"<text.*?</text>", "", with_text)
        assert raster.png(with_text) != raster.png(without)  # resvg leaves text out where it finds no font


def test_what_is_missing_for_png_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert raster.missing() == "PNG figures need resvg: pip install 'ctl-merge[figures]'"
    assert {path.suffix for path in write_figures(make_data(), tmp_path)} == {".svg"}
    blind = types.SimpleNamespace(svg_to_bytes=lambda **options: b"")  # as resvg where there are no fonts
    monkeypatch.setitem(sys.modules, "resvg_py", blind)
    raster._family.cache_clear()
    assert "need a font" in (raster.missing() or "") and raster.png("<svg/>") is None
    raster._family.cache_clear()


def test_the_card_shows_pictures_by_relative_paths(tmp_path: Path) -> None:
    data = make_data()
    write_figures(data, tmp_path / "probe" / "figures")
    text = markdown(data, tmp_path / "probe")
    found = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text)
    assert [title for title, _ in found] == [
        "R against depth",
        "Which parent each block follows",
        "What the merge costs",
    ]
    assert all((tmp_path / address).is_file() and not Path(address).is_absolute() for _, address in found)
    assert "![" not in markdown(data)


# A real browser


browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")


def open_in_browser(page: Path, theme: str = "light", width: int = 1200) -> tuple[bytes, list[str]]:
    """A screenshot of a page, and what its console says. `theme`: light or dark."""
    picture = page.with_name(f"{page.stem}-{theme}-{width}.png")
    scheme = {"dark": 0, "light": 1}[theme]
    ran = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / picture.stem}",
         "--enable-logging=stderr", f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},900",
         f"--screenshot={picture}", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return picture.read_bytes(), [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


@browser
@pytest.mark.parametrize("variant", ["two parents", "hostile", "full"])
def test_a_browser_shows_the_page(variant: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    probe = "<script>console.info('wide', document.documentElement.scrollWidth > innerWidth)</script></body>"
    page.write_text(render_page(VARIANTS[variant]).replace("</body>", probe), "utf-8")
    pictures = {}
    for theme, width in (("dark", 1200), ("light", 1200), ("light", 500)):
        pictures[theme, width], said = open_in_browser(page, theme, width)
        assert len(said) == 1 and "wide false" in said[0], said
    assert all(len(picture) > 20_000 for picture in pictures.values())
    assert pictures["dark", 1200] != pictures["light", 1200]


@browser
def test_a_keyboard_reaches_every_number(tmp_path: Path) -> None:
    """Tables open and scroll by keyboard, and the link above the figures opens their section."""
    page = tmp_path / "report.html"
    probe = """<script>
        const all = document.querySelectorAll('a[href], summary, [tabindex]');
        const focused = [...all].filter(one => { one.closest('details')?.setAttribute('open', ''); one.focus();
                                                 return document.activeElement === one; });
        const scrolling = [...document.querySelectorAll('.wide')].every(one => one.tabIndex === 0 && one.ariaLabel);
        const target = document.querySelector(document.querySelector('a[href^="#"]').getAttribute('href'));
        console.info('reached', all.length > 5 && focused.length === all.length, scrolling, target !== null);
    </script></body>"""
    page.write_text(render_page(make_full()).replace("</body>", probe), "utf-8")
    _, said = open_in_browser(page)
    assert len(said) == 1 and "reached true true true" in said[0], said


@browser
def test_a_browser_shows_the_card(tmp_path: Path) -> None:
    """The Markdown as HTML: its pictures load, its table is a table, and no name becomes markup."""
    data = make_full(parents=["euler", HOSTILE], sets=("maths", '"&|*_x_*'))
    write_figures(data, tmp_path / "probe" / "figures")
    page = tmp_path / "card.html"
    probe = """<script>
        const pictures = [...document.images];
        console.info('card', pictures.length, pictures.every(one => one.complete && one.naturalWidth > 300 && one.alt),
                     document.querySelectorAll('tbody tr').length, document.querySelectorAll('script').length);
    </script>"""
    html = MarkdownIt("commonmark").enable("table").render(markdown(data, tmp_path / "probe"))
    probe = f"<script>addEventListener('load', () => {{ {probe[8:-9]} }})</script>"
    page.write_text(f"<!doctype html><meta charset=utf-8>{html}{probe}", "utf-8")
    _, said = open_in_browser(page)
    assert len(said) == 1 and "card 3 true 2 1" in said[0], said


def test_a_png_has_letters_without_serifs_where_a_font_has_them() -> None:
    """resvg draws a family that is not there with serifs."""
    from ctl_merge.probing import raster

    resvg_py = pytest.importorskip("resvg_py")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><text y="16" font-family="%s">Rg</text></svg>'
    draw = [bytes(resvg_py.svg_to_bytes(svg_string=svg % name)) for name in (*raster._FAMILIES, "no such family")]
    if len(set(draw)) == 1:
        pytest.skip("no font without serifs is installed")
    assert bytes(resvg_py.svg_to_bytes(svg_string=svg % raster._family())) != draw[-1]


def test_names_of_parents_are_as_long_as_the_terminal_has_room() -> None:
    row = {"floor": 0.01, "nonlinearity_written": 0.2, "nonlinearity_null": 0.9}
    few, many = (
        printed(make_data(["french", "cos"], **row)),
        printed(make_data(["applied-mathematics", "french", "cos"], **row)),
    )
    assert "ĉ french" in few and "ĉ french" in many and "ĉ applied-mathematics" not in many
    assert max(map(len, many.splitlines())) <= 100
