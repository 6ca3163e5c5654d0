"""Tuning against independent references: finite differences, enumeration, the definition of a merge."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ctl_merge
from ctl_merge.cli import app
from ctl_merge.dispatch import Placement
from ctl_merge.errors import DataError, ProbeError, RecipeError
from ctl_merge.evaluating.evaluation import Evaluation
from ctl_merge.evaluating.measured import rows_of
from ctl_merge.evaluating.metrics import Measured
from ctl_merge.evaluating.passages import Passage
from ctl_merge.merging import Merge
from ctl_merge.probing import archive
from ctl_merge.roles import roles
from ctl_merge.tuning.adjustable import Adjustable
from ctl_merge.tuning.closed_form import least_squares
from ctl_merge.tuning.descent import Bounds, descend
from ctl_merge.tuning.levels import LEVELS, groups
from ctl_merge.tuning.splits import split
from ctl_merge.tuning.tuned import TUNED, decide
from ctl_merge.tuning.written import Writer

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
RECIPE = QUICKSTART / "task_arithmetic.yaml"


def random_texts(count: int = 4, length: int = 12, seed: int = 0) -> dict[str, list[Passage]]:
    generator = torch.Generator().manual_seed(seed)
    counted = torch.arange(length) > 0
    return {
        name: [Passage(torch.randint(3, 27, (length,), generator=generator), counted) for _ in range(count)]
        for name in ("a", "b")
    }


@pytest.fixture(scope="module")
def opened() -> Merge:
    merge = Merge(RECIPE)
    merge.fetch()
    return merge


@pytest.fixture(scope="module")
def model(opened) -> Adjustable:
    root, parents = roles(opened, None)
    return Adjustable(root, parents, Placement())


@pytest.fixture(scope="module")
def writer(opened) -> Writer:
    root, parents = roles(opened, None)
    return Writer(opened.recipe, root.ref, [p.ref for p in parents.values()], Path("/"))


@pytest.mark.parametrize("level", LEVELS)
def test_the_slope_is_that_of_the_loss(model, level):
    texts, (listed, place) = random_texts(), model.places(level)
    c = np.random.default_rng(0).uniform(0.2, 0.8, (len(listed), 2))
    model.set(c, place)
    loss, slope = model.slope(texts, place, len(listed))
    assert loss == pytest.approx(model.loss(texts), rel=1e-5)
    for at in {(0, 0), (len(listed) // 2, 1), (len(listed) - 1, 0)}:
        losses = []
        for way in (1, -1):
            moved = c.copy()
            moved[at] += way * 1e-2
            model.set(moved, place)
            losses.append(model.loss(texts))
        assert slope[at] == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=0.02, abs=2e-4)


def test_levels_go_from_one_group_to_one_a_tensor(model):
    counts = [len(model.places(level)[0]) for level in LEVELS]
    assert counts[0] == 1 and counts == sorted(counts) and counts[-1] == len(model.parameters)
    names = [
        "model.embed.weight",
        "model.layers.1.mlp.up.weight",
        "model.layers.0.mlp.down.weight",
        "model.layers.0.norm",
    ]
    config = {"num_hidden_layers": 2}
    assert groups(names, config, "block") == {
        names[0]: names[0], names[1]: "model.layers.1.", names[2]: "model.layers.0.", names[3]: "model.layers.0."
    }  # fmt: skip
    assert groups(names, config, "part")[names[1]] == "model.layers.1.mlp."
    assert groups(names, config, "part")[names[3]] == names[3]


@pytest.mark.parametrize("level", LEVELS)
def test_a_written_recipe_is_the_merge_of_its_coefficients(model, writer, level):
    listed, place = model.places(level)
    c = np.random.default_rng(1).uniform(0, 1, (len(listed), 2)).round(4)
    tensors = model.tensors(c, place)
    text = writer.coefficients(tensors, groups(tensors, model.config, level))
    merged = ctl_merge.open_merge(ctl_merge.parse_recipe(text, relative_to=Path("/")))
    stored = [
        ctl_merge.open_merge(
            ctl_merge.parse_recipe(writer.method("task_arithmetic", {"weight": 0.0}), relative_to=Path("/"))
        )
    ]
    base, *experts = (
        AutoModelForCausalLM.from_pretrained(QUICKSTART / n, dtype=torch.float64).state_dict()
        for n in ("base", "cycle", "shift")
    )
    assert stored[0].tensors.keys() == merged.tensors.keys()
    for name, own in tensors.items():
        wanted = base[name] + sum(w * (e[name] - base[name]) for w, e in zip(own, experts, strict=True))
        torch.testing.assert_close(merged.read(name).double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_filter_that_another_name_contains_comes_after_it(writer):
    tensors = {"layers.0.w": [0.1, 0.2], "vision.layers.0.w": [0.3, 0.4], "head": [0.5, 0.6]}
    text = writer.coefficients(tensors, {name: name for name in tensors})
    assert text.index('"vision.layers.0.w", value: 0.3') < text.index('"layers.0.w", value: 0.1')


def test_what_holds_for_the_models_is_kept():
    recipe = ctl_merge.parse_recipe(
        f"merge_method: ties\nbase_model: {QUICKSTART / 'base'}\ndtype: bfloat16\nseed: 7\n"
        "parameters: {lambda: 0.5}\n"
        f"models: [{{model: {QUICKSTART / 'cycle'}, parameters: {{weight: 1, density: 0.5}}}}]"
    )
    own = Writer(recipe, recipe.base, [recipe.models[0].ref], Path("/"))
    again = ctl_merge.parse_recipe(own.method("task_arithmetic", {"weight": 0.25}), relative_to=Path("/"))
    assert (again.dtype, again.seed, again.method.name) == ("bfloat16", 7, "task_arithmetic")


def test_a_recipe_elsewhere_finds_its_models_by_relative_paths(tmp_path):
    (tmp_path / "models").symlink_to(QUICKSTART)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "merge_method: task_arithmetic\nbase_model: models/base\n"
        "models: [{model: models/cycle, parameters: {weight: 1}}]"
    )
    loaded = ctl_merge.load_recipe(recipe)
    place = tmp_path / "out" / "deep"
    place.mkdir(parents=True)
    own = Writer(loaded, loaded.base, [loaded.models[0].ref], place)
    (place / "t.yaml").write_text(own.method("task_arithmetic", {"weight": 0.5}))
    assert ctl_merge.open_merge(place / "t.yaml").tensors


def test_least_squares_with_and_without_bounds():
    generator = np.random.default_rng(0)
    for size, _ in itertools.product((2, 3), range(5)):
        root = generator.normal(size=(8, size))
        normal, right = root.T @ root, generator.normal(size=size) * 6
        strength = 0.1 * np.trace(normal) / size
        free = least_squares(normal, right, 0.1, 0.5)
        assert np.allclose((normal + strength * np.eye(size)) @ free, right + strength * 0.5)
        bounded = least_squares(normal, right, 0.1, 0.5, 0.0, 1.0)
        value = lambda c: c @ normal @ c / 2 - right @ c + strength * ((c - 0.5) ** 2).sum() / 2  # noqa: B023, E731
        grid = itertools.product(*[np.linspace(0, 1, 21)] * size)
        assert value(bounded) <= min(value(np.array(point)) for point in grid) + 1e-9
        assert ((bounded >= 0) & (bounded <= 1)).all()


def test_descent_lowers_the_loss_and_keeps_its_bounds(model):
    texts, validation = random_texts(6), random_texts(6, seed=1)
    _, place = model.places("model")
    start = model.tensors(np.full((1, 2), 0.5), place)
    model.set(np.full((1, 2), 0.5), place)
    before = model.loss(validation)
    found = descend(model, "block", start, texts, validation, Bounds(0.4, 0.7), steps=2)
    assert found.validation < before and found.coefficients.min() >= 0.4 and found.coefficients.max() <= 0.7
    model.set(found.coefficients, model.places("block")[1])
    assert model.loss(validation) == pytest.approx(found.validation, rel=1e-6)


def test_parts_share_no_sequence():
    texts = random_texts(16)
    for seed in range(3):
        found = split(texts, {}, seed)
        ids = [{id(p) for p in part["a"]} for part in (found.tuning, found.validation, found.held_out)]
        assert sum(map(len, ids)) == len(set.union(*ids)) == 16 and [len(i) for i in ids] == [6, 2, 8]
    other = random_texts(3, seed=2)
    assert split(texts, other, 0).held_out["a"] is other["a"]
    with pytest.raises(DataError, match="too few"):
        split(random_texts(6), {}, 0)
    with pytest.raises(DataError, match="same names"):
        split(texts, {"a": texts["a"]}, 0)


@pytest.mark.parametrize("better,spread,chosen,said", [
    (0.5, 0.0, TUNED, "beats the best"), (0.01, 1.0, "ties", "not better beyond doubt"),
    (-0.5, 0.0, "ties", "does not beat the best"),
])  # fmt: skip
def test_the_verdict_follows_the_paired_interval(better, spread, chosen, said):
    noise = spread * np.array([1, -1] * 8)
    losses = {TUNED: 2 + 0 * noise, "ties": 2 + better + noise, "average": 4 + 0 * noise}
    table = {m: {"a": {"loss": Measured.of(v)}, "b": {"loss": Measured.of(v)}} for m, v in losses.items()}
    recommended, verdict = decide(Evaluation(rows_of(table), {"a": "a", "b": "b"}))
    assert recommended == chosen and said in verdict


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    from ctl_merge.probing.texts import default_texts

    folder = tmp_path_factory.mktemp("texts")
    for name, text in default_texts(200).items():
        rows = (line.partition(" -> ") for line in text.splitlines())
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"q": f"{q} ->", "a": a}) for q, _, a in rows))
    return folder


@pytest.fixture(scope="module")
def tuned(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    specs = [f"{name}={texts / name}.jsonl:q,a" for name in ("cycle", "shift")]
    found = ctl_merge.tune(
        RECIPE, specs, sequences=16, length=32, level="block", steps=1, folder=out, rows=True, probe=True
    )
    found.save(out / "tuned.yaml")
    found.save_report(out / "report")
    return found, out


def test_the_saved_recipe_alone_is_what_was_measured(tuned):
    found, out = tuned
    assert found.recommended in found.recipes and found.verdict in (out / "tuned.yaml").read_text()
    again = ctl_merge.load_recipe(out / "tuned.yaml")
    alone = ctl_merge.open_merge(again)
    measured = ctl_merge.open_merge(ctl_merge.parse_recipe(found.recipes[found.recommended], relative_to=out))
    assert all(torch.equal(alone.read(name), measured.read(name)) for name in alone.tensors)


def test_everything_is_compared_on_held_out_text(tuned):
    found, _ = tuned
    assert {TUNED, "average", "task arithmetic", "ties", "task_arithmetic", "cycle", "shift", "base"} == set(
        found.evaluation.models
    )
    assert found.evaluation.of(TUNED, "mean", "loss") and found.evaluation.of("ties", "worst", "loss")["difference"]
    assert {each["how"].split(" ")[0] for each in found.candidates} == {"one", "least", "descent"}
    assert json.loads(found.to_json())["recommended"] == found.recommended


def test_the_page_tells_what_was_lost_and_what_came_back(tuned):
    from ctl_merge.probing.schema import Report

    _, out = tuned
    page = (out / "report" / "report.html").read_text()
    for word in ("Lost:", "Where:", "Why:", "Changed:", "Came back:", 'id="held_out"', 'id="tuned_coefficients"'):
        assert word in page
    Report.model_validate_json((out / "report" / "probe.json").read_text())
    assert (out / "report" / "figures" / "held_out.svg").is_file()


def test_the_report_of_a_tuned_merge_comes_back_whole(tuned, tmp_path):
    found, out = tuned
    again = ctl_merge.ProbeReport.load(out / "report")
    assert again.data["merges"][1]["name"] == TUNED
    assert again.to_json() == (out / "report" / "probe.json").read_text()
    assert again.data["tuning"] == json.loads(found.to_json())
    again.save(tmp_path)
    assert (tmp_path / "report.html").read_text() == (out / "report" / "report.html").read_text()


@pytest.mark.parametrize("key", ["verdict", "evaluation", "coefficients"])
def test_a_damaged_account_of_tuning_is_refused(tuned, tmp_path, key):
    report = ctl_merge.ProbeReport.load(tuned[1] / "report")
    del report.statistics.tuning[key]
    archive.save(report.statistics, tmp_path / archive.FILE)
    with pytest.raises(ProbeError, match="damaged"):
        ctl_merge.ProbeReport.load(tmp_path)


def test_a_search_goes_on_with_its_study(opened, writer, tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed")
    from ctl_merge.probing.run import Running
    from ctl_merge.tuning.rivals import Trier
    from ctl_merge.tuning.search import search

    tried: list[int] = []
    trier, study = Trier(Running(), Path("/")), tmp_path / "study.log"
    first = search(writer, trier, random_texts(2), 2, study, "x", 0, tried.append)
    assert len(tried) == 2
    again = search(writer, trier, random_texts(2), 3, study, "x", 0, tried.append)
    assert len(tried) == 3 and trier.loss(again.text, random_texts(2)) <= trier.loss(first.text, random_texts(2))


STEPS = """name: a
merge_method: linear
models: [{model: %s, parameters: {weight: 1}}]
---
merge_method: linear
models: [{model: a, parameters: {weight: 1}}]
"""


def test_several_steps_are_refused(texts):
    recipe = ctl_merge.parse_recipe(STEPS % (QUICKSTART / "cycle"))
    with pytest.raises(RecipeError, match="only a recipe of whole models"):
        ctl_merge.tune(recipe, f"cycle={texts / 'cycle.jsonl'}:q,a", base=str(QUICKSTART / "base"))


MISTAKES = {
    "--data c=%s/cycle.jsonl:q,a --level head": "it is one of model, block, part, tensor",
    "--data c=%s/cycle.jsonl:q,a --least 1 --most 0.5": "not above the least",
    "--data c=%s/nothing.jsonl:q,a": "there is no file",
    "--data c=%s/cycle.jsonl:q,a --held-out d=%s/cycle.jsonl:q,a --length 16": "same names",
    "--data c=%s/cycle.jsonl:q,a --device-map disk": "whole on one device",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_told(arguments, texts):
    result = CliRunner().invoke(app, ["tune", str(RECIPE), *arguments.replace("%s", str(texts)).split()])
    assert result.exception and MISTAKES[arguments] in str(result.exception)


def test_a_search_without_optuna_says_how_to_install_it(monkeypatch, texts):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["tune", str(RECIPE), "--data", f"c={texts / 'cycle.jsonl'}:q,a", "--trials", "2"])
    assert isinstance(result.exception, DataError) and "ctl-merge[tune]" in str(result.exception)
