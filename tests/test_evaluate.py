"""Evaluation against independent references: transformers' own forward, definitions, enumeration."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import thread_ranks
import torch
from huggingface_hub import ModelCard
from struck_ranks import struck
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import ctl_merge
from ctl_merge.cli import app
from ctl_merge.errors import CheckpointError, DataError, NonFiniteError, OutputError
from ctl_merge.evaluating import answers, items, metrics
from ctl_merge.evaluating.batches import in_batches
from ctl_merge.evaluating.execution import run
from ctl_merge.evaluating.likelihood import predict
from ctl_merge.evaluating.measured import rows_of
from ctl_merge.evaluating.metrics import Measured, calibration_error, pass_at_k, wilson
from ctl_merge.evaluating.passages import Passage
from ctl_merge.evaluating.results import write_results
from ctl_merge.evaluating.table import render
from ctl_merge.probing.rows import DataSpec
from ctl_merge.processes import ALONE

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
from tasks import TASKS, examples  # noqa: E402

AVERAGE = QUICKSTART / "average.yaml"
BASE = str(QUICKSTART / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """cycle.jsonl and shift.jsonl: prompts with answers, choices and tests."""
    folder = tmp_path_factory.mktemp("data")
    for name, task in TASKS.items():
        rows = [
            {"prompt": e.prompt, "answer": e.answer, "choices": [" zzzz", e.answer, e.prompt[:3]], "right": 1}
            for e in examples(task, "held-out", 24, 5)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return ctl_merge.merge(AVERAGE, tmp_path_factory.mktemp("merge") / "average").folder


def value(found, model, name, metric):
    return found.of(model, name, metric)["value"]


def reference_nll(folder: Path, ids: torch.Tensor, counted: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    return -float(sum(logs[t - 1, ids[t]] for t in range(1, len(ids)) if counted[t]))


# Losses


def test_losses_of_passages_of_any_length_are_the_definition(written):
    generator = torch.Generator().manual_seed(0)
    passages = [
        Passage(torch.randint(3, 27, (n,), generator=generator), torch.arange(n) >= start)
        for n, start in ((9, 1), (4, 2), (17, 5), (2, 1))
    ]
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    found = predict({"a": model}, passages, batch=3)["a"]
    assert found.nll == pytest.approx([reference_nll(written, p.ids, p.counted) for p in passages], rel=1e-5)
    assert found.tokens == [8, 2, 12, 1]


def test_a_lazy_merge_is_evaluated_like_the_written_one(written):
    lazy = ctl_merge.evaluate(AVERAGE, sequences=4, length=24)
    stored = ctl_merge.evaluate(str(written), sequences=4, length=24)
    assert [row["value"] for row in lazy.rows] == pytest.approx([row["value"] for row in stored.rows], rel=1e-6)


def test_windows_have_the_losses_that_the_probe_finds():
    probed = ctl_merge.probe(AVERAGE, base=BASE, sequences=4, length=24)
    found = ctl_merge.evaluate(AVERAGE, base=BASE, sequences=4, length=24, parents=True)
    for name, own in probed.data["sets"].items():
        for model, merge in (("average", "merged"), ("cycle", "cycle"), ("shift", "shift")):
            assert value(found, model, name, "loss") == pytest.approx(own["losses"]["nll"][merge]["value"], rel=1e-5)


def test_streamed_models_give_the_same(written):
    whole, disk = (ctl_merge.evaluate(AVERAGE, sequences=2, length=16, device_map=d).rows for d in ("cpu", "disk"))
    assert [row["value"] for row in whole] == pytest.approx([row["value"] for row in disk], rel=1e-6)


def test_perplexity_is_the_exponential_and_intervals_hold_the_value():
    found = ctl_merge.evaluate(AVERAGE, sequences=6, length=24, calibration=True)
    for name in ("cycle", "shift"):
        assert value(found, "average", name, "perplexity") == pytest.approx(
            math.exp(value(found, "average", name, "loss"))
        )
    assert all(row["low"] <= row["value"] <= row["high"] for row in found.rows if row["metric"] != "calibration_error")


def test_a_masked_prompt_leaves_the_answers_loss(data, written):
    spec = f"cycle={data / 'cycle.jsonl'}:prompt,answer"
    found = ctl_merge.evaluate(str(written), spec, mask_prompt=True, sequences=3, length=64)
    tokenizer = AutoTokenizer.from_pretrained(written)
    nll, tokens = 0.0, 0
    for line in (data / "cycle.jsonl").read_text().splitlines()[:3]:
        row = json.loads(line)
        begin = tokenizer(row["prompt"] + "\n", add_special_tokens=True)["input_ids"]
        whole = [*begin, *tokenizer(row["answer"] + "\n\n", add_special_tokens=False)["input_ids"]]
        counted = torch.arange(len(whole)) >= len(begin)
        nll += reference_nll(written, torch.tensor(whole), counted)
        tokens += int(counted.sum())
    assert value(found, "average", "cycle", "loss") == pytest.approx(nll / tokens, rel=1e-5)


def test_a_merge_of_one_model_agrees_with_it_fully(tmp_path):
    recipe = ctl_merge.parse_recipe(
        f"merge_method: task_arithmetic\nbase_model: {QUICKSTART / 'base'}\n"
        f"models: [{{model: {QUICKSTART / 'cycle'}, parameters: {{weight: 1.0}}}}]"
    )
    found = ctl_merge.evaluate(recipe, sequences=2, length=16, parents=True)
    assert value(found, found.models[0], "cycle", "agreement:cycle") == 1
    assert value(found, found.models[0], "cycle", "kl:cycle") == pytest.approx(0, abs=1e-9)
    assert value(found, found.models[0], "cycle", "kl:base") > 0.01


# Metrics


def test_wilson_is_the_published_value():
    assert wilson(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0.0, 20)[0] == 0 and wilson(1.0, 20)[1] == 1


@pytest.mark.parametrize("samples,right", [(5, 0), (5, 2), (5, 5), (7, 1)])
def test_pass_at_k_is_the_chance_over_all_draws(samples, right):
    outcomes = [i < right for i in range(samples)]
    for k in range(1, samples + 1):
        drawn = [any(draw) for draw in itertools.combinations(outcomes, k)]
        assert pass_at_k(samples, right, k) == pytest.approx(sum(drawn) / len(drawn))
    with pytest.raises(ValueError):
        pass_at_k(samples, right, samples + 1)


METRIC_CASES = [  # by hand
    (metrics.TokenLoss, [2.0, 4.0], [1, 2], {}, {"loss": 2.0}),  # of tokens, not of sequences: (2 + 4) / (1 + 2)
    (metrics.Perplexity, [2.0, 4.0], [1, 2], {}, {"perplexity": 7.38905609893065}),  # e²
    (metrics.Agreement, [1.0, 4.0], [2, 8], {}, {"agreement": 0.5}),
    (metrics.Divergence, [1.0, 0.5], [1, 5], {}, {"kl": 0.25}),
    # so 0.9 and 0.95 are in one bin, one right: |1 - 1.85|; 0.1 in another, wrong: |0 - 0.1|; over three
    (metrics.CalibrationError, [0.9, 0.95, 0.1], [1, 0, 0], {"bins": 5}, {"calibration_error": 0.95 / 3}),
    (metrics.CalibrationError, [1.0], [1], {}, {"calibration_error": 0.0}),  # the last bin holds its end
    (metrics.ExactMatch, [" 5 ", "6"], ["5", "5"], {}, {"exact_match": 0.5}),  # space around does not count
    (metrics.ExactMatch, ["so 3\n#### 7", "5"], ["#### 7", "6"], {}, {"exact_match": 0.0}),
    # an answer without a match is not right
    (metrics.ExactMatch, ["3\n#### 7", "x"], ["#### 7", "x"], {"pattern": r"#### (\d+)"}, {"exact_match": 0.5}),
    (metrics.ChoiceAccuracy, [0, 1, 2, 1], [0, 1, 1, 1], {}, {"accuracy": 0.75}),
    (metrics.ChoiceAccuracyPerCharacter, [0, 1], [1, 0], {}, {"accuracy_per_character": 0.0}),
    (metrics.PassAtK, [1, 0], [2, 2], {"k": 1}, {"pass@1": 0.25}),
    (metrics.PassAtK, [1, 2], [4, 4], {"k": 2}, {"pass@2": (3 / 6 + 5 / 6) / 2}),  # of six pairs 3, and 5, hold one
]


@pytest.mark.parametrize("metric,predictions,references,how,expected", METRIC_CASES)
def test_metrics_of_evaluate_compute_what_they_say(metric, predictions, references, how, expected):
    found = metric().compute(predictions=predictions, references=references, **how)
    interval = found.pop("interval", None)
    assert found == pytest.approx(expected)
    share = metric.kind.share and metric is not metrics.PassAtK
    assert interval == (wilson(*found.values(), len(references)) if share else None)


def test_every_metric_has_a_hand_worked_case():
    assert {case[0] for case in METRIC_CASES} == {*metrics.METRICS.values(), metrics.PassAtK}


def test_rows_are_what_the_metrics_compute(data, written):
    """The verb's figures, recomputed by `compute` from what it wrote and predicted."""
    specs = {kind: [f"{kind}={data / 'cycle.jsonl'}:prompt,{columns}"]
             for kind, columns in (("match", "answer"), ("choice", "choices,right"))}  # fmt: skip
    found = ctl_merge.evaluate(str(written), **specs, join="", stop=("\n",), items=6, max_new_tokens=16)
    answers = found.answers["average"]["match"]
    own = metrics.ExactMatch().compute(
        predictions=[a["answer"] for a in answers], references=[a["wanted"] for a in answers]
    )
    row = found.of("average", "match", "exact_match")
    assert (row["value"], (row["low"], row["high"])) == (own["exact_match"], own["interval"])
    assert [a["right"] for a in answers] == [a["answer"].strip() == a["wanted"].strip() for a in answers]


