"""Tuning against independent references: finite differences, enumeration, the definition of a merge."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import thread_ranks
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ctl_merge
from ctl_merge.cli import app
from ctl_merge.dispatch import Placement
from ctl_merge.errors import DataError, NonFiniteError, OutputError, ProbeError, RecipeError
from ctl_merge.evaluating.evaluation import Evaluation
from ctl_merge.evaluating.measured import rows_of
from ctl_merge.evaluating.metrics import Measured
from ctl_merge.evaluating.passages import Passage
from ctl_merge.merging import Merge
from ctl_merge.probing import archive
from ctl_merge.processes import ALONE
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
needs_optuna = pytest.mark.skipif(not importlib.util.find_spec("optuna"), reason="Optuna is not installed")


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


def searched(writer, study, trials, ranks=ALONE, tried=None):
    from ctl_merge.probing.run import Running
    from ctl_merge.tuning.rivals import Trier
    from ctl_merge.tuning.search import search

    told = (lambda count: None) if tried is None else tried.append
    return search(writer, Trier(Running(), Path("/")), random_texts(1, 4), trials, study, 0, told, ranks)


def trials_of(study: Path) -> list[Any]:
    """What any program reads from a study's file: not through ours."""
    optuna = pytest.importorskip("optuna", reason="Optuna is not installed")
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    storage = JournalStorage(JournalFileBackend(str(study)))
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


@needs_optuna
def test_a_search_goes_on_with_its_study(writer, tmp_path):
    tried: list[int] = []
    study = tmp_path / "study.log"
    first = searched(writer, study, 2, tried=tried)
    assert len(tried) == 2 and "of 2: " in first.chosen
    again = searched(writer, study, 3, tried=tried)
    assert len(tried) == 3 and "of 3: " in again.chosen
    best = min(trials_of(study), key=lambda trial: (trial.value, trial.number))
    assert f"trial {best.number} of" in again.chosen
    fewer = searched(writer, study, 2, tried=tried)
    assert len(tried) == 3 and "of 3 (2 were asked for): " in fewer.chosen


@needs_optuna
@pytest.mark.parametrize("named", [True, False], ids=["a file", "no file"])
def test_ranks_share_the_trials_and_agree_on_the_best(named, writer, tmp_path, monkeypatch):
    from ctl_merge.tuning.rivals import Trier

    # transformers loads no two models at once in threads
    monkeypatch.setattr(Trier, "loss", lambda self, text, texts: zlib.crc32(text.encode()) / 2**32)
    study = tmp_path / "study.log" if named else None
    found = thread_ranks.run(2, lambda ranks: searched(writer, study, 3, ranks))
    assert found[0] == found[1] and "by 2 processes" in found[0].chosen
    count = int(re.search(r"of (\d+)", found[0].chosen)[1])
    assert 3 <= count <= 4
    if study:
        done = trials_of(study)
        assert len(done) == count and len({str(trial.params) for trial in done}) == count


