"""Probing as people do it: a recipe, a pair over α, a merge made elsewhere, models in memory, ranks, commands."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import ctl_merge
from ctl_merge.cli import app
from ctl_merge.errors import CtlMergeError, MismatchError, OutputError
from ctl_merge.merging import Merge
from ctl_merge.probing import api
from ctl_merge.probing.api import check_opened, probe_opened
from ctl_merge.probing.texts import default_texts
from ctl_merge.processes import Ranks

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
BASE, CYCLE, SHIFT = (str(QUICKSTART / name) for name in ("base", "cycle", "shift"))
SMALL = {"sequences": 4, "length": 24}
RECIPE = QUICKSTART / "task_arithmetic.yaml"


@pytest.fixture(scope="module")
def report() -> ctl_merge.ProbeReport:
    return ctl_merge.probe(RECIPE, patch=True, null=True, **SMALL)


def by_block(report: ctl_merge.ProbeReport, name: str, merge: str = "merged", **where: str) -> list:
    wanted = {"merge": merge, "part": "block", "set": "cycle", **where}
    return [row[name] for row in report.rows if all(row[key] == value for key, value in wanted.items())]


def loaded(path: str | Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_a_recipe_is_probed_without_being_written(report: ctl_merge.ProbeReport, tmp_path: Path) -> None:
    ratios = by_block(report, "nonlinearity")
    assert len(ratios) == 6 and all(0 < r < 3 for r in ratios)
    assert by_block(report, "effective_weight")[0] == pytest.approx({"cycle": 0.7, "shift": 0.7})
    assert report.data["merges"][0]["explained_weight"] == pytest.approx(1)
    assert not list(tmp_path.iterdir())


def test_every_block_has_what_the_report_promises(report: ctl_merge.ProbeReport) -> None:
    row = json.loads(report.to_json())["sets"]["shift"]["blocks"][-1]
    promised = "block nonlinearity cos coef cos_parents effective_weight effective_feature local propagated".split()
    assert all(row[name] is not None for name in promised)
    assert row["nonlinearity_low"] <= row["nonlinearity"] <= row["nonlinearity_high"]
    assert row["nonlinearity_null"] > 0


def test_the_patch_at_the_last_block_leaves_only_the_head(report: ctl_merge.ProbeReport) -> None:
    gains = report.data["sets"]["cycle"]["losses"]["merges"]["merged"]["patch"]
    assert list(gains) == [f"model.layers.{i}" for i in range(6)]
    assert all(np.isfinite(gain["value"]) for gain in gains.values())


def test_losses_split_exactly(report: ctl_merge.ProbeReport) -> None:
    losses = report.data["sets"]["cycle"]["losses"]
    merged = losses["merges"]["merged"]
    for parent in ("cycle", "shift"):
        gap = losses["nll"]["merged"]["value"] - losses["nll"][parent]["value"]
        split = merged["nonlinearity_cost"]["value"] + merged["dilution_cost"][parent]["value"]
        assert gap == pytest.approx(split, abs=1e-12)


def test_a_pair_is_swept_over_alpha() -> None:
    found = ctl_merge.probe_pair([CYCLE, SHIFT], BASE, alphas=[0.0, 0.5, 1.0], **SMALL)
    assert [entry["alpha"] for entry in found.data["merges"]] == [0.0, 0.5, 1.0]
    assert max(by_block(found, "nonlinearity", merge="α = 0.5")) > 0.1
    for end in ("α = 0", "α = 1"):  # the merge is a parent: no deviation, and 0 of the parents' disagreement
        assert max(by_block(found, "relative_deviation", merge=end)) < 1e-5


def test_a_merge_made_elsewhere_gives_the_same_numbers(report: ctl_merge.ProbeReport, tmp_path: Path) -> None:
    folder = ctl_merge.merge(RECIPE, tmp_path / "merged").folder
    (folder / "ctl_merge_recipe.yaml").unlink()
    found = ctl_merge.probe_merged(str(folder), [CYCLE, SHIFT], BASE, **SMALL)
    assert by_block(found, "nonlinearity") == pytest.approx(by_block(report, "nonlinearity"), rel=1e-3)
    with pytest.raises(CtlMergeError, match="--models"):
        ctl_merge.probe_merged(str(folder))


def test_parents_come_from_the_recipe_in_the_merges_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names local models without their paths: they are looked for here."""
    monkeypatch.chdir(Path(BASE).parent)
    recipe = f"merge_method: linear\nbase_model: {BASE}\nparameters: {{weight: 1.0}}\nmodels: [{{model: {CYCLE}}}]\n"
    folder = ctl_merge.merge(ctl_merge.parse_recipe(recipe), tmp_path / "merged").folder
    found = ctl_merge.probe_merged(str(folder), **SMALL)
    assert found.data["parents"] == ["cycle"]
    assert by_block(found, "effective_weight")[0] == pytest.approx({"cycle": 0.5}, abs=1e-6)


