"""Numbers that go wrong are found and named, and the manifest states what was done with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint
from command import Ctl
from interrupts import interrupted

from ctl_merge.errors import NonFiniteError
from ctl_merge.extraction import extract_lora
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


# ---- what is let through is counted

V = "model.layers.1.w"


def let_through(folder: Path) -> dict[str, dict[str, int]]:
    numbers = json.loads((folder / "merge_manifest.json").read_text())["numbers"]
    assert numbers["nonfinite"] == "allow" and numbers["overflow"] == "to infinity"
    return dict(numbers["let_through"])


def with_holes(tmp_path: Path, **keys: object) -> Merge:
    """Three NaN in a model, one from an infinity, and in another tensor what float16 cannot hold."""
    first, other, ones = torch.zeros(8, 8), torch.ones(8, 8), torch.ones(8, 8)
    first[0, :2], first[1, 1], other[2, 2:5] = float("nan"), -float("inf"), 1e6
    folders = tmp_path / "a", tmp_path / "b"
    if not folders[0].exists():
        write_checkpoint(folders[0], {W: first, V: other, "model.norm.weight": ones[0]})
        write_checkpoint(folders[1], {W: ones, V: ones, "model.norm.weight": ones[0]})
    models = [(folder, {"weight": 1.0}) for folder in folders]
    recipe = recipe_text("linear", models, dtype="float16", **keys)  # type: ignore[arg-type]
    return Merge(parse_recipe(recipe), num_workers=1, max_shard_size="200B")


HOLES = {W: {"nan": 3, "infinite": 0}, V: {"nan": 0, "infinite": 3}}


def test_what_is_let_through_is_counted_by_tensor(tmp_path: Path, ctl: Ctl) -> None:
    folder = with_holes(tmp_path, nonfinite="allow").write(tmp_path / "out").folder
    assert let_through(folder) == HOLES
    from safetensors.torch import load_file

    found = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    assert HOLES == {
        n: {"nan": int(t.isnan().sum()), "infinite": int(t.isinf().sum())}
        for n, t in found.items() if not torch.isfinite(t).all()
    }  # fmt: skip
    line = f"let through: 3 NaN and 3 infinite entries, in {W}, {V}"
    assert line in (folder / "README.md").read_text()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(with_holes(tmp_path, nonfinite="allow").recipe.text)
    assert f"· {line}" in ctl(recipe, "-o", tmp_path / "again").out


def test_the_count_is_the_same_after_an_interruption(tmp_path: Path) -> None:
    whole = with_holes(tmp_path, nonfinite="allow").write(tmp_path / "whole" / "m").folder
    with interrupted(after=2):
        with_holes(tmp_path, nonfinite="allow").write(tmp_path / "resumed" / "m")
    resumed = with_holes(tmp_path, nonfinite="allow").write(tmp_path / "resumed" / "m", resume=True)
    assert resumed.resumed_tensors == 2 and let_through(resumed.folder) == HOLES
    for path in whole.iterdir():
        assert (resumed.folder / path.name).read_bytes() == path.read_bytes()


def test_the_count_is_the_same_however_the_shards_are_shared(tmp_path: Path) -> None:
    from ctl_merge.parts import finalize, write_part

    for index in (1, 0):
        write_part(with_holes(tmp_path, nonfinite="allow"), tmp_path / "out", index, 2)
    assert let_through(finalize(with_holes(tmp_path, nonfinite="allow"), tmp_path / "out").folder) == HOLES


def test_where_nothing_had_to_be_let_through_that_is_said(tmp_path: Path) -> None:
    base = torch.zeros(4, 4)
    folder = opened(tmp_path, "task_arithmetic", base, torch.eye(4), nonfinite="allow").write(tmp_path / "out").folder
    assert let_through(folder) == {}
    card = (folder / "README.md").read_text()
    assert "NaN and infinity were allowed, and the weights hold none" in card and "- computed on cpu" in card


# ---- adapters, and what measures models

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
LORA = f"""
    merge_method: task_arithmetic
    base_model: {QUICKSTART}/base
    output: lora
    models: [{{model: {QUICKSTART}/base+ADAPTER, parameters: {{weight: 0.5}}}}]
