"""Comparing in weight space: against plain definitions, by hand, and what it says of merges that went wrong."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Model, recipe_text, write_checkpoint
from torch import Tensor

from ctl_merge import cli
from ctl_merge.checkpoint import CHUNK
from ctl_merge.compare import Comparison, compare
from ctl_merge.compare_table import render
from ctl_merge.errors import CtlMergeError, RecipeError
from ctl_merge.findings import percent, signed
from ctl_merge.merging import Merge
from ctl_merge.recipe_file import parse_recipe
from ctl_merge.reference import ModelRef
from ctl_merge.workers import pool

FAMILY = Path(__file__).parents[2] / "shared" / "models"
QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
CONFIG = {"num_hidden_layers": 2}
DENSITIES = (1.0, 0.5, 0.2)
NAMES = [
    "model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)), "model.norm.weight"
]  # fmt: skip
SHAPES = [(16, 8), (12, 8), (12, 8), (8,)]


def weights(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: (scale * torch.randn(s, generator=generator)).to(dtype) for n, s in zip(NAMES, SHAPES, strict=True)
    }  # fmt: skip


def moved(base: Mapping[str, Tensor], seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """A finetune: the base and a random task vector of `scale` times its size."""
    return {name: base[name] + delta.to(base[name].dtype) for name, delta in weights(seed, scale).items()}


def opened(
    folder: Path, models: Mapping[str, Mapping[str, Tensor]], method: str = "task_arithmetic",
    own: Mapping[str, Any] | None = None, **keys: Any,
) -> Merge:  # fmt: skip
    """A merge of models, `base` among them if the method has one; they are written first. `own`: parameters of each."""
    folders = {name: write_checkpoint(folder / name, tensors, CONFIG) for name, tensors in models.items()}
    listed: list[Model] = [(path, dict(own or {"weight": 0.5})) for name, path in folders.items() if name != "base"]
    text = recipe_text(method, listed, folders.get("base") if method != "linear" else None, **keys)
    return Merge(parse_recipe(text))


def row(found: Comparison, by: str, name: str) -> dict[str, Any]:
    return next(row for row in found.data[by] if row["name"] == name)


# ---- numbers


def test_by_hand(tmp_path: Path) -> None:
    base, first, second = torch.tensor([3.0, 4, 0, 0]), torch.tensor([3.0, -1, 0, 2]), torch.tensor([1.0, 2, 0, -2])
    name = "model.norm.weight"
    merge = opened(tmp_path, {"base": {name: base}, "a": {name: base + first}, "b": {name: base + second}})
    found = compare(merge, densities=(1.0, 0.5)).data["model"]
    a, b = found["parents"]["a"], found["parents"]["b"]
    assert a["task_vector"] == pytest.approx(14**0.5 / 5) and b["task_vector"] == pytest.approx(3 / 5)
    assert a["cosine_to_base"] == pytest.approx((25 + 9 - 4) / 5 / (36 + 9 + 4) ** 0.5)
    assert found["pairs"][0]["cosine"] == pytest.approx(-3 / (3 * 14**0.5))
    assert found["pairs"][0]["distance"] == pytest.approx(29**0.5 / 5)
    assert [a["coefficient"], b["coefficient"], found["merged"]["explained"]] == pytest.approx([0.5, 0.5, 1.0])
    assert found["merged"]["task_vector"] == pytest.approx((4 + 0.25) ** 0.5 / 5)
    whole, half = found["signs"]
    # Of all: the zero is nobody's. Of the two largest of each, ties included: {3, 2} and {2, -2}, which meet in one.
    assert (whole["contested"], whole["conflict"], whole["chance"]) == pytest.approx((3 / 4, 2 / 3, 1 / 2))
    assert (half["contested"], half["conflict"]) == pytest.approx((1 / 4, 1))


def plain(
    models: Mapping[str, Mapping[str, Tensor]], merged: Mapping[str, np.ndarray], names: list[str], dtype
) -> dict:
    """The definitions, on whole vectors in memory."""

    def flat(tensors: Mapping[str, Any]) -> np.ndarray:
        return np.concatenate([np.asarray(tensors[name].double()).ravel() for name in names])

    base, *parents = (flat(tensors) for tensors in models.values())
    whole = np.concatenate([merged[name].ravel() for name in names])
    taus, tau = np.stack([parent - base for parent in parents]), whole - base
    mix = np.linalg.lstsq(taus.T, tau, rcond=None)[0]
    rounded = torch.from_numpy(whole).to(dtype).double().numpy()
    size = np.linalg.norm
    signs = []
    for density in DENSITIES:
        places = []
        for name in names:
            deltas = torch.stack([m[name].double() - models["base"][name].double() for m in list(models.values())[1:]])
            magnitudes = deltas.flatten(1).abs().float()
            kth = magnitudes.sort(dim=1, descending=True).values[:, max(1, int(density * magnitudes.shape[1])) - 1]
            cut = (kth.view(torch.int32) & -65536).view(torch.float32) if density < 1 else torch.zeros(len(deltas))
            places.append(deltas.flatten(1).sign() * (magnitudes >= cut[:, None]))
        votes = torch.cat(places, 1).numpy()
        contested = (votes != 0).sum(0) >= 2
        signs.append([contested.mean(), ((votes > 0).any(0) & (votes < 0).any(0))[contested].mean()])
    return {
        "task_vectors": size(taus, axis=1) / size(base), "merged": size(tau) / size(base), "coefficients": mix,
        "explained": 1 - size(tau - mix @ taus) ** 2 / size(tau) ** 2, "signs": signs,
        "rounding": size(rounded - whole) / size(tau),
    }  # fmt: skip


def assert_row(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    numbers = found["parents"].values()
    assert [n["task_vector"] for n in numbers] == pytest.approx(expected["task_vectors"])
    assert [n["coefficient"] for n in numbers] == pytest.approx(expected["coefficients"])
    assert found["merged"]["task_vector"] == pytest.approx(expected["merged"])
    assert found["merged"]["explained"] == pytest.approx(expected["explained"])
    assert found["merged"]["rounding_loss"] == pytest.approx(expected["rounding"])
    assert [[s["contested"], s["conflict"]] for s in found["signs"]] == pytest.approx(np.array(expected["signs"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_group_is_the_definition(tmp_path: Path, dtype: str) -> None:
    base = weights(0)
    models = {"base": base, **{f"m{i}": moved(base, i) for i in range(1, 4)}}
    merge = opened(tmp_path, models, "ties", {"weight": 0.4, "density": 0.5}, dtype=dtype)
    found = compare(merge, densities=DENSITIES)
    exact = {}
    for name, spec in merge.merged.tensors.items():
        out = torch.empty(spec.numel, dtype=torch.float64)
        merge.merged.read_into(name, out)
        exact[name] = out.numpy()
    kind = getattr(torch, dtype)
    assert_row(found.data["model"], plain(models, exact, NAMES, kind))
    assert_row(row(found, "blocks", "model.layers.1"), plain(models, exact, [NAMES[2]], kind))
    assert_row(row(found, "blocks", "(outside blocks)"), plain(models, exact, [NAMES[0], NAMES[3]], kind))
    assert_row(row(found, "kinds", "mlp.up_proj"), plain(models, exact, NAMES[1:3], kind))
    assert_row(row(found, "tensors", NAMES[0]), plain(models, exact, [NAMES[0]], kind))
    assert [r["name"] for r in found.data["kinds"]] == ["model.embed_tokens", "model.norm", "mlp.up_proj"]


def test_a_tensor_of_several_chunks_is_the_sum_of_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    name, shape = "model.embed_tokens.weight", (2 * CHUNK // 64 + 3, 64)
    base = {name: torch.randn(shape, generator=generator).bfloat16()}
    models = {"base": base} | {f"m{i}": {name: base[name] + 0.1 * torch.randn(shape).bfloat16()} for i in range(2)}
    merge = opened(tmp_path, models, "ties", {"weight": 0.4, "density": 0.5})
    found = compare(merge, densities=DENSITIES)
    assert merge.merged.tensors[name].numel > 2 * CHUNK
    exact = torch.empty(shape, dtype=torch.float64)
    merge.merged.read_into(name, exact.view(-1))
    assert_row(found.data["model"], plain(models, {name: exact.numpy()}, [name], torch.bfloat16))
    whole_tensors = Merge(replace(merge.recipe, method=replace(merge.recipe.method, grain="tensor")))
    assert compare(whole_tensors, densities=DENSITIES).rows[0] == pytest.approx(found.rows[0])


def test_workers_change_nothing_and_progress_is_told(tmp_path: Path) -> None:
    base = weights(0)
    merge = opened(tmp_path, {"base": base, "a": moved(base, 1), "b": moved(base, 2)})
    told: list[int] = []
    with pool(3) as mapped:
        parallel = compare(merge, mapped, told=told.append)
    assert parallel.data == compare(merge).data
    assert told == [1] * len(NAMES)


def test_chance_is_what_random_signs_give(tmp_path: Path) -> None:
    base = {"model.norm.weight": torch.zeros(4000) + 1}
    generator = torch.Generator().manual_seed(0)
    models = {
        f"m{i}": {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for i in range(4)
    }
    for signs in compare(opened(tmp_path, {"base": base, **models})).data["model"]["signs"]:
        assert signs["conflict"] == pytest.approx(signs["chance"], abs=0.06)


def test_rows_are_flat_and_name_every_group(tmp_path: Path) -> None:
    base = weights(0)
    rows = compare(opened(tmp_path, {"base": base, "a": moved(base, 1), "b": moved(base, 2)})).rows
    assert [r["by"] for r in rows] == ["model"] + ["block"] * 3 + ["kind"] * 3 + ["tensor"] * 4
    assert {"task_vector[a]", "coefficient[b]", "cosine[a, b]", "conflict@0.2", "merged_explained"} <= rows[0].keys()
    assert all(not isinstance(value, list | dict) for r in rows for value in r.values())


# ---- where task vectors begin


def test_a_recipe_without_base_needs_one(tmp_path: Path) -> None:
    base = weights(0)
    models = {"base": base, "a": moved(base, 1), "b": moved(base, 2)}
    merge = opened(tmp_path, models, "linear")
    with pytest.raises(RecipeError, match="--base"):
        compare(merge)
    found = compare(merge, base=ModelRef.parse(str(tmp_path / "base")))
    assert found.rows[0] == pytest.approx(compare(opened(tmp_path / "again", models)).rows[0])


def test_a_base_that_is_one_of_the_models(tmp_path: Path) -> None:
    base = weights(0)
    merge = opened(tmp_path, {"a": base, "b": moved(base, 1)}, "linear")
    found = compare(merge, base=ModelRef.parse(str(tmp_path / "a") + "/")).data
    assert list(found["parents"]) == ["b"]
    assert found["model"]["parents"]["b"]["coefficient"] == pytest.approx(0.5)
    assert found["model"]["signs"] == [] and found["model"]["pairs"] == []
    render(found)


def test_a_second_base_and_a_base_alone_are_refused(tmp_path: Path) -> None:
    base = weights(0)
    merge = opened(tmp_path, {"base": base, "a": moved(base, 1)})
    with pytest.raises(RecipeError, match="already"):
        compare(merge, base=ModelRef.parse(str(tmp_path / "a")))
    alone = opened(tmp_path / "alone", {"a": base}, "linear")
    with pytest.raises(CtlMergeError, match="no parents"):
        compare(alone, base=ModelRef.parse(str(tmp_path / "alone" / "a")))


# ---- what went wrong


def codes(found: Comparison) -> set[str]:
    return {flag["code"] for flag in found.data["flags"]}


@pytest.mark.parametrize(
    ("weight", "code", "said"),
    [
        (0.01, "merged_is_base", "almost the base base"),
        (5.0, "exploded", "[67][.].* times the largest"),
        (0.5, None, ""),
    ],
)
def test_a_merge_of_the_wrong_size_is_flagged(tmp_path: Path, weight: float, code: str | None, said: str) -> None:
    base = weights(0)
    found = compare(opened(tmp_path, {"base": base, "a": moved(base, 1), "b": moved(base, 2)}, own={"weight": weight}))
    assert codes(found) == ({code} if code else set())
    assert all(re.search(said, flag["message"]) for flag in found.data["flags"])


def test_a_merge_that_is_a_parent_and_parents_that_are_the_same(tmp_path: Path) -> None:
    base = weights(0)
    one = moved(base, 1)
    single = compare(opened(tmp_path / "single", {"base": base, "a": one}, own={"weight": 1.0}))
    assert codes(single) == {"merged_is_parent:a"}
    twins = compare(opened(tmp_path / "twins", {"base": base, "a": one, "b": dict(one)}))
    assert codes(twins) == {"same_parents:a,b"}
    assert twins.data["model"]["parents"]["a"]["coefficient"] == pytest.approx(0.5)
    idle = compare(opened(tmp_path / "idle", {"base": base, "a": one, "b": dict(base)}))
    assert "parent_is_base:b" in codes(idle)
    assert idle.data["model"]["pairs"][0]["cosine"] is None


def test_models_of_another_origin_are_flagged(tmp_path: Path) -> None:
    found = compare(opened(tmp_path, {"base": weights(0), "a": moved(weights(0), 1), "b": weights(2)}))
    assert codes(found) == {"unrelated:b"}


def test_a_light_merge_that_the_dtype_swallows_is_flagged(tmp_path: Path) -> None:
    base = weights(0)
    models = {"base": base, "a": moved(base, 1, 0.002), "b": moved(base, 2, 0.002)}
    found = compare(opened(tmp_path, models, dtype="bfloat16"))
    assert "rounded_away" in codes(found)
    assert found.data["model"]["merged"]["rounding_loss"] > 0.5
    assert "rounded_away" not in codes(compare(opened(tmp_path / "wide", models)))


def test_what_only_one_block_has_is_said_with_its_name(tmp_path: Path) -> None:
    base = weights(0)
    text = recipe_text(
        "task_arithmetic",
        [(write_checkpoint(tmp_path / n, moved(base, i), CONFIG), {}) for i, n in enumerate("ab", 1)],
        write_checkpoint(tmp_path / "base", base, CONFIG),
        {"weight": [{"filter": "layers.1.", "value": 2.5}, {"value": 0.5}]},
    )  # fmt: skip
    found = compare(Merge(parse_recipe(text)))
    flag = next(flag for flag in found.data["flags"] if flag["code"] == "exploded")
    assert flag["where"] == ["model.layers.1"] and "1 of 3 blocks" in flag["message"]


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    base, broken, whole = weights(0), moved(weights(0), 1), moved(weights(0), 2)
    broken[NAMES[1]][0, :2] = torch.tensor([float("nan"), float("inf")])
    found = compare(opened(tmp_path, {"base": base, "a": broken, "b": whole}))
    assert codes(found) == {"nonfinite"}
    assert found.data["model"]["nonfinite"] == {"a": 2, "b": 0, "base": 0, "merged": 2, "rounded": 0}
    assert NAMES[1] in found.data["flags"][0]["message"]
    assert np.isfinite(found.data["model"]["parents"]["a"]["task_vector"])
    assert found.data["model"]["merged"]["explained"] == pytest.approx(1)


def test_what_the_dtype_cannot_hold_is_counted(tmp_path: Path) -> None:
    base = weights(0)
    large = moved(base, 1)
    large[NAMES[0]][0, 0] = 1e6
    found = compare(opened(tmp_path, {"base": base, "a": large, "b": moved(base, 2)}, dtype="float16"))
    assert found.data["model"]["nonfinite"]["rounded"] == 1
    assert "beyond float16" in found.data["flags"][0]["message"]


def test_frozen_tensors_have_no_numbers_and_no_flags(tmp_path: Path) -> None:
    base = weights(0)
    models = {"base": base} | {n: {**moved(base, i), NAMES[0]: base[NAMES[0]]} for i, n in enumerate("ab", 1)}
    found = compare(opened(tmp_path, models))
    frozen = row(found, "kinds", "model.embed_tokens")
    assert frozen["flags"] == [] and frozen["merged"]["explained"] is None and frozen["pairs"][0]["cosine"] is None
    assert json.dumps(found.data, allow_nan=False)


# ---- names


def test_experts_are_one_kind_and_stacks_are_told_apart(tmp_path: Path) -> None:
    names = [
        f"{s}.layers.{i}.mlp.experts.{e}.up.weight" for s in ("encoder", "decoder") for i in (0, 1) for e in (0, 1)
    ]
    base = {name: torch.randn(4, 4) for name in names}
    models = {"base": base} | {n: {k: v + torch.randn(4, 4) for k, v in base.items()} for n in "ab"}
    kinds = [row["name"] for row in compare(opened(tmp_path, models)).data["kinds"]]
    assert kinds == ["decoder.layers.*.mlp.experts.*.up", "encoder.layers.*.mlp.experts.*.up"]


def test_numbers_are_written_for_readers() -> None:
    assert [percent(x) for x in (0.214, 0.0213, 0.0021, 0.00001, 0, 1, None)] == [
        "21%", "2.1%", "0.21%", "<0.01%", "0%", "100%", "–"
    ]  # fmt: skip
    assert [signed(x) for x in (0.194, -0.02, -0.001, 1.0, None)] == ["+.19", "−.02", "+.00", "+1.00", "–"]


# ---- the command line


def ctl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ctl-merge", "compare", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return int(exit.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize("by", [(), ("--by", "tensor")])
def test_output_fits_and_begins_with_sentences(monkeypatch, capsys, by) -> None:
    code, out, err = ctl(monkeypatch, capsys, QUICKSTART / "ties.yaml", *by)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert out.index("· sizes: ") < out.index("signs of the task vectors")
    assert ("by block" in out) == (not by)


def test_json_and_exit_codes(monkeypatch, capsys) -> None:
    code, out, _ = ctl(monkeypatch, capsys, QUICKSTART / "ties.yaml", "--json")
    data = json.loads(out)
    assert code == 0 and list(data["parents"]) == ["cycle", "shift"] and len(data["tensors"]) == 56
    code, _, err = ctl(monkeypatch, capsys, QUICKSTART / "average.yaml")
    assert code == 2 and "--base" in err
    code, _, _ = ctl(monkeypatch, capsys, QUICKSTART / "average.yaml", "--base", QUICKSTART / "base")
    assert code == 0
    assert ctl(monkeypatch, capsys, QUICKSTART / "nothing.yaml")[0] == 2


# ---- real models


@pytest.mark.real
@pytest.mark.skipif(not FAMILY.is_dir(), reason="the real model family is not beside the project")
@pytest.mark.parametrize("experts", [("math", "code"), ("math", "code", "french", "wiki")])
def test_real_family(experts: tuple[str, ...]) -> None:
    models: list[Model] = [(FAMILY / name, {"weight": 1.0, "density": 0.3}) for name in experts]
    found = compare(Merge(parse_recipe(recipe_text("ties", models, FAMILY / "stories260K")))).data
    model = found["model"]
    assert found["flags"] == []
    assert all(
        0.1 < numbers["task_vector"] < 0.3 < numbers["coefficient"] < 0.8 for numbers in model["parents"].values()
    )
    assert all(0.9 < numbers["cosine_to_base"] < 1 for numbers in model["parents"].values())
    assert 0.5 < model["merged"]["explained"] < 0.9
    assert all(signs["conflict"] < signs["chance"] for signs in model["signs"])


def test_a_base_that_only_gives_the_config_is_the_base_all_the_same() -> None:
    """Slices in place by `linear`: no slice has the base among its inputs."""
    slices = "".join(
        f"""
  - sources:
      - {{model: {QUICKSTART}/cycle, layer_range: [{start}, {start + 3}], parameters: {{weight: {weight}}}}}
      - {{model: {QUICKSTART}/shift, layer_range: [{start}, {start + 3}], parameters: {{weight: {1 - weight}}}}}"""
        for start, weight in ((0, 0.75), (3, 0.25))
    )
    opened = Merge(parse_recipe(f"merge_method: linear\nbase_model: {QUICKSTART}/base\nslices:{slices}\n"))
    blocks = {row["name"]: row["parents"] for row in compare(opened).data["blocks"]}
    for i, expected in enumerate([0.75] * 3 + [0.25] * 3):
        found = {name: numbers["coefficient"] for name, numbers in blocks[f"model.layers.{i}"].items()}
        assert found == {"cycle": pytest.approx(expected, abs=1e-3), "shift": pytest.approx(1 - expected, abs=1e-3)}
