"""Unusual but honest inputs: merged right, or refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint
from torch import Tensor

import ctl_merge
from ctl_merge.errors import CtlMergeError

EQUAL = {"weight": 0.5}


def opened(tmp_path: Path, tensors: list[dict[str, Tensor]], **keys: str):
    """The average of checkpoints with these tensors."""
    folders = [write_checkpoint(tmp_path / f"model{i}", own) for i, own in enumerate(tensors)]
    return ctl_merge.open_merge(ctl_merge.parse_recipe(recipe_text("linear", [(f, EQUAL) for f in folders], **keys)))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_float64_models_are_merged(tmp_path: Path, dtype: str | None) -> None:
    one, two = torch.randn(2, 5, 3, dtype=torch.float64)
    merged = opened(tmp_path, [{"w": one}, {"w": two}], **({"dtype": dtype} if dtype else {})).read("w")
    torch.testing.assert_close(merged, ((one + two) / 2).to(merged.dtype), rtol=1e-7 if dtype else 1e-15, atol=1e-15)
    assert merged.dtype == (torch.float32 if dtype else torch.float64)


def test_a_learned_bias_that_is_named_like_a_mask_is_merged(tmp_path: Path) -> None:
    name = "pooler.attention.bias"
    merged = opened(tmp_path, [{name: torch.zeros(4)}, {name: torch.ones(4)}])
    assert torch.equal(merged.read(name), torch.full((4,), 0.5))


def test_a_scalar_bias_is_merged(tmp_path: Path) -> None:
    merged = opened(tmp_path, [{"logit_bias": torch.tensor(1.0)}, {"logit_bias": torch.tensor(3.0)}])
    assert merged.read("logit_bias") == 2.0


def test_a_tensor_that_only_the_index_knows_is_told(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", {"v": torch.ones(2), "w": torch.ones(2)}, shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lost"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(CtlMergeError, match="lost: download it again"):
        ctl_merge.open_merge(ctl_merge.parse_recipe(recipe_text("linear", [(folder, EQUAL)])))


def test_one_model_spelled_two_ways_is_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "a", {"w": torch.zeros(3)})
    write_checkpoint(tmp_path / "b", {"w": torch.ones(3)})
    text = "merge_method: task_arithmetic\nbase_model: ./a\nmodels: [{model: a}, {model: b, parameters: {weight: 1}}]\n"
    recipe = ctl_merge.parse_recipe(text + "parameters: {normalize: true}\n")
    assert [source.ref.text for source in recipe.models] == ["b"]
    assert torch.equal(ctl_merge.open_merge(recipe).read("w"), torch.ones(3))


def test_a_mask_of_dare_does_not_depend_on_how_the_folder_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "a", {"w": torch.zeros(500)})
    write_checkpoint(tmp_path / "b", {"w": torch.ones(500)})
    own = {"weight": 1.0, "density": 0.5}
    texts = [recipe_text("dare_linear", [(name, own)], "a") for name in ("b", "./b", str(tmp_path / "b"))]
    merged = [ctl_merge.open_merge(ctl_merge.parse_recipe(text)).read("w") for text in texts]
    assert torch.equal(merged[0], merged[1]) and torch.equal(merged[0], merged[2])


def test_weights_that_cancel_but_for_rounding_are_refused(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path / name, {"w": torch.ones(2)}) for name in "abc"]
    weights = [(folder, {"weight": w}) for folder, w in zip(folders, (0.1, 0.2, -0.3), strict=True)]
    with pytest.raises(CtlMergeError, match="sum to zero"):
        ctl_merge.open_merge(ctl_merge.parse_recipe(recipe_text("linear", weights)))


def test_configs_that_compute_otherwise_are_told(tmp_path: Path) -> None:
    configs = [{"model_type": "llama", "rope_theta": theta} for theta in (1e4, 5e5)]
    folders = [write_checkpoint(tmp_path / f"m{i}", {"w": torch.ones(2)}, config) for i, config in enumerate(configs)]
    merged = ctl_merge.open_merge(ctl_merge.parse_recipe(recipe_text("linear", [(f, EQUAL) for f in folders])))
    assert any("rope_theta (10000.0 and 500000.0)" in warning for warning in merged.plan.warnings)


def test_an_output_that_holds_an_input_is_refused(tmp_path: Path) -> None:
    inside = write_checkpoint(tmp_path / "runs" / "expert", {"w": torch.ones(2)})
    recipe = ctl_merge.parse_recipe(recipe_text("linear", [(inside, EQUAL)]))
    (tmp_path / "runs" / "merge_manifest.json").write_text("{}")
    with pytest.raises(CtlMergeError, match="holds, one of the models"):
        ctl_merge.merge(recipe, tmp_path / "runs", overwrite=True)
    assert inside.is_dir()


def test_a_number_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", {"w": torch.ones(2)})
    text = f"merge_method: passthrough\nmodels: [{{model: {folder}, parameters: {{scale: 1e-1}}}}]\n"
    assert ctl_merge.open_merge(ctl_merge.parse_recipe(text)).read("w").tolist() == pytest.approx([0.1, 0.1])


def test_a_parameter_beside_the_model_is_sent_below_parameters() -> None:
    with pytest.raises(CtlMergeError, match="'weight' is a parameter: write it under `parameters`"):
        ctl_merge.parse_recipe("merge_method: linear\nmodels: [{model: org/a, weight: 0.5}]")