@pytest.mark.launchers
@needs_optuna
def test_processes_of_their_own_share_a_study_and_draw_differently(writer, tmp_path):
    searched(writer, tmp_path / "study.log", 1)  # not both begin with the same
    script = tmp_path / "one.py"
    script.write_text(
        "import sys; from pathlib import Path; import test_tune; from ctl_merge.merging import Merge\n"
        "from ctl_merge.tuning.written import Writer\n"
        "recipe = Merge(test_tune.RECIPE).recipe\n"
        "own = Writer(recipe, recipe.base, [m.ref for m in recipe.models], Path('/'))\n"
        "test_tune.searched(own, Path(sys.argv[1]), 4)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "study.log")]
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    both = [subprocess.Popen(command, env=where, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.wait(300) == 0, process.stderr.read()
    done = trials_of(tmp_path / "study.log")
    assert 4 <= len(done) <= 5 and len({str(trial.params) for trial in done}) == len(done)


@needs_optuna
def test_a_killed_trial_does_not_count_and_does_not_block(writer, tmp_path):
    """A trial that runs for ever, a lock that is held for ever, and half a record: what a killed process leaves."""
    import optuna

    study = tmp_path / "study.log"
    searched(writer, study, 1)
    storage = optuna.storages.journal.JournalStorage(optuna.storages.journal.JournalFileBackend(str(study)))
    (name,) = optuna.get_all_study_names(storage)
    optuna.load_study(study_name=name, storage=storage).ask()
    with study.open("ab") as file:
        file.write(b'{"op_code":5,"worker_id":"x","stu')
    found = searched(writer, study, 3)
    states = [trial.state.name for trial in trials_of(study)]
    assert states == ["COMPLETE", "RUNNING", "COMPLETE", "COMPLETE"] and "of 3: " in found.chosen


@needs_optuna
def test_a_lock_of_a_killed_process_is_taken_over(writer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    searched(writer, Path("sub/study.log"), 1)
    (tmp_path / "sub" / "study.log.lock").symlink_to(tmp_path / "sub" / "study.log")
    clock = itertools.count(step=5.0)
    monkeypatch.setattr("optuna.storages.journal._file.time.monotonic", lambda: next(clock))
    assert "of 2: " in searched(writer, Path("sub/study.log"), 2).chosen


@needs_optuna
def test_equal_losses_are_the_earlier_trials(writer, tmp_path, monkeypatch):
    from ctl_merge.tuning.rivals import Trier

    monkeypatch.setattr(Trier, "loss", lambda self, text, texts: 1.0)
    assert searched(writer, tmp_path / "study.log", 4).chosen.startswith("trial 0 of 4: ")


@needs_optuna
def test_other_texts_of_the_same_size_are_another_study(writer):
    from ctl_merge.tuning.study import title_of

    assert title_of("x", random_texts(2)) == title_of("x", random_texts(2)) != title_of("x", random_texts(2, seed=1))
    with_prompts = {n: [Passage(p.ids, p.counted & (torch.arange(12) > 5)) for p in own]
                    for n, own in random_texts(2).items()}  # fmt: skip
    assert title_of("x", random_texts(2)) != title_of("x", with_prompts) != title_of("y", with_prompts)


@needs_optuna
def test_losses_that_are_no_numbers_are_the_worst(writer, tmp_path, monkeypatch):
    from ctl_merge.tuning.rivals import Trier

    values = iter([None, 2.0, None])

    def loss(self, text, texts):
        if (value := next(values, None)) is None:
            raise NonFiniteError("NaN")
        return value

    monkeypatch.setattr(Trier, "loss", loss)
    assert searched(writer, tmp_path / "study.log", 3).chosen.startswith("trial 1 of 3: ")
    with pytest.raises(NonFiniteError, match="all 2 trials"):
        searched(writer, None, 2)


@needs_optuna
@pytest.mark.parametrize("content,said", [
    (b"my notes", "no study of trials"), (b'{"op_code":0,"worker_id":"x"}\n', "lacks a key"),
    (b'{"op_code":0,"worker\n{}\n', "is damaged"), (None, "is a folder"),
])  # fmt: skip
def test_a_file_that_is_no_study_is_left_alone(content, said, writer, tmp_path):
    from ctl_merge.tuning.study import check_search

    path = tmp_path / "notes"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises((DataError, OutputError), match=said):
        check_search(path, ALONE)
        searched(writer, path, 1)
    assert content is None or path.read_bytes() == content


@needs_optuna
def test_ranks_with_different_texts_are_refused(writer, tmp_path):
    from ctl_merge.tuning.study import opened

    def work(ranks):
        with opened(tmp_path / "study.log", f"title {ranks.index}", 0, ranks):
            pass

    assert all("read different models or texts" in str(error) for error in thread_ranks.run(2, work))


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ctl_merge", "tune"]
    return subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


QUICK = ("--mask-prompt", "--sequences", 16, "--length", 32, "--level", "model", "--steps", 0, "--trials")


@pytest.mark.launchers
@needs_optuna
def test_torchrun_shares_the_trials(tmp_path):
    process = torchrun(RECIPE, *QUICK, 5, "--study", tmp_path / "study.log", "-o", tmp_path / "t.yaml")
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    done = trials_of(tmp_path / "study.log")
    assert 5 <= len(done) <= 6 and len({str(trial.params) for trial in done}) == len(done)
    assert f"of {len(done)}" in (tmp_path / "t.yaml").read_text() and "by 2 processes" in out
    assert out.count("what was tried") == 1
    assert ctl_merge.open_merge(tmp_path / "t.yaml").tensors


@pytest.mark.launchers
@needs_optuna
def test_a_rank_that_is_killed_ends_the_run_and_the_same_command_goes_on(tmp_path):
    import psutil

    study, arguments = tmp_path / "study.log", (RECIPE, *QUICK, 8, "--study", tmp_path / "study.log")
    process = torchrun(*arguments)
    until = time.monotonic() + 300
    while (study.read_text().count('"op_code":6') if study.exists() else 0) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True)
             if child.environ().get("RANK") == "1"]  # fmt: skip
    ranks[0].kill()
    assert process.wait(120) != 0
    before = [trial.state.name for trial in trials_of(study)]
    assert 1 <= before.count("COMPLETE") < 8
    again = torchrun(*arguments)
    out, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    after = [trial.state.name for trial in trials_of(study)]
    assert 8 <= after.count("COMPLETE") <= 9 and after[: len(before)].count("RUNNING") == before.count("RUNNING")
    assert "by 2 processes" in out


@pytest.mark.launchers
def test_tuning_without_trials_is_one_process_work():
    process = torchrun(RECIPE, "--steps", 1)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and errors.count("error: ") >= 1
    assert "tuning without --trials is the work of one process" in errors


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