def test_calibration_of_a_model_is_that_of_its_tokens(written):
    passages = [Passage(torch.randint(3, 27, (20,)), torch.arange(20) > 0) for _ in range(3)]
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    found = predict({"a": model}, passages, calibration=True)["a"]
    measured = metrics.CalibrationError.of_bins(found.bins)
    ids = torch.stack([p.ids for p in passages])
    with torch.no_grad():
        confidence, top = model(input_ids=ids).logits[:, :-1].double().softmax(-1).max(-1)
    right = (top == ids[:, 1:]).int().flatten().tolist()
    expected = metrics.CalibrationError().compute(predictions=confidence.flatten().tolist(), references=right)

    assert calibration_error(measured.numerator.sum(0)) == pytest.approx(expected["calibration_error"], abs=1e-6)


def test_rows_have_paired_differences_and_the_worst_task():
    one = {"a": {"loss": Measured.of([2.0, 4.0], [2, 2])}, "b": {"loss": Measured.of([3.0, 3.0], [1, 1])}}
    two = {"a": {"loss": Measured.of([4.0, 6.0], [2, 2])}, "b": {"loss": Measured.of([1.0, 1.0], [1, 1])}}
    rows = {(r["model"], r["data"]): r for r in rows_of({"one": one, "two": two})}
    assert rows["one", "a"]["value"] == 1.5 and rows["two", "a"]["difference"] == 1.0
    assert rows["two", "a"]["difference_low"] == rows["two", "a"]["difference_high"] == 1.0  # paired: no spread
    assert rows["one", "mean"]["value"] == 2.25 and rows["one", "worst"]["value"] == 3.0
    assert rows["two", "worst"]["value"] == 2.5 and rows["two", "mean"]["difference"] == -0.5


