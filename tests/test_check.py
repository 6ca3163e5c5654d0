"""`ctl-merge check`: recipes in words, and what mergekit does differently."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from typer.testing import CliRunner

from ctl_merge.check import check
from ctl_merge.cli import app
from ctl_merge.compatibility import KEYS, METHODS, markdown


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
        "left at their defaults: normalize true, trim tensor, elect weighted, divide weights",
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
    assert any(line.startswith("`ties`: entries that equal the cut") for line in found["against mergekit 0.1.5"])


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
    assert found["slice 1"] == ("inner, layers 0 to 7",) and found["slice 2"] == ("org/c, layer 7",)
    assert "9 layers" in found["what comes out"]


def test_a_config_that_is_refused_is_explained_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "slerp.yaml"
    path.write_text(
        "merge_method: slerp\nbase_model: org/a\nmodels:\n"
        "  - {model: org/a, parameters: {t: 0.5}}\n  - {model: org/b, revision: x}\n"
    )
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 2
    assert "line 4: 't' is shared by all models" in result.stderr
    assert "mergekit does not read `t`" in result.stdout.replace("\n    ", " ")


def test_nothing_is_asked_of_the_network_or_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert "linear" in sections(
        tmp_path, "merge_method: linear\nmodels: [{model: nobody/nothing, parameters: {weight: 1}}]\n"
    )


def test_the_table_has_a_line_for_each_row() -> None:
    rows = (*KEYS, *METHODS)
    assert len(markdown(rows).splitlines()) == 2 + len(rows)
    assert len({row.subject for row in rows}) == len(rows)
