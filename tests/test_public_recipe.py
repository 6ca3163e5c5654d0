"""What others read of a recipe: no local path, and nothing else changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import write_checkpoint

import ctl_merge
from ctl_merge.card import build_card, with_results
from ctl_merge.local_paths import local_path, without_paths
from ctl_merge.merging import Merge
from ctl_merge.public_recipe import PublicRecipe
from ctl_merge.reference import ModelRef

ODD = [
    "plain",
    "two words",
    "pipe|`tick`",
    "<b>&amp;",
    "colon: 'x' # y",
    "名前é",
    "-dash",
    "{a,b}",
    'quo"te',
    "$x_y_*z*",
]


def model(folder: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    return write_checkpoint(folder, {"model.layers.0.mlp.w": torch.randn(4, 4, generator=generator)})


def public(text: str, place: Path) -> PublicRecipe:
    recipe = ctl_merge.parse_recipe(text, relative_to=place)
    return PublicRecipe.of(recipe, Merge(recipe).sources)


def test_paths_become_names_and_the_rest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    one, two = model(tmp_path / "home" / "me" / "one"), model(tmp_path / "secret" / "two")
    monkeypatch.chdir(model(tmp_path / "secret" / "here"))
    text = (
        f"# é 名: from {one} and ~/private/x, see https://example.org/a/b or 1/2\n"
        f"merge_method:   linear   # {two.parent}\n"
        f"models: [{{model: ~/one, parameters: {{weight: 1}}}}, {{model: '../two', parameters: {{weight: 1}}}},\n"
        f'  {{model: "{one}", parameters: {{weight: 1}}}},   {{model: ., parameters: {{weight: 2}}}}]\n# end'
    )
    assert public(text, Path.cwd()).text == (
        "# é 名: from one and x, see https://example.org/a/b or 1/2\n"
        "merge_method:   linear   # secret\n"
        "models: [{model: ./one, parameters: {weight: 1}}, {model: ./two, parameters: {weight: 1}},\n"
        "  {model: ./one, parameters: {weight: 1}},   {model: ./here, parameters: {weight: 2}}]\n# end"
    )


@pytest.mark.parametrize("name", ODD)
def test_any_name_reads_back_as_the_same_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "models" / name)
    text = yaml.safe_dump({"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1.0}}]})
    found = public(text, tmp_path)
    assert yaml.safe_load(found.text)["models"][0]["model"] == f"./{name}"
    monkeypatch.chdir(tmp_path / "models")
    assert Merge(ctl_merge.parse_recipe(found.text)).recipe.models[0].ref.folder == folder
    assert public(found.text, tmp_path).text == found.text  # once is enough


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [model(tmp_path / place / "final", seed) for seed, place in enumerate("abc")]
    models = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in folders]
    found = public(yaml.safe_dump({"merge_method": "linear", "models": models}), tmp_path)
    assert [m["model"] for m in yaml.safe_load(found.text)["models"]] == ["./final", "./2/final", "./3/final"]


def test_adapters_and_texts(tmp_path: Path) -> None:
    folder, text = model(tmp_path / "secret" / "one"), tmp_path / "secret" / "my text.jsonl"
    text.write_text('{"a": "b"}\n')
    recipe = {
        "merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1.0}}],
        "probe": {"data": [f"t={text}:a", "org/data:text@test"]},
    }  # fmt: skip
    found = yaml.safe_load(public(yaml.safe_dump(recipe), tmp_path).text)
    assert found["probe"]["data"] == ["t=./my text.jsonl:a", "org/data:text@test"]


def test_names_of_the_hub_and_other_words_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    text = "merge_method: linear\nmodels:\n- model: one\n  parameters: {weight: [{filter: a/b, value: 1}, 2]}\n"
    assert public(text, tmp_path).text == text


@pytest.mark.parametrize(
    ("text", "without", "first"),
    [
        ("see /tmp/none/at/all.", "see all.", None), ("~/x/y and", "y and", "~/x/y"), ("a/b and/or 1/2", None, None),
        ("https://huggingface.co/org/name", None, None), ("(/usr/bin)", "(bin)", "/usr/bin"), ("/", None, None),
        ("<b>x</b> </details>", None, None), ("'/usr/bin','x'", "'bin','x'", "/usr/bin"),
    ],
)  # fmt: skip
def test_paths_in_text(text: str, without: str | None, first: str | None) -> None:
    assert without_paths(text) == (text if without is None else without)
    assert local_path(text) == first


# ---- the card


def card_of(place: Path, names: list[str], attached: str = "", results: Any = ()) -> str:
    models = [
        {"model": str(model(place / str(i) / name, i)), "parameters": {"weight": 1.0}} for i, name in enumerate(names)
    ]
    recipe = ctl_merge.parse_recipe(yaml.safe_dump({"merge_method": "linear", "models": models}), relative_to=place)
    merge = Merge(recipe)
    manifest = merge.write(place / "title: <i>|`x`").manifest
    licences = dict.fromkeys(merge.sources)
    return build_card(
        merge.plan, manifest, licences, "title: <i>|`x`", PublicRecipe.of(recipe, merge.sources), attached, results
    )


def test_odd_names_break_neither_tables_nor_code(tmp_path: Path) -> None:
    from markdown_it import MarkdownIt

    card = card_of(tmp_path, ODD)
    assert str(tmp_path) not in card
    html = MarkdownIt("gfm-like", {"linkify": False}).render(card.split("---\n", 2)[2])
    rows = re.findall(r"<tr>\n(.*?)</tr>", html, re.DOTALL)
    assert [row.count("<td>") for row in rows[1:]] == [3] * len(ODD)
    from html import unescape

    cells = [unescape(re.search("<code>(.*?)</code>", row)[1]) for row in rows[1:]]  # type: ignore[index]
    assert cells == ODD
    assert "<h1>title: &lt;i&gt;|`x`</h1>" in html and "<b>" not in html
    assert html.count("<h2>") == 4


RESULTS = [
    {
        "task": {"type": "text-generation"}, "dataset": {"type": "gsm8k", "name": "GSM8K: test", "split": "test"},
        "metrics": [{"type": "loss", "value": 1.76, "name": "Loss, nats"}, {"type": "perplexity", "value": 5.81}],
    },
    {
        "task": {"type": "text-generation"}, "dataset": {"type": "mbpp", "name": "MBPP"},
        "metrics": [{"type": "loss", "value": 2.79}],
    },
]  # fmt: skip


def test_results_of_evaluations_stand_in_the_metadata(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card = card_of(tmp_path, ["a"], results=RESULTS)
    data = ModelCard(card).data
    assert data.model_name == "title: <i>|`x`"
    found = [(r.dataset_name, r.dataset_split, r.metric_type, r.metric_value, r.metric_name) for r in data.eval_results]
    assert found == [
        ("GSM8K: test", "test", "loss", 1.76, "Loss, nats"), ("GSM8K: test", "test", "perplexity", 5.81, None),
        ("MBPP", None, "loss", 2.79, None),
    ]  # fmt: skip
    index = yaml.safe_load(card.split("---\n", 2)[1])["model-index"]
    assert index[0]["results"][0] == RESULTS[0]
    plain = card_of(tmp_path / "plain", ["a"])
    assert with_results(plain, "title: <i>|`x`", RESULTS) == card
    assert with_results(card, "title: <i>|`x`", RESULTS) == card  # in place of those before
    with pytest.raises(KeyError):
        with_results(plain, "x", [{"task": {"type": "x"}}])


def test_a_folder_that_is_seen_from_elsewhere_is_told_by_its_name_alone(tmp_path: Path) -> None:
    folder = tmp_path / "org" / "base"
    folder.mkdir(parents=True)
    ref = ModelRef(str(folder), folder=folder)
    public = PublicRecipe("", {folder: "base"}, {ref.text: "base"})
    assert public.line(f"../..{folder}+adapter: LoRA; {folder} is read") == "base+adapter: LoRA; base is read"
