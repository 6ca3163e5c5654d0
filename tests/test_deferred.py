"""What is done without torch, and how it is imported where it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ctl_merge import compiled, counting
from ctl_merge.deferred import torch as deferred
from ctl_merge.deferred import torch_version
from ctl_merge.merging import open_merge
from ctl_merge.methods import registry
from ctl_merge.methods.order import kth_largest
from ctl_merge.methods.sparsify import kept_ranks
from ctl_merge.recipe_file import parse_recipe
from ctl_merge.workers import compute_alone, pool
from tests.checkpoints import recipe_text, write_checkpoint

# Fails where torch is imported.
WITHOUT = """
import sys
class Refusing:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError("torch is not wanted here")
sys.meta_path.insert(0, Refusing())
from ctl_merge import compiled
compiled.LEAST = 0
from ctl_merge.cli import main
sys.argv = ["ctl-merge", *sys.argv[1:]]
main()
"""
DENSE = (
    "linear", "task_arithmetic", "slerp", "nuslerp", "model_stock", "sce", "karcher", "multislerp", "metagpt"
)  # fmt: skip
SHAPES = ((1500, 1024), (7,), (33, 65))


def family(folder: Path, dtype: torch.dtype = torch.bfloat16) -> list[Path]:
    generator, paths = torch.Generator().manual_seed(0), []
    base = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for model in range(3):
        tensors = {f"t{i}": t + 0.1 * model * torch.randn(t.shape, generator=generator) for i, t in enumerate(base)}
        paths.append(write_checkpoint(folder / f"m{model}", {name: t.to(dtype) for name, t in tensors.items()}))
    return paths


def recipe_of(method: str, paths: list[Path], **parameters: object) -> str:
    row, (base, *others) = registry()[method], paths
    if row.base != "required":
        base, others = None, paths[: row.models[1]]
    elif row.space == "weights":
        others = others[:1]
    own = {"weight": 0.5} if "weight" in row.parameters else {}
    return recipe_text(method, [(path, own) for path in others], base, parameters)


@pytest.mark.parametrize("method", [*DENSE, "dare_ties", "ties", "breadcrumbs", "della"])
def test_a_merge_from_and_to_bfloat16_imports_no_torch(method: str, tmp_path: Path) -> None:
    paths = family(tmp_path)
    parameters = {"t": 0.3} if method == "slerp" else {} if method in DENSE else {"density": 0.5}
    text = recipe_of(method, paths, **parameters)
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    command = [sys.executable, "-c", WITHOUT, str(file), "-o", str(tmp_path / "out")]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    merged = open_merge(parse_recipe(text))
    assert not merged.has_loops  # so small: the plain definition, with torch
    from safetensors.torch import load_file

    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in merged.tensors:
        assert torch.equal(written[name], merged.read(name))


def test_what_needs_torch_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LEAST", 0)
    words, single = family(tmp_path / "bf16"), family(tmp_path / "f32", torch.float32)
    assert not open_merge(parse_recipe(recipe_of("ties", words, density=0.5))).needs_torch
    assert open_merge(parse_recipe(recipe_of("ties", single, density=0.5))).needs_torch
    assert not open_merge(parse_recipe(recipe_of("sce", words))).needs_torch
    assert open_merge(parse_recipe(recipe_of("sce", words, select_topk=0.5))).needs_torch


def test_the_deferred_module_is_the_module() -> None:
    assert deferred.float32 is torch.float32
    assert torch_version() == torch.__version__
    with pytest.raises(AttributeError):
        deferred.nothing_of_this_name  # noqa: B018


def test_a_pools_threads_compute_alone_and_give_back_what_was() -> None:
    torch.set_num_threads(2)
    with pool(2) as mapped:
        assert list(mapped(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    assert torch.get_num_threads() == 2
    compute_alone()  # no thread of a pool
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("moved", [0, 40])
def test_cuts_are_exact_whether_foretold_or_not(moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`moved`: by how many bins the sample is wrong."""
    monkeypatch.setattr(compiled, "LEAST", 0)
    monkeypatch.setattr(counting, "_LARGE", 1 << 20)
    paths = family(tmp_path)
    merged = open_merge(parse_recipe(recipe_of("ties", paths, density=0.3)))
    assert merged._loops is not None
    passes: list[str] = []
    kernels = merged._loops.counting._kernels

    class Counted:
        BLOCK = kernels.BLOCK

        @staticmethod
        def count_upper(*arguments: object) -> bool:
            return kernels.count_upper(*arguments)

        @staticmethod
        def count_lower(*arguments: object) -> bool:
            passes.append("lower")
            return kernels.count_lower(*arguments)

    foretold = counting.Counting._foretold
    monkeypatch.setattr(merged._loops.counting, "_kernels", Counted)
    monkeypatch.setattr(counting.Counting, "_foretold", lambda *a: np.maximum(foretold(*a) - moved, 0))
    plan = merged.plan.tensors["t0"]
    assert plan.spec.numel >= counting._LARGE
    found = merged.measures.of(plan)["cut"]
    base, *others = (open_merge(parse_recipe(recipe_text("passthrough", [(path, {})]))).read("t0") for path in paths)
    deltas = torch.stack([other.double() - base.double() for other in others])
    wanted = kth_largest(deltas.abs(), kept_ranks(plan.spec.numel, density=np.array([0.3, 0.3])))
    np.testing.assert_array_equal(found, wanted.numpy())
    assert bool(passes) == bool(moved)
