"""Files of several merges: earlier ones are read by later ones, and never written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from checkpoints import write_checkpoint

import ctl_merge
from ctl_merge.checkpoint import CHUNK
from ctl_merge.errors import RecipeError
from ctl_merge.merging import Merge

Family = Mapping[str, Mapping[str, torch.Tensor]]
TWO = """
    name: first
    merge_method: linear
    dtype: bfloat16
    models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]
    ---
    merge_method: task_arithmetic
    base_model: base
    models: [{model: first, parameters: {weight: 0.5}}, {model: c, parameters: {weight: 0.25}}]
    """


@pytest.fixture
def family(tmp_path: Path) -> Family:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (64, CHUNK // 32), "model.layers.0.mlp.up_proj.weight": (12, 8)}
    made = {m: {n: torch.randn(s, generator=generator) for n, s in shapes.items()} for m in ("base", "a", "b", "c")}
    for model, tensors in made.items():
        write_checkpoint(tmp_path / model, tensors, {"dtype": "float32"})
    return made


def parse(text: str, folder: Path) -> ctl_merge.Recipe:
    return ctl_merge.parse_recipe(dedent(text), relative_to=folder)


def test_a_step_is_merged_when_it_is_read_and_not_rounded_in_between(family: Family, tmp_path: Path) -> None:
    merged = ctl_merge.open_merge(parse(TWO, tmp_path))
    base, a, b, c = ({n: t.double() for n, t in family[m].items()} for m in ("base", "a", "b", "c"))
    for name in base:
        first = (a[name] + 3 * b[name]) / 4
        wanted = base[name] + 0.5 * (first - base[name]) + 0.25 * (c[name] - base[name])
        torch.testing.assert_close(merged.read(name).double(), wanted, rtol=0, atol=1e-6)


def test_what_is_written_tells_of_the_steps_and_of_their_sources(family: Family, tmp_path: Path) -> None:
    out = ctl_merge.merge(parse(TWO, tmp_path), tmp_path / "out").folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "c", "out"]
    manifest = json.loads((out / "merge_manifest.json").read_text())
    assert [source["model"] for source in manifest["sources"]] == ["base", "a", "b", "c"]
    assert "first: written as BF16 (as asked for)" in manifest["decisions"]
    card = (out / "README.md").read_text()
    assert "| `a` | of a step |" in card and "| `c` | merged | 0.25 |" in card
    assert (out / "ctl_merge_recipe.yaml").read_text() == dedent(TWO)
    assert ctl_merge.load_recipe(out / "ctl_merge_recipe.yaml").steps.keys() == {"first"}


def test_the_plan_counts_what_the_steps_read_and_hold(family: Family, tmp_path: Path) -> None:
    opened = Merge(parse(TWO, tmp_path))
    summary = opened.summary()
    each = sum(tensor.nbytes for tensor in family["a"].values())
    assert summary["bytes"]["read"] == 4 * each and summary["bytes"]["write"] == each
    assert [(m["model"], m["role"]) for m in summary["models"]] == [
        ("base", "base"), ("first", "step"), ("c", "model")
    ]  # fmt: skip
    alone = Merge(parse(TWO.split("---")[0], tmp_path)).summary()
    assert summary["bytes"]["memory"] > alone["bytes"]["memory"]


def test_steps_of_steps_in_any_order_and_whole_tensors_in_between(family: Family, tmp_path: Path) -> None:
    text = """
        name: last
        merge_method: slerp
        base_model: middle
        models: [{model: middle}, {model: c}]
        parameters: {t: 0.25}
        ---
        name: inner
        merge_method: ties
        base_model: base
        models: [{model: a, parameters: {weight: 1, density: 0.5}}, {model: b, parameters: {weight: 1, density: 0.5}}]
        ---
        name: middle
        merge_method: slerp
        base_model: inner
        models: [{model: inner}, {model: a}]
        parameters: {t: 0.5}
        """
    merged = ctl_merge.open_merge(parse(text, tmp_path))
    ties, first, last = (document.strip("\n") for document in (text.split("---")[i] for i in (1, 2, 0)))
    written = {}
    for name, document in (("inner", ties), ("middle", first), ("end", last)):
        recipe = dedent(document).replace("name: ", "# ").replace("dtype", "#")
        written[name] = ctl_merge.merge(parse(f"{recipe}\ndtype: float64", tmp_path), tmp_path / name).folder
    end = ctl_merge.open_merge(parse("merge_method: passthrough\nmodels: [{model: end}]", tmp_path))
    for name in merged.tensors:
        torch.testing.assert_close(merged.read(name), end.read(name).float(), rtol=0, atol=0)


def test_a_step_may_be_named_by_the_folder_that_mergekit_leaves_it_in(family: Family, tmp_path: Path) -> None:
    plain, by_folder = (
        ctl_merge.open_merge(parse(text, tmp_path))
        for text in (TWO, TWO.replace("model: first", "model: ./intermediates/first"))
    )
    assert all(torch.equal(plain.read(name), by_folder.read(name)) for name in plain.tensors)


def test_partial_reads_of_a_step_are_the_whole_ones(family: Family, tmp_path: Path) -> None:
    text = TWO.replace("linear", "slerp").replace("dtype", "base_model: a\n    dtype")
    text = text.replace("parameters: {weight: 3}}]", "}]\n    parameters: {t: 0.5}").replace(
        "{model: a, parameters: {weight: 1}}", "{model: a}"
    )
    merged = ctl_merge.open_merge(parse(text, tmp_path))
    name = "model.embed_tokens.weight"
    whole, step = merged.read(name).view(-1), merged.block(name)
    for start in range(0, len(whole), step):
        piece = torch.empty(min(step, len(whole) - start))
        merged.read_into(name, piece, start)
        assert torch.equal(piece, whole[start : start + step])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TWO + "---\n    merge_method: linear\n", "more than one merge has no `name`"),
        (TWO.replace("---\n", "---\n    name: first\n"), "two merges are called 'first'"),
        (TWO.replace("---\n", "---\n    name: other\n").replace("first, ", "a, "), "no merge uses 'first', 'other'"),
        (TWO.replace("model: a,", "model: first,"), "the merge 'first' needs itself"),
        (TWO.replace("weight: 3", "wieght: 3"), "line 5: linear has no parameter 'wieght'"),
    ],
)
def test_wrong_files_are_refused(text: str, said: str, family: Family, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        parse(text, tmp_path)
