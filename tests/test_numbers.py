"""Numbers that go wrong are found and named, and the manifest states what was done with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint

from ctl_merge.errors import NonFiniteError
from ctl_merge.merging import Merge
from ctl_merge.recipe_file import parse_recipe

W = "model.layers.0.w"
SVD = ["tsv", "iso_c", "iso_cts", "knots", "wudi"]


def opened(tmp_path: Path, method: str, base: torch.Tensor, *others: torch.Tensor, **keys: object) -> Merge:
    folders = [write_checkpoint(tmp_path / f"m{i}", {W: tensor}) for i, tensor in enumerate((base, *others))]
    models = [(folder, {"weight": 1.0} if method == "task_arithmetic" else {}) for folder in folders[1:]]
    return Merge(parse_recipe(recipe_text(method, models, base=folders[0], **keys)))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", SVD)
def test_task_vectors_of_zeros_leave_the_base(tmp_path: Path, method: str) -> None:
    base = torch.arange(16.0).reshape(4, 4)
    assert torch.equal(opened(tmp_path, method, base, base, base).merged.read(W).view(4, 4).float(), base)


@pytest.mark.parametrize("method", SVD)
def test_task_vectors_of_one_rank_give_numbers(tmp_path: Path, method: str) -> None:
    base, one = torch.zeros(4, 4), torch.outer(torch.arange(4.0), torch.ones(4))
    found = opened(tmp_path, method, base, one, one).merged.read(W)
    assert torch.isfinite(found).all() and found.abs().max() > 0


def test_a_decomposition_that_does_not_converge_names_the_tensor_and_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("failed to converge")

    merge = opened(tmp_path, "tsv", torch.zeros(4, 4), torch.eye(4), torch.ones(4, 4))
    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(NonFiniteError, match=rf"{W}: tsv finds no decomposition of .*m1.*m2.*failed to converge"):
        merge.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", [1e5, -1e9])
def test_exploding_coefficients_are_refused_with_the_entry(tmp_path: Path, weight: float) -> None:
    tensor = torch.zeros(8, 8)
    tensor[2, 3] = 1.0
    folders = [write_checkpoint(tmp_path / n, {W: t}) for n, t in (("base", torch.zeros(8, 8)), ("a", tensor))]
    recipe = recipe_text("task_arithmetic", [(folders[1], {"weight": weight})], base=folders[0], dtype="float16")
    with pytest.raises(NonFiniteError, match=rf"{W}: .*float16 ends at 65504 .*element 19, .*/a"):
        Merge(parse_recipe(recipe)).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_denormals_are_kept_and_the_policy_is_stated(tmp_path: Path) -> None:
    smallest = 2.0**-24  # of float16
    base = torch.zeros(4, dtype=torch.float16)
    merge = opened(tmp_path, "task_arithmetic", base, torch.full_like(base, smallest), dtype="float16")
    folder = merge.write(tmp_path / "out").folder
    from safetensors.torch import load_file

    assert (load_file(folder / "model.safetensors")[W] == smallest).all()
    numbers = json.loads((folder / "merge_manifest.json").read_text())["numbers"]
    assert numbers["nonfinite"] == numbers["overflow"] == "refuse" and numbers["denormals"] == "kept"
    assert "numbers: arithmetic float64, rounding nearest even" in (folder / "README.md").read_text()