"""
PROJECTION = "model.layers.0.self_attn.q_proj.weight"


def spoilt(folder: Path, source: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model or an adapter of the quickstart, with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(QUICKSTART / source, folder)
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def fails(*_: object, **__: object) -> None:
    raise torch.linalg.LinAlgError("failed to converge")


def test_an_adapter_states_how_numbers_were_treated(tmp_path: Path) -> None:
    recipe = LORA.replace("ADAPTER", str(QUICKSTART / "cycle-lora"))
    for name, more in (("a", ""), ("b", "    nonfinite: allow\n")):
        folder = Merge(parse_recipe(recipe + more), num_workers=1).write(tmp_path / name).folder
        numbers = json.loads((folder / "merge_manifest.json").read_text())["numbers"]
        assert numbers["nonfinite"] == ("allow" if more else "refuse") and numbers.get("let_through", {}) == {}
        assert "- numbers: arithmetic float64" in (folder / "README.md").read_text()


def test_decompositions_for_an_adapter_that_do_not_converge_name_the_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = LORA.replace("ADAPTER", str(QUICKSTART / "cycle-lora"))
    merge = Merge(parse_recipe(recipe.replace("output: lora", "output: {lora: {rank: 2}}")))
    for name in ("svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, fails)
        with pytest.raises(NonFiniteError, match=rf"{PROJECTION}: there is no decomposition .*converge.*compare"):
            merge.write(tmp_path / "lora", overwrite=True)
        monkeypatch.undo()
    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(NonFiniteError, match=r"\.weight: there is no decomposition .*converge"):
        extract_lora(QUICKSTART / "cycle", QUICKSTART / "base", tmp_path / "extracted", rank=2, overwrite=True)
    assert not (tmp_path / "lora").exists() and not (tmp_path / "extracted").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("policy", ["error", "allow"])
def test_an_adapter_with_nan_is_not_merged_into_one(tmp_path: Path, value: float, policy: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = value

    adapter = spoilt(tmp_path / "spoilt", "cycle-lora", change)
    recipe = LORA.replace("ADAPTER", str(adapter)) + f"    nonfinite: {policy}\n"
    with pytest.raises(NonFiniteError, match=r"proj"):
        Merge(parse_recipe(recipe), num_workers=1).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_numbers_its_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[PROJECTION][1, 2] = 1e12

    model = spoilt(tmp_path / "huge", "cycle", change)
    with pytest.raises(NonFiniteError, match=rf"{PROJECTION}: float16 ends at 65504, .*wider dtype"):
        extract_lora(model, QUICKSTART / "base", tmp_path / "out", rank=2, dtype="float16")
    with pytest.raises(NonFiniteError, match=r"norm.*: float16 ends at 65504"):
        extract_lora(
            spoilt(tmp_path / "norm", "cycle", lambda t: t["model.norm.weight"].fill_(1e6)), QUICKSTART / "base",
            tmp_path / "out", rank=2, dtype="float16", save=["norms"], overwrite=True,
        )  # fmt: skip


def test_a_model_with_nan_is_not_probed_whatever_the_policy(tmp_path: Path, ctl: Ctl) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[PROJECTION][1, 2] = float("nan")

    model, recipe = spoilt(tmp_path / "holes", "cycle", change), tmp_path / "r.yaml"
    models = [(model, {"weight": 0.5}), (QUICKSTART / "shift", {"weight": 0.5})]
    recipe.write_text(recipe_text("task_arithmetic", models, QUICKSTART / "base", nonfinite="allow"))
    for command in (
        ("probe", recipe),
        ("probe", "--models", model, QUICKSTART / "shift", "--base", QUICKSTART / "base"),
    ):
        ran = ctl(*command, "--sequences", 2, "--length", 16, "-o", tmp_path / "report")
        assert ran.code == 2 and PROJECTION in ran.err and "holds" in ran.err.replace("hold ", "holds ")
    assert not (tmp_path / "report").exists()
    assert ctl("compare", recipe).code == 0  # which counts them