def test_models_in_memory_give_the_same_numbers_and_are_left_as_they_were(tmp_path: Path) -> None:
    folder = ctl_merge.merge(RECIPE, tmp_path / "merged").folder
    merged = loaded(folder)
    ids = torch.randint(3, 30, (4, 24), generator=torch.Generator().manual_seed(0))
    before = merged(ids).logits
    with ctl_merge.observing(
        loaded(BASE), {"cycle": loaded(CYCLE), "shift": loaded(SHIFT)}, {"merged": merged}
    ) as seen:
        seen.run(ids[:2])
        seen.run(ids[2:])
        found = seen.report()
    assert found.data["sets"]["input"]["sequences"] == 4
    assert by_block(found, "effective_weight", set="input")[0] == pytest.approx({"cycle": 0.7, "shift": 0.7}, abs=1e-4)
    assert torch.equal(merged(ids).logits, before)


@pytest.mark.parametrize("device_map", ["cpu", "disk"])
def test_a_merge_is_a_model_without_being_written(device_map: str, tmp_path: Path) -> None:
    folder = ctl_merge.merge(RECIPE, tmp_path / "merged").folder
    ids = torch.arange(3, 27).view(1, -1)
    assert torch.equal(ctl_merge.load_model(RECIPE, device_map)(ids).logits, loaded(folder)(ids).logits)


@dataclass(frozen=True)
class InTurn(Ranks):
    """Ranks that run one after the other, as models cannot be opened by several threads at once: the last has all."""

    parts: list[bytes] = field(default_factory=list)

    def together(self, step: Callable[[], Any]) -> Any:
        return step()

    def gather(self, value: Any) -> list[Any]:
        self.parts.append(pickle.dumps(value))  # as between processes
        if len(self.parts) < self.count:
            raise StopIteration
        return [pickle.loads(part) for part in self.parts]


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_share_the_batches_and_find_the_same(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three batches, four ranks leave one of them without work."""
    how = {"sequences": 5, "length": 24, "batch": 2}
    alone, parts = ctl_merge.probe(RECIPE, **how).to_json(), list[bytes]()
    for index in range(count):
        monkeypatch.setattr(api, "launched", lambda index=index: InTurn(index, count, parts=parts))
        with suppress(StopIteration) if index < count - 1 else nullcontext():
            found = ctl_merge.probe(RECIPE, **how)
    assert found.to_json() == alone


def test_the_report_is_saved_whole(report: ctl_merge.ProbeReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    assert json.loads((tmp_path / "probe.json").read_text())["format"] == 2
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert list((tmp_path / "figures").glob("*.svg"))
    with np.load(tmp_path / "statistics.npz", allow_pickle=False) as arrays:
        assert arrays["sets/cycle/model.layers.0/gram"].shape[0] == SMALL["sequences"]


def test_the_command_line_probes_and_the_card_tells(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.read_text().replace("model: ", f"model: {QUICKSTART}/").replace(": base", f": {BASE}")
                      + "probe: {sequences: 3, length: 16}\n")  # fmt: skip
    done = CliRunner().invoke(app, [str(recipe), "-o", str(tmp_path / "merged"), "--probe"])
    assert done.exit_code == 0, done.output
    assert "· Linearity: after the last block" in done.output and max(map(len, done.output.splitlines())) <= 100
    assert "## Probe: Cross-Task Linearity" in (tmp_path / "merged" / "README.md").read_text()
    assert json.loads((tmp_path / "merged" / "probe" / "probe.json").read_text())["settings"]["sequences"] == 3
    done = CliRunner().invoke(
        app, ["probe", "--models", CYCLE, SHIFT, "--base", BASE, "--sequences", "2", "--length", "16", "--json"]
    )
    assert done.exit_code == 0 and len(json.loads(done.stdout)["merges"]) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["probe", str(RECIPE), "--length", "100000"], "context"),
        (["probe", str(RECIPE), "--data", "nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["probe", str(RECIPE), "--blocks", "model.nothing"], "--blocks"),
        (["probe", "--models", CYCLE, "--base", BASE], "two models"),
    ],
)
def test_bad_input_is_told(arguments: list[str], message: str) -> None:
    with pytest.raises(CtlMergeError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CtlMergeError, match="too few"):
        ctl_merge.probe(RECIPE, [f"empty={tmp_path / 'empty.txt'}"], **SMALL)


def test_progress_is_told_to_its_end() -> None:
    seen: dict[str, list[int]] = {}

    @contextmanager
    def meter(what: str, total: int) -> Iterator[Callable[[int], object]]:
        seen[what] = [0, total]
        yield lambda count: seen[what].__setitem__(0, seen[what][0] + count)

    ctl_merge.probe(RECIPE, scaling=True, meter=meter, **SMALL)
    assert list(seen) == ["weights", "probing"]
    assert all(0 < done == total for done, total in seen.values())
    assert seen["probing"][1] == 3 * 2 * SMALL["sequences"]  # at three scales, on two sets
    ctl_merge.probe_pair([CYCLE, SHIFT], BASE, alphas=[0.5], meter=meter, **SMALL)
    assert seen["probing"] == [2 * SMALL["sequences"]] * 2


def test_data_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / name / "text.txt" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text("cycle: abcd -> dabc\n" * 50)
    with pytest.raises(CtlMergeError, match="several data sets are called text"):
        ctl_merge.probe(RECIPE, [str(path) for path in paths], **SMALL)
    found = ctl_merge.probe(RECIPE, [f"one={paths[0]}", str(paths[1])], **SMALL)
    assert list(found.data["sets"]) == ["one", "text"]


def test_special_tokens_are_asked_for_by_an_option() -> None:
    """A window's loss is then that of its own tokens after <bos>."""
    found = ctl_merge.probe(RECIPE, special_tokens=True, **SMALL)
    assert found.data["settings"]["special_tokens"] is True
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    own = tokenizer(default_texts()["cycle"], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.bos_token_id, *own[i : i + 23]] for i in range(0, 4 * 23, 23)])
    with torch.no_grad():
        expected = float(loaded(CYCLE)(ids, labels=ids).loss)
    assert found.data["sets"]["cycle"]["losses"]["nll"]["cycle"]["value"] == pytest.approx(expected, rel=1e-5)


