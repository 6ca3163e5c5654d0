"""`ctl-merge check`: recipes in words, and what mergekit does differently."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from typer.testing import CliRunner

from ctl_merge.check import check
from ctl_merge.cli import app
from ctl_merge.compatibility import METHODS, ROWS, differences, markdown
from ctl_merge.methods import registry

# The methods of mergekit 0.1.5, as its own registry lists them.
MERGEKIT = """
arcee_fusion breadcrumbs breadcrumbs_ties dare_linear dare_ties della della_linear karcher linear model_stock
multislerp nearswap nuslerp passthrough ram ramplus_tl sce slerp task_arithmetic ties
""".split()


def sections(folder: Path, text: str) -> dict[str, tuple[str, ...]]:
    path = folder / "recipe.yaml"
    path.write_text(dedent(text))
    found = check(path)
    assert found.problem is None
    return dict(found.sections)


def test_models_parameters_and_outcome_are_told(tmp_path: Path) -> None:
    found = sections(
        tmp_path,
        """
        merge_method: ties
        base_model: org/base
        models:
          - {model: org/a, parameters: {weight: [0.25, 1], density: [{filter: mlp, value: 0.5}, {value: 0.75}]}}
          - {model: org/b, parameters: {weight: 0.5}}
        parameters: {lambda: 1.5, density: 1.0}
        dtype: bfloat16
        """,
    )
    assert found["ties"][1:] == (
        "task vectors are differences from org/base",
        "lambda 1.5",
        "left at their defaults: normalize true, rescale false, trim tensor, elect weighted, divide weights",
    )
    assert found["what goes in"] == (
        "org/a: weight 0.25 → 1 over the layers, density 0.5 in *mlp*, else 0.75",
        "org/b: weight 0.5, density 1",
    )
    assert found["what comes out"] == (
        "dtype: bfloat16; arithmetic is float64, rounded once",
        "config of org/base",
        "tokenizer: org/base's; an error where vocabularies differ",
    )
    differing = found["against mergekit 0.1.5"]
    assert any(line.startswith("`ties`, more exact: all entries that equal the cut") for line in differing)


def test_slices_modules_and_steps_have_sections_of_their_own(tmp_path: Path) -> None:
    found = sections(
        tmp_path,
        """
        name: inner
        merge_method: linear
        models: [{model: org/a, parameters: {weight: 1}}, {model: org/b, parameters: {weight: 1}}]
        ---
        merge_method: passthrough
        slices:
          - sources: [{model: inner, layer_range: [0, 8]}]
          - sources: [{model: org/c, layer_range: [7, 8]}]
        """,
    )
    assert found["step inner: what goes in"] == ("org/a: weight 1", "org/b: weight 1")
    assert found["layers"] == ("0 to 7: step inner, layers 0 to 7", "8: org/c, layer 7")
    assert "9 layers" in found["what comes out"]


def test_slices_of_several_models_tell_the_layers_of_the_output(tmp_path: Path) -> None:
    found = sections(
        tmp_path,
        """
        merge_method: slerp
        base_model: org/a
        parameters: {t: 0.5}
        modules:
          text_decoder:
            slices:
              - sources: [{model: org/a, layer_range: [0, 2]}, {model: org/b, layer_range: [4, 6]}]
              - sources: [{model: org/a, layer_range: [0, 1]}, {model: org/b, layer_range: [0, 1]}]
                parameters: {t: 0.25}
          vision_tower: {models: [{model: org/a}, {model: org/b}]}
        """,
    )
    assert found["layers 0 to 1 of text_decoder"] == ("org/a, layers 0 to 1, the base", "org/b, layers 4 to 5")
    assert found["layer 2 of text_decoder"] == ("org/a, layer 0, the base", "org/b, layer 0", "t 0.25")
    assert found["module vision_tower"] == ("org/a, the base", "org/b")


def test_experts_their_prompts_and_the_gates_are_told(tmp_path: Path) -> None:
    found = sections(
        tmp_path,
        """
        base_model: org/base
        gate_mode: hidden_avg
        experts:
          - {source_model: org/a, positive_prompts: [x, y], negative_prompts: [z], noise_scale: 0.125}
          - {source_model: org/b, positive_prompts: [u], residual_scale: 0.5}
        shared_experts: [{source_model: org/c, positive_prompts: [v]}]
        """,
    )
    assert found["experts"] == (
        "0: org/a: 2 positive prompts, 1 negative prompt, noise of standard deviation 0.125",
        "1: org/b: 1 positive prompt, output times 0.5",
    )
    assert found["used for every token"] == ("org/c: 1 positive prompt",)
    assert "the first architecture that fits: 2 experts, 2 for each token" in found["what comes out"]
    assert any("averaged over the tokens of 5 prompts" in line for line in found["what comes out"])
    assert any(line.startswith("`gate_mode: hidden_avg`") for line in found["against mergekit 0.1.5"])
    assert not any("`dtype`" in line for line in found["against mergekit 0.1.5"])


def test_vocabulary_template_adapter_and_texts_are_told(tmp_path: Path) -> None:
    (tmp_path / "math.txt").write_text("1 + 1 = 2")
    found = sections(
        tmp_path,
        """
        merge_method: linear
        models: [{model: org/a+org/lora, parameters: {weight: 1}}, {model: org/b, parameters: {weight: 1}}]
        chat_template: llama3
        tokenizer:
          source: union
          pad_to_multiple_of: 64
          tokens:
            <a>: {source: {kind: zero}, force: true}
            <b>: {source: {kind: model_token, model: org/b, token: <c>}}
            <d>: {source: org/b}
        """,
    )
    assert found["what goes in"][0] == "org/a with the adapter org/lora: weight 1"
    assert found["what comes out"][2:] == (
        "tokenizer: org/a+org/lora's, with the tokens that only others have",
        "row of '<a>': zeros, in every model",
        "row of '<b>': row of '<c>' of org/b, in models that lack it",
        "row of '<d>': row of org/b, in models that lack it",
        "rows of the embedding: the tokens, rounded up to a multiple of 64",
        "chat template: llama3",
    )
    apart = " ".join(found["against mergekit 0.1.5"])
    assert "adapters" in apart and "`chat_template` by name" in apart and "padding" not in apart


def test_a_config_that_is_refused_is_explained_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "slerp.yaml"
    path.write_text(
        "merge_method: slerp\nbase_model: org/a\nmodels:\n"
        "  - {model: org/a, parameters: {t: 0.5}}\n  - {model: org/b, revision: x}\n"
    )
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 2
    assert "line 4: 't' is shared by all models" in result.stderr
    told = " ".join(result.stdout.split())
    assert "shared parameters (`t`, `lambda`, …) under a model, refused: mergekit does not read them there" in told
    assert "`revision` beside a model, refused" in told


def test_nothing_is_asked_of_the_network_or_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert "linear" in sections(
        tmp_path, "merge_method: linear\nmodels: [{model: nobody/nothing, parameters: {weight: 1}}]\n"
    )


def test_the_texts_on_which_models_are_measured_are_told(tmp_path: Path) -> None:
    found = sections(
        tmp_path,
        """
        merge_method: lot
        base_model: org/base
        models:
          - {model: org/a, data: "math=org/set:question,answer@test"}
          - {model: org/b}
        data: {texts: "org/other:text", sequences: 8, length: 32, inputs: base}
        """,
    )
    assert "measured on 8 windows of 32 tokens of each text" in found["lot"]
    assert "what a layer reads is the base's activations" in found["lot"]
    assert [line.partition("measured on ")[2] for line in found["what goes in"]] == [
        "org/set:question,answer", "org/other:text",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("parameters that the method lacks", "{merge_method: sce, parameters: {normalize: true}}"),
        ("unknown keys", "{merge_method: sce, dype: float16}"),
        ("unknown keys", "{merge_method: linear, experts: []}"),
        ("unknown keys", "{merge_method: linear, models: [{model: a, wieght: 1}]}"),
        ("a method that needs a base, without one", "{merge_method: slerp}"),
        ("`residual_weight`", "{merge_method: linear, slices: [{residual_weight: 1}]}"),
        ("`modules`", "{merge_method: linear, modules: {}}"),
        ("several documents", "{merge_method: linear, name: x}"),
        ("`genome` (mergekit-evolve)", "{genome: {}}"),
        ("adapters (`model+adapter`, `lora`)", "{base_model: a, experts: [{source_model: b+c}]}"),
        ("adapters (`model+adapter`, `lora`)", "{merge_method: linear, models: [{model: {model: a, lora: b}}]}"),
        ("tokenizer files with `base` or a model", "{merge_method: linear, tokenizer_source: org/a}"),
        ("`tokenizer: tokens`", "{merge_method: linear, tokenizer: {tokens: {x: {source: y}}}}"),
        ("`rescale: true` of the same four", "{merge_method: dare_ties}"),
        ("random gates and noise", "{experts: [], gate_mode: uniform_random}"),
        ("DeepSeek MoE", "{experts: [], architecture: deepseek}"),
    ],
)
def test_what_concerns_a_document_is_listed(subject: str, text: str) -> None:
    assert subject in [row.subject for row in differences(yaml.safe_load(text))]
    without = [row.subject for row in differences({"merge_method": "linear", "base_model": "a", "models": []})]
    assert without == ["arithmetic"]


def test_what_does_not_concern_a_document_is_not_listed() -> None:
    kept = {"merge_method": "della", "base_model": "b", "models": [{"model": "a", "parameters": {"epsilon": 0.1}}]}
    listed = [row.subject for row in differences({**kept, "parameters": {"rescale": "l1"}})]
    assert listed == ["arithmetic", METHODS[2].subject, "ranks of `della`, `della_linear`"]


def test_every_method_has_one_row_or_rows_of_its_family() -> None:
    """Each method of mergekit's, and ours."""
    named = {name for row in METHODS for name in re.findall(r"`(\w+)`", row.subject)}
    assert set(MERGEKIT) <= named and set(MERGEKIT) <= set(registry())
    assert set(registry()) <= named | {"moe"}
    lacking = next(row for row in METHODS if "mergekit has none" in row.note)
    assert set(re.findall(r"`(\w+)`", lacking.subject)) >= set(registry()) - set(MERGEKIT)


def test_the_table_has_a_line_for_each_row() -> None:
    assert len(markdown(ROWS).splitlines()) == 2 + len(ROWS)
    assert len({row.subject for row in ROWS}) == len(ROWS)
