"""The probe's page, figures, verdict and terminal output, from plain data made by hand."""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ctl_merge.probing.figures import figures, write_figures
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
    lineage = [{"parent": p, "relative_norm": 0.1, "cosine_to_base": 0.99} for p in parents]
    return {
        "format": 1, "ctl_merge": "0.1.0", "base": "/home/me/models/base-model", "parents": parents, "merges": merges,
        "settings": {"sequences": 8}, "lineage": lineage,
        "sets": {name: found if losses else found | {"losses": None} for name in sets},
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
    assert parser.addresses == ["data:,"]
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
    text = verdict(data)[0]
    assert text.startswith("Caution: the weights of ada have a cosine of 0.400")
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


def test_small_words() -> None:
    assert [share(r) for r in (0.0, 0.01, 0.6, 1.2, None)] == ["all", "over 99.9 %", "64 %", "none", "–"]
    assert spans(["0", "1", "3"], ["0", "1", "2", "3"]) == "blocks 0–1 and 3"
    assert spans(["a 1", "b 0"], ["a 0", "a 1", "b 0"]) == "blocks a 1 and b 0"
    assert spans(list("02468"), list("012345678")) == "blocks 0, 2, 4 and 2 more"


# A real browser


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize("variant", ["two parents", "hostile"])
def test_a_browser_shows_the_page(variant: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    probe = "<script>console.info('wide', document.documentElement.scrollWidth > innerWidth)</script></body>"
    page.write_text(render_page(VARIANTS[variant]).replace("</body>", probe), "utf-8")
    pictures = {}
    for theme, scheme in (("dark", 0), ("light", 1)):
        pictures[theme] = tmp_path / f"{theme}.png"
        ran = subprocess.run(
            [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / theme}",
             "--enable-logging=stderr", f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1200,900",
             f"--screenshot={pictures[theme]}", page.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        said = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
        assert len(said) == 1 and "wide false" in said[0], said
    assert all(picture.stat().st_size > 20_000 for picture in pictures.values())
    assert pictures["dark"].read_bytes() != pictures["light"].read_bytes()