def test_blame_by_block_adds_up(report: ctl_merge.ProbeReport) -> None:
    for found in report.data["sets"].values():
        merged = found["losses"]["merges"]["merged"]
        assert list(merged["blame"]) == [*merged["patch"], "logits"]
        total = sum(share["value"] for share in merged["blame"].values())
        assert total == pytest.approx(merged["nonlinearity_cost"]["value"], abs=1e-12)


def test_a_data_set_belongs_to_the_parent_that_was_trained_on_it(report: ctl_merge.ProbeReport) -> None:
    for name in ("cycle", "shift"):
        assert report.data["sets"][name]["best_parent"]["parent"] == name
        assert report.data["sets"][name]["best_parent"]["margin"]["low"] > 0


def test_a_probe_that_cannot_be_made_is_refused_before_a_weight_is_written(tmp_path: Path) -> None:
    models = "".join(f"  - {{model: {model}, parameters: {{weight: 0.5}}}}\n" for model in (CYCLE, SHIFT))
    stack = "".join(f"  - sources: [{{model: {m}, layer_range: [0, 4]}}]\n" for m in (CYCLE, SHIFT))
    average, based = f"merge_method: linear\nmodels:\n{models}", f"{{length: 16, sequences: 2, base: {BASE}"
    for text, message in {
        f"merge_method: passthrough\nslices:\n{stack}": "move layers",
        average: "names no base model.*probe: {base",
        f"{average}probe: {{base: {BASE}, length: 65}}": "context of 64",
        f"{average}probe: {{base: {BASE}, data: [nowhere.txt]}}": "there is no file",
        f"{average}probe: {based}, chat: true, data: [t={tmp_path}/chat.jsonl]}}": "no chat template",
    }.items():
        (tmp_path / "chat.jsonl").write_text('{"q": "one", "a": "two"}\n' * 20)
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(CtlMergeError, match=message):
            CliRunner().invoke(
                app, [str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--probe"], catch_exceptions=False
            )
        assert not list(tmp_path.glob("out*"))


def test_a_recipe_asks_for_what_the_command_has_options_for(tmp_path: Path) -> None:
    models = "".join(f"  - {{model: {model}, parameters: {{weight: 0.5}}}}\n" for model in (CYCLE, SHIFT))
    asked = "sequences: 2, length: 16, special_tokens: true, patch: true, null_vector: true, scaling: true"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge_method: linear\nmodels:\n{models}probe: {{base: {BASE}, {asked}}}\n")
    merged = Merge(path)
    check_opened(merged)
    by_section, by_option = (
        probe_opened(merged),
        ctl_merge.probe(
            path, base=BASE, sequences=2, length=16, special_tokens=True, patch=True, null=True, scaling=True
        ),
    )
    assert by_section.to_json() == by_option.to_json()
    row = by_section.rows[-1]
    assert row["nonlinearity_null"] > 0 and by_section.data["settings"]["special_tokens"] is True


def test_windows_are_as_long_as_a_short_context_unless_a_length_is_asked_for() -> None:
    assert ctl_merge.probe(RECIPE, sequences=2).data["settings"]["length"] == 64


def test_a_report_that_cannot_be_written_is_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is no folder"):
        CliRunner().invoke(app, ["probe", str(RECIPE), "-o", str(tmp_path / "file" / "x")], catch_exceptions=False)


def test_models_that_split_texts_in_other_places_are_refused(tmp_path: Path) -> None:
    """Same vocabulary, other merges: no id means another token, yet the models read other tokens."""
    shutil.copytree(SHIFT, tmp_path / "shift")
    tokens = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5}
    for folder, merges in ((BASE, [("a", "b"), ("b", "c")]), (str(tmp_path / "shift"), [("b", "c"), ("a", "b")])):
        own = Path(folder) if folder != BASE else tmp_path / "base"
        if folder == BASE:
            shutil.copytree(BASE, own)
        tokenizer = Tokenizer(BPE(tokens, merges, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(own)
    (tmp_path / "text.txt").write_text("aabca" * 40)
    how = {"data": str(tmp_path / "text.txt"), "sequences": 2, "length": 16}
    models = [str(tmp_path / "shift"), str(tmp_path / "base")]
    with pytest.raises(MismatchError, match="shift would read text as other.*…'a' 'bc' 'a'… where .*…'ab' 'c' 'a'…"):
        ctl_merge.probe_pair(models, models[1], **how)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: task_arithmetic\nbase_model: ./base\nmodels: [{model: ./shift, parameters: {weight: 1.0}}]\n"
        "tokenizer_source: base\n"
    )
    assert ctl_merge.probe(recipe, **how).data["sets"]["text"]["sequences"] == 2


def test_recipes_with_and_without_a_base_are_probed_together() -> None:
    """What names no base has that of the others, whichever comes first."""
    average, own = QUICKSTART / "average.yaml", QUICKSTART / "task_arithmetic.yaml"
    found = ctl_merge.probe([average, own], **SMALL)
    assert found.data["base"].endswith("base") and found.data["parents"] == ["cycle", "shift"]
    alone = ctl_merge.probe(average, base=BASE, **SMALL)
    assert by_block(found, "nonlinearity", "average") == pytest.approx(by_block(alone, "nonlinearity"), rel=1e-6)
    turned = ctl_merge.probe([own, average], base=BASE, **SMALL)
    assert by_block(turned, "cos", "average") == pytest.approx(by_block(found, "cos", "average"), rel=1e-6)


def test_recipes_over_other_models_are_named(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    one = f"models: [{{model: {CYCLE}, parameters: {{weight: 1.0}}}}]\n"
    other.write_text(f"merge_method: task_arithmetic\nbase_model: {BASE}\n{one}")
    with pytest.raises(CtlMergeError, match=r"have the same models: shift is not in both .*ties.yaml and .*other.yaml"):
        ctl_merge.probe([QUICKSTART / "ties.yaml", other], **SMALL)
    other.write_text(f"merge_method: task_arithmetic\nbase_model: {SHIFT}\n{one}")
    with pytest.raises(CtlMergeError, match="have one base, not"):
        ctl_merge.probe([QUICKSTART / "ties.yaml", other], **SMALL)
    with pytest.raises(CtlMergeError, match="names of their own"):
        ctl_merge.probe([QUICKSTART / "ties.yaml"] * 2, **SMALL)