# Answers, choices, programs


def test_experts_answer_their_own_task(data):
    specs = [f"{name}={data / name}.jsonl:prompt,answer" for name in TASKS]
    models = [str(QUICKSTART / "cycle"), str(AVERAGE)]
    found = ctl_merge.evaluate(models, match=specs, join="", stop=("\n",), max_new_tokens=16, batch=24)
    assert value(found, "cycle", "cycle", "exact_match") == 1 and value(found, "cycle", "shift", "exact_match") == 0
    assert value(found, "cycle", "worst", "exact_match") == 0 and value(found, "cycle", "mean", "exact_match") == 0.5
    assert value(found, "average", "cycle", "exact_match") > 0.9
    written = found.answers["cycle"]["cycle"][0]
    assert written["right"] and written["answer"].strip() == written["wanted"].strip()


def test_a_choice_is_the_likeliest_continuation(data, written):
    spec = f"shift={data / 'shift.jsonl'}:prompt,choices,right"
    found = ctl_merge.evaluate(str(written), choice=[spec], join="", items=6)
    tokenizer, right = AutoTokenizer.from_pretrained(written), []
    for choice in items.choices(DataSpec.parse(spec), 6, ""):
        begin = tokenizer(choice.prompt)["input_ids"]
        nll = []
        for text in choice.choices:
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            counted = torch.arange(len(begin) + len(own)) >= len(begin)
            nll.append(reference_nll(written, torch.tensor([*begin, *own]), counted))
        right.append(nll.index(min(nll)) == choice.right)
    assert value(found, "average", "shift", "accuracy") == pytest.approx(sum(right) / 6)


