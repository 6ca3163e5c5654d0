"""The same recipe, sources and seed give the same bytes, whatever runs them; and what numbers do to every method."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupts import interrupted
from references import METHODS, ROWS, draw_family, members, open_family, write_family

import ctl_merge
from ctl_merge.errors import NonFiniteError
from ctl_merge.merging import Merge

SHAPES = {"model.layers.0.w": (24, 16), "model.layers.1.w": (16, 9), "model.norm.weight": (32,)}
W = "model.layers.0.w"
all_methods = pytest.mark.parametrize("name", sorted(METHODS))
KB = "2KB"  # each matrix has a shard of its own


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, however they are cut into files."""
    from safetensors.torch import load_file

    found = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor.numpy().tobytes() for part in found for name, tensor in part.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@all_methods
def test_workers_shards_and_interruptions_change_nothing(name: str, tmp_path: Path) -> None:
    case = ROWS[name].cases[0]
    recipe = write_family(tmp_path, name, draw_family(members(name, case), SHAPES), case)
    one = Merge(recipe, num_workers=1, max_shard_size=KB).write(tmp_path / "one" / "m").folder
    many = Merge(recipe, num_workers=5, max_shard_size=KB).write(tmp_path / "many" / "m").folder
    assert files(one) == files(many)
    whole = Merge(recipe, num_workers=2, max_shard_size="1GB").write(tmp_path / "whole").folder
    assert weights(whole) == weights(one)

    with interrupted(after=2):
        Merge(recipe, num_workers=1, max_shard_size=KB).write(tmp_path / "resumed" / "m")
    resumed = Merge(recipe, num_workers=3, max_shard_size=KB).write(tmp_path / "resumed" / "m", resume=True)
    assert resumed.resumed_tensors == 2 and files(resumed.folder) == files(one)


def test_hash_seeds_change_nothing(tmp_path: Path) -> None:
    """Here and in a process whose seed is another: all methods that need no texts, one after the other."""
    paths = {}
    for name in sorted(METHODS):
        if METHODS[name].statistic:
            continue
        case, folder = ROWS[name].cases[0], tmp_path / name
        recipe = write_family(folder, name, draw_family(members(name, case), SHAPES), case)
        paths[name] = folder / "recipe.yaml"
        paths[name].write_text(recipe.text)
    code = (
        "import sys, json, hashlib\nfrom pathlib import Path\nfrom ctl_merge.merging import Merge\n"
        "out = {}\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    f = Merge(path, num_workers=2).write(path.parent / 'there' / 'm').folder\n"
        "    out[path.parent.name] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in f.iterdir()}\n"
        "print(json.dumps(out))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(ctl_merge.__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, paths.values())]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr
    here = {name: Merge(path, num_workers=2).write(path.parent / "here" / "m").folder for name, path in paths.items()}
    assert json.loads(ran.stdout) == {
        name: {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for name, folder in here.items()
    }


# ---- numbers


def family_with(name: str, change: Any) -> tuple[Any, Any]:
    case = ROWS[name].cases[0]
    family = draw_family(members(name, case), SHAPES)
    change(family)
    return family, case


@all_methods
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_with_its_place(name: str, value: float, tmp_path: Path) -> None:
    def change(family: Any) -> None:
        list(family.values())[-1][W][3, 5] = value

    family, case = family_with(name, change)
    with pytest.raises(NonFiniteError, match=rf"{W} holds {value} at element 53.*nonfinite: allow"):
        open_family(tmp_path, name, family, case).read(W)
    allowed = open_family(tmp_path, name, family, case, nonfinite="allow").read(W)
    assert allowed.shape == SHAPES[W]


@all_methods
def test_equal_infinities_are_let_through_as_such_or_as_nan_never_as_numbers(name: str, tmp_path: Path) -> None:
    """∞ − ∞ is no number: methods that take differences give NaN where all models have the same infinity."""

    def change(family: Any) -> None:
        for tensors in family.values():
            tensors[W][0, 0] = float("inf")

    family, case = family_with(name, change)
    found = open_family(tmp_path, name, family, case, nonfinite="allow").read(W)
    assert not torch.isfinite(found[0, 0])


@all_methods
def test_equal_models_give_the_model(name: str, tmp_path: Path) -> None:
    """Task vectors that are all zero: no division by their length, no basis of nothing."""

    def change(family: Any) -> None:
        first = next(iter(family.values()))
        for tensors in family.values():
            tensors.update({n: t.clone() for n, t in first.items()})

    family, case = family_with(name, change)
    merged = open_family(tmp_path, name, family, case)
    for tensor in SHAPES:
        found = merged.read(tensor)
        assert torch.isfinite(found).all()
        if METHODS[name].space == "task_vectors":
            torch.testing.assert_close(found, family["base"][tensor], rtol=1e-6, atol=1e-7)


@all_methods
@pytest.mark.parametrize("scale", [1e-42, 1e-38])
def test_tiny_numbers(name: str, scale: float, tmp_path: Path) -> None:
    def change(family: Any) -> None:
        for tensors in family.values():
            for tensor in tensors.values():
                tensor.mul_(scale)

    family, case = family_with(name, change)
    merged = open_family(tmp_path, name, family, case)
    assert all(torch.isfinite(merged.read(tensor)).all() for tensor in SHAPES)


@all_methods
@pytest.mark.parametrize("kind", ["ones", "rank one", "a single entry"])
def test_matrices_of_little_rank(name: str, kind: str, tmp_path: Path) -> None:
    def change(family: Any) -> None:
        for i, (_, tensors) in enumerate(family.items()):
            low = torch.zeros(SHAPES[W])
            if kind == "ones":
                low += i
            elif kind == "rank one":
                low = torch.outer(torch.arange(24.0) + i, torch.arange(16.0) - i)
            else:
                low[2, 3] = float(i)
            tensors[W] = low

    family, case = family_with(name, change)
    assert torch.isfinite(open_family(tmp_path, name, family, case).read(W)).all()


@all_methods
def test_what_float16_cannot_hold_is_refused_or_fits(name: str, tmp_path: Path) -> None:
    def change(family: Any) -> None:
        for i, tensors in enumerate(family.values()):
            tensors[W] = torch.full(SHAPES[W], 3e5 * (1 + i)) + torch.randn(SHAPES[W])

    family, case = family_with(name, change)
    try:
        found = open_family(tmp_path, name, family, case, dtype="float16").read(W)
    except NonFiniteError as error:
        assert W in str(error) and "float16 ends at 65504" in str(error)
    else:
        assert torch.isfinite(found).all()