@pytest.mark.parametrize("right", [1, "1", "B", "two"])
def test_the_right_choice_is_a_number_a_letter_or_a_text(tmp_path, right):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"q": "a", "c": ["one", "two"], "r": right}))
    assert items.choices(DataSpec.parse(f"{path}:q,c,r"), 5)[0].right == 1


def test_labels_of_choices_come_before_letters(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"q": "a", "c": {"text": ["one", "two"], "label": ["1", "2"]}, "r": "1"}))
    assert items.choices(DataSpec.parse(f"{path}:q,c,r"), 5)[0].right == 0


PROGRAMS = {
    "assert 1 + 1 == 2": "",
    "assert False": "AssertionError",
    "raise SystemExit(0)": "SystemExit",
    "import os; os._exit(0)": "ended early",
    "def f(:": "SyntaxError",
    "x = 'a' * (1 << 33)": "MemoryError",
    "open('big', 'w').write('a' * (1 << 26))": "File too large",
    "while True: pass": "took more than 1 s",
    "import os\nif os.fork() == 0:\n    os.setsid()\n    import time\n    time.sleep(60)": "",
    "import os; assert 'HF_TOKEN' not in os.environ and os.listdir('.') == []": "",
    "import sys; assert sys.stdin.read() == ''": "",
}


@pytest.mark.parametrize("source", PROGRAMS)
def test_a_program_runs_under_limits(source, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    why = run(source, timeout=1.0 if "while" in source else 10.0, memory=512)
    assert PROGRAMS[source] in why and bool(why) == bool(PROGRAMS[source])


def test_programs_are_judged_by_their_tests(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    rows = [{"text": "add", "tests": ["assert add(1, 2) == 3"]}, {"text": "mul", "tests": ["assert mul(2, 2) == 5"]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    wrote = [
        ["```python\ndef add(a, b):\n    return a + b\n```\nDone.", "def add(a, b): return a"],
        ["def mul(a, b): return 4"] * 2,
    ]
    monkeypatch.setattr(answers, "generate", lambda *args, **how: wrote)
    found = ctl_merge.evaluate(
        str(QUICKSTART / "cycle"), code=[f"p={path}:text,tests"], samples=2, k=(1, 2), allow_code_execution=True
    )
    assert value(found, "cycle", "p", "pass@1") == 0.25 and value(found, "cycle", "p", "pass@2") == 0.5
    assert found.answers["cycle"]["p"][1]["failures"][0].startswith("AssertionError")


def test_several_samples_are_drawn_again_by_the_same_seed(data):
    how = {"match": [f"cycle={data / 'cycle.jsonl'}:prompt,answer"], "join": "", "items": 3, "max_new_tokens": 8}
    first, second = (ctl_merge.evaluate(str(QUICKSTART / "cycle"), **how).answers for _ in range(2))
    assert first == second


# Results


def test_results_go_into_the_card_beside_others(written):
    found = ctl_merge.evaluate(str(written), sequences=2, length=16)
    for _ in range(2):
        write_results(found, "average", written)
    card = ModelCard.load(written / "README.md")
    losses = [r for r in card.data.eval_results if r.metric_type == "loss"]
    assert [r.dataset_name for r in losses] == ["cycle", "shift"]
    assert losses[0].metric_value == pytest.approx(value(found, "average", "cycle", "loss"), abs=1e-6)
    assert "interval_95_low" in losses[0].metric_args and "merge" in card.data.tags
    other = ctl_merge.evaluate(str(written), sequences=3, length=16)
    write_results(other, "average", written)
    assert len(ModelCard.load(written / "README.md").data.eval_results) == len(card.data.eval_results)
    AutoModelForCausalLM.from_pretrained(written)


CARD = """---
license: apache-2.0
tags:
- merge
- mine
datasets: [gsm8k]
model-index:
- name: My Model
  results:
  - task: {type: text-generation}
    dataset: {type: gsm8k, name: GSM8K}
    metrics: [{type: acc, value: 0.5}]
widget:
- text: hello --- world
---
# Mine

---
ünïcode
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_card_of_someone_else_keeps_what_it_says(tmp_path, newline):
    (tmp_path / "README.md").write_text(CARD, "utf-8", newline=newline)
    found = ctl_merge.evaluate(str(QUICKSTART / "cycle"), sequences=2, length=16)
    write_results(found, "cycle", tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and card.data.tags == ["merge", "mine"]
    assert card.data.datasets == ["gsm8k"] and card.data.widget == [{"text": "hello --- world"}]
    assert card.data.model_name == "My Model" and card.text.strip() == "# Mine\n\n---\nünïcode"
    kept, *new = card.data.eval_results
    assert (kept.dataset_name, kept.metric_type, kept.metric_value) == ("GSM8K", "acc", 0.5)
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in new] == [
        (name, metric, round(value(found, "cycle", name, metric), 6))
        for name in ("cycle", "shift") for metric in ("loss", "perplexity")
    ]  # fmt: skip


def test_a_card_without_metadata_gets_some(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    found = ctl_merge.evaluate(str(QUICKSTART / "cycle"), sequences=2, length=16)
    write_results(found, "cycle", tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == tmp_path.name and len(card.data.eval_results) == 4 and "# Mine" in card.text


@pytest.mark.parametrize("front", ["tags: [", "just words", "- a list", "model-index: 5", "model-index: [{name: x}]"])
def test_metadata_that_cannot_be_read_is_left_alone(tmp_path, front):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Mine\n")
    found = ctl_merge.evaluate(str(QUICKSTART / "cycle"), sequences=2, length=16)
    with pytest.raises(OutputError, match="cannot be read"):
        write_results(found, "cycle", tmp_path)
    assert (tmp_path / "README.md").read_text() == f"---\n{front}\n---\n# Mine\n"


def test_a_card_that_is_not_there_is_said_before_anything_runs(tmp_path):
    found = ctl_merge.evaluate(str(QUICKSTART / "cycle"), sequences=2, length=16)
    with pytest.raises(OutputError, match="no card"):
        write_results(found, "cycle", tmp_path)


def test_paths_do_not_go_into_results(data, written):
    found = ctl_merge.evaluate(str(written), f"cycle={data / 'cycle.jsonl'}:prompt,answer", sequences=2, length=16)
    assert str(data) not in found.to_json() and found.sets == {"cycle": "cycle.jsonl"}


def test_tables_fit_the_terminal(data):
    from rich.console import Console

    found = ctl_merge.evaluate([str(AVERAGE)], base=BASE, sequences=3, length=16, parents=True, calibration=True)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(found))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100 and "worst" in text and "minus average" in text


MISTAKES = {
    "nowhere.yaml": "there is no file",
    f"{AVERAGE} --data x=nowhere.jsonl:a": "there is no file",
    f"{AVERAGE} --match x=%s/cycle.jsonl:prompt": "at least 2 columns",
    f"{AVERAGE} --match x=%s/cycle.jsonl:prompt,nothing": "has no column 'nothing'",
    f"{AVERAGE} --choice x=%s/cycle.jsonl:prompt,answer,right": "no list of choices",
    f"{AVERAGE} --code x=%s/cycle.jsonl:prompt,answer": "--allow-code-execution",
    f"{AVERAGE} --code x=%s/cycle.jsonl:prompt,answer --allow-code-execution --k 2": "--samples 2",
    f"{AVERAGE} --match x=%s/cycle.jsonl:prompt,answer --extract (": "no regular expression",
    f"{AVERAGE} --data x=%s/cycle.jsonl:answer --mask-prompt": "at least two columns",
    f"{AVERAGE} --data mean=%s/cycle.jsonl:answer": "cannot be called mean",
    f"{AVERAGE} --data x=%s/cycle.jsonl:answer --match x=%s/cycle.jsonl:prompt,answer": "several data sets",
    f"{AVERAGE} --match x=%s/cycle.jsonl:prompt,answer --chat": "no chat template",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_told(arguments, data):
    result = CliRunner().invoke(app, ["evaluate", *arguments.replace("%s", str(data)).split()])
    assert isinstance(result.exception, CheckpointError | DataError | OutputError)
    assert MISTAKES[arguments] in str(result.exception)


def test_the_harness_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["evaluate", str(AVERAGE), "--harness", "arc_easy"])
    assert isinstance(result.exception, DataError) and "pip install" in str(result.exception)


def test_the_harness_takes_a_lazy_merge(data, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data / 'cycle.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{right}}'\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    arguments = [
        "evaluate",
        str(AVERAGE),
        "--harness",
        "own",
        "--harness-path",
        str(tmp_path),
        "--items",
        "12",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    found = json.loads(result.stdout[result.stdout.index("{\n") :])
    row = next(row for row in found["rows"] if row["metric"] == "harness acc")
    assert row["value"] > 0.9 and row["low"] <= row["value"]


HOSTILE = {  # rows of a file -> what is said
    '{"q": "a", "c": ["", "b"], "r": 1}': "no token to be predicted",
    '{"q": "a", "c": ["b"], "r": 0}': "two at least",
    '{"q": "", "c": ["a", "b"], "r": 0}': "nothing to be predicted from",
    '{"q": "a", "c": ["' + "ab" * 60 + '", "b"], "r": 0}': "give a longer --length",
    '{"q": "a", "c": ["a", "b"]}': "has no column 'r'",
    '{"q": null, "c": ["a", "b"], "r": 0}': "no row without a null",
    "": "is empty",
}


@pytest.mark.parametrize("rows", HOSTILE)
def test_choices_that_cannot_be_judged_are_refused(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "opening", lambda tokenizer: [])  # a tokenizer that puts nothing before a text
    (tmp_path / "d.jsonl").write_text(rows)
    with pytest.raises(DataError, match=HOSTILE[rows]):
        ctl_merge.evaluate(BASE, choice=[f"{tmp_path / 'd.jsonl'}:q,c,r"], join="")


def test_a_model_that_predicts_no_numbers_is_named():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="x predicts no numbers"):
        predict({"x": model}, [Passage(torch.arange(3, 9), torch.arange(6) > 0)])


def test_rows_are_joined_and_ended_as_asked(tmp_path, written):
    """By hand: prompt, response and end as one text, of which the response and the end count."""
    (tmp_path / "d.jsonl").write_text('{"q": "shift: abc ->", "a": " bcd"}')
    found = ctl_merge.evaluate(str(written), f"x={tmp_path / 'd.jsonl'}:q,a", mask_prompt=True, join="", end="\n")
    ids = torch.tensor(AutoTokenizer.from_pretrained(written)("shift: abc -> bcd\n", add_special_tokens=True).input_ids)
    counted = torch.arange(len(ids)) >= len(ids) - len(" bcd\n")
    assert value(found, "average", "x", "loss") == pytest.approx(reference_nll(written, ids, counted) / 5, rel=1e-5)


# ---- by several ranks


@pytest.mark.parametrize("count", [2, 3, 9])
def test_ranks_find_to_the_bit_what_one_process_finds(written, count):
    model = AutoModelForCausalLM.from_pretrained(written).eval()
    generator = torch.Generator().manual_seed(3)
    passages = [
        Passage(torch.randint(0, 20, (n,), generator=generator), torch.arange(n) > 0) for n in (9, 4, 12, 4, 7, 5, 11)
    ]

    def work(ranks):
        return predict({"": model}, passages, 2, calibration=True, ranks=ranks)[""]

    expected = work(ALONE)
    for found in thread_ranks.run(count, work):
        assert (found.nll, found.tokens) == (expected.nll, expected.tokens)
        assert all((a == b).all() for a, b in zip(found.bins, expected.bins, strict=True))


def test_what_fails_for_one_rank_is_raised_by_all():
    def work(ranks):
        def fail(rows):
            if 3 in rows:
                raise DataError("the fourth item is bad")
            return rows

        return in_batches([1] * 5, 1, ranks, fail)

    errors = thread_ranks.run(3, work)
    assert all(isinstance(error, DataError) and "the fourth item is bad" in str(error) for error in errors)


def by_ranks(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ctl_merge", "evaluate"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.launchers
def test_torchrun_evaluates_and_finds_the_same(data, tmp_path, ctl):
    spec = f"cycle={data / 'cycle.jsonl'}:prompt,answer"
    arguments = [str(AVERAGE), "--base", BASE, "--data", spec, "--match", spec.replace("cycle=", "asked="),
                 "--items", "13", "--sequences", "11", "--length", "24", "--batch", "4", "--parents"]  # fmt: skip
    arguments.append("--calibration")
    alone = ctl("evaluate", *arguments, "-o", tmp_path / "one.json")
    assert alone.code == 0, alone.err
    done = by_ranks([*arguments, "-o", str(tmp_path / "two.json")])
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.out
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()


@pytest.mark.launchers
def test_a_mistake_is_said_once_by_all_ranks(tmp_path):
    done = by_ranks([str(tmp_path / "no-such-model")])
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and not (tmp_path / "no-such-model").exists()


@pytest.mark.launchers
def test_a_killed_rank_ends_an_evaluation_which_leaves_nothing(data, tmp_path):
    card = tmp_path / "cycle" / "README.md"
    shutil.copytree(QUICKSTART / "cycle", card.parent)
    card.write_text("# as it was\n")
    arguments = ["evaluate", str(card.parent), "--data", f"cycle={data / 'cycle.jsonl'}:prompt,answer", "--card"]
    arguments += ["--sequences", "20", "--length", "24", "--batch", "2", "-o", str(tmp_path / "found.json")]
    before = time.monotonic()
    code, said = struck(tmp_path, signal.SIGKILL, "ctl_merge.evaluating.likelihood:padded", arguments)
    assert code != 0 and "SIGKILL" in said and time.monotonic() - before < 90
    assert not list(tmp_path.glob("found*")) and card.read_text() == "# as it was\n"
