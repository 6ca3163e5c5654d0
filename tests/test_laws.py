"""Laws that every merge method obeys, each through the whole pipe; a new method needs a row in `references.ROWS`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from references import (
    METHODS,
    ROWS,
    as_float64,
    cases,
    draw_family,
    expected,
    members,
    open_family,
    takes_base,
    ulps,
    write_family,
)
from safetensors.torch import load_file

import ctl_merge
from ctl_merge.checkpoint import CHUNK
from ctl_merge.methods import Method

W = "model.layers.0.weight"
SHAPES = {W: (40, 50), "model.layers.1.weight": (33, 7), "model.norm.weight": (64,)}
# All sizes that lie at an edge: nothing, one entry, one row, one column, no axis, many axes.
EDGES = {
    f"model.layers.0.t{i}": shape
    for i, shape in enumerate([(0,), (0, 3), (3, 0), (), (1,), (1, 1), (64,), (5, 1), (1, 5), (4, 1, 3), (2, 3, 4)])
}

all_methods = pytest.mark.parametrize("name", sorted(METHODS))
all_cases = pytest.mark.parametrize("name, case", cases(), ids=str)


def lawful(law: str) -> pytest.MarkDecorator:
    """All methods that are not exempt from a law."""
    exempt = {name for name, row in ROWS.items() if law in row.exempt}
    return pytest.mark.parametrize("name", sorted(METHODS.keys() - exempt))


def supported(method: Method, **parameters: Any) -> dict[str, Any]:
    """Those of the parameters that the method has."""
    return {name: value for name, value in parameters.items() if name in method.parameters}


def first(parameters: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The parameters for the first models only."""
    return {n: v[:count] if isinstance(v, tuple) else v for n, v in parameters.items()}


def test_every_method_has_a_row():
    """And no row is left over: the tables below would skip a method without one."""
    assert set(METHODS) == set(ROWS)


@all_methods
def test_rows_speak_of_all_parameters(name: str):
    """Every parameter takes part in some case, so that a new one is not left untested."""
    in_cases = {parameter for case in ROWS[name].cases for parameter in case}
    elsewhere = {"ties": {"trim"}}  # `trim: model` needs more than one tensor: test_methods.py
    assert in_cases | elsewhere.get(name, set()) == set(METHODS[name].parameters)


# ---- shape and finiteness


@all_cases
def test_tensors_at_every_edge_keep_shape_and_are_their_definition(tmp_path: Path, name: str, case: Mapping[str, Any]):
    family = draw_family(members(name, case), EDGES)
    merged = open_family(tmp_path, name, family, case)
    for tensor, shape in EDGES.items():
        found, wanted = merged.read(tensor), expected(name, family, case, tensor)
        assert found.shape == shape and found.dtype == torch.float32 and found.isfinite().all()
        assert wanted.size == 0 or ulps(found, wanted, [t[tensor] for t in family.values()]).max() <= 2


# ---- what is merged with itself or with nothing stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@lawful("copies")
def test_copies_of_one_model_merge_to_it(tmp_path: Path, name: str, dtype: torch.dtype):
    """Bit for bit, whatever the base."""
    average = ROWS[name].average
    family = draw_family(["base", "a"], SHAPES, dtype)
    copies = dict.fromkeys(members(name, average), family["a"])
    if METHODS[name].space == "task_vectors":
        copies["base"] = family["base"]
    merged = open_family(tmp_path, name, copies, average)
    assert all(torch.equal(merged.read(tensor), family["a"][tensor]) for tensor in SHAPES)


@lawful("single")
def test_one_model_at_weight_1_is_returned(tmp_path: Path, name: str):
    alone = {**first(ROWS[name].average, 1), **({"weight": (1.0,)} if "weight" in ROWS[name].average else {})}
    family = draw_family([model for model in members(name, alone) if model in ("base", "a")], SHAPES)
    merged = open_family(tmp_path, name, family, alone)
    assert all(torch.equal(merged.read(tensor), family["a"][tensor]) for tensor in SHAPES)


@pytest.mark.parametrize("name, case", [pair for pair in cases() if METHODS[pair[0]].space == "task_vectors"], ids=str)
def test_models_equal_to_the_base_give_the_base(tmp_path: Path, name: str, case: Mapping[str, Any]):
    """All task vectors are zero: nothing to trim, elect or rescale, and nothing to divide by."""
    base = draw_family(["base"], EDGES)["base"]
    merged = open_family(tmp_path, name, dict.fromkeys(members(name, case), base), case)
    assert all(torch.equal(merged.read(tensor), base[tensor]) for tensor in EDGES)


@pytest.mark.parametrize("place", [0, 1, 2])
@lawful("zero weight")
def test_a_model_of_weight_zero_changes_nothing(tmp_path: Path, name: str, place: int):
    case = {n: (*v[:2], 0.0)[:3] if n == "weight" else v for n, v in ROWS[name].cases[0].items()}
    family = draw_family(members(name, case), SHAPES)
    models = [model for model in family if model != "base"]
    order = models[:2]
    order.insert(place, models[2])
    moved = {n: tuple(v[models.index(m)] for m in order) if isinstance(v, tuple) else v for n, v in case.items()}
    with_it = open_family(tmp_path / "with", name, family, moved, order=order)
    without = open_family(
        tmp_path / "without", name, {m: family[m] for m in members(name, first(case, 2))}, first(case, 2)
    )
    assert all(torch.equal(with_it.read(tensor), without.read(tensor)) for tensor in SHAPES)


@lawful("zero weight")
def test_weights_of_zero_alone_give_the_base_or_nothing(tmp_path: Path, name: str):
    method = METHODS[name]
    untouched = {"normalize": False, "normalize_weights": False}
    case = {"weight": (0.0, 0.0, 0.0), **supported(method, density=(0.5, 0.5, 0.5), **untouched)}
    family = draw_family(members(name, case), SHAPES)
    merged = open_family(tmp_path, name, family, case)
    for tensor in SHAPES:
        nothing = family["base"][tensor] if method.space == "task_vectors" else torch.zeros(SHAPES[tensor])
        assert torch.equal(merged.read(tensor), nothing)


@lawful("cancel")
def test_a_model_and_its_negation_cancel(tmp_path: Path, name: str):
    """Listed twice, with weights w and -w: random methods drop the same entries of both."""
    method = METHODS[name]
    untouched = {"normalize": False, "normalize_weights": False}
    case = {"weight": (0.7, -0.7), **supported(method, density=(0.5, 0.5), **untouched)}
    family = draw_family([*(["base"] if takes_base(method) else []), "a"], SHAPES)
    merged = open_family(tmp_path, name, family, case, order=["a", "a"])
    for tensor in SHAPES:
        nothing = family["base"][tensor] if method.space == "task_vectors" else torch.zeros(SHAPES[tensor])
        assert torch.equal(merged.read(tensor), nothing)


# ---- what must not matter


@pytest.mark.parametrize("order", ["bca", "cba"])  # a rotation and an exchange: the others are made of these
@lawful("symmetric")
def test_the_order_of_the_models_does_not_matter(tmp_path: Path, name: str, order: str):
    """With their parameters they may be listed in any order, but for one unit in the last place."""
    for i, case in enumerate(ROWS[name].cases):
        family = draw_family(members(name, case), SHAPES)
        moved = {n: tuple(v["abc".index(m)] for m in order) if isinstance(v, tuple) else v for n, v in case.items()}
        listed = open_family(tmp_path / f"{i}", name, family, case)
        permuted = open_family(tmp_path / f"{i} permuted", name, family, moved, order=order)
        for tensor in SHAPES:
            operands = [tensors[tensor] for tensors in family.values()]
            assert ulps(permuted.read(tensor), as_float64(listed.read(tensor)), operands).max() <= 1


LARGE = {W: (3, CHUNK // 2), "model.layers.1.weight": (CHUNK - 1,), "model.norm.weight": (11,)}


def variants(name: str) -> list[Mapping[str, Any]]:
    """Two of the method's cases, and one with a cut of the whole model."""
    own = list(ROWS[name].cases[:2])
    return [*own, {**own[0], "trim": "model"}] if "trim" in METHODS[name].parameters else own


@all_methods
def test_any_part_of_a_tensor_is_a_slice_of_the_whole(tmp_path: Path, name: str):
    for i, case in enumerate(variants(name)):
        family = draw_family(members(name, case), LARGE, torch.bfloat16)
        merged = open_family(tmp_path / f"{i}", name, family, case, dtype="float32")
        whole = merged.read(W).view(-1)
        for start, count in [(0, 1), (5, CHUNK), (CHUNK - 3, 7), (CHUNK, 100), (CHUNK + 17, len(whole) - CHUNK - 17)]:
            part = torch.empty(count)
            merged.read_into(W, part, start)
            assert torch.equal(part, whole[start : start + count])


@all_methods
def test_the_bits_do_not_depend_on_workers_shards_or_the_order_of_reading(tmp_path: Path, name: str):
    for i, case in enumerate(variants(name)):
        folder = tmp_path / f"{i}"
        family = draw_family(members(name, case), LARGE, torch.bfloat16)
        machines: list[dict[str, Any]] = [{"num_workers": 1}, {"num_workers": 3, "max_shard_size": "600KB"}]
        for shards, machine in zip([1, 2], machines, strict=True):
            recipe = write_family(folder / f"in{shards}", name, family, case, shards=shards)
            ctl_merge.merge(recipe, folder / f"out{shards}", **machine)
        one, many = (load_folder(folder / f"out{shards}") for shards in (1, 2))
        assert len(list((folder / "out2").glob("*.safetensors"))) > 1
        lazy = open_family(folder / "in1", name, family, case)
        for tensor in reversed(LARGE):
            assert torch.equal(one[tensor], many[tensor]) and torch.equal(one[tensor], lazy.read(tensor))


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a written checkpoint."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.random))
def test_the_seed_alone_decides_what_is_random(tmp_path: Path, name: str):
    case = ROWS[name].cases[0]
    family = draw_family(members(name, case), SHAPES)
    first, again, other = (
        open_family(tmp_path / str(run), name, family, case, seed=seed) for run, seed in enumerate((3, 3, 4))
    )
    for tensor in SHAPES:
        torch.manual_seed(0)
        found = first.read(tensor)
        torch.manual_seed(1)
        assert torch.equal(found, again.read(tensor)) and not torch.equal(found, other.read(tensor))


@all_methods
def test_methods_leave_their_inputs_alone(tmp_path: Path, name: str):
    """Reading twice gives the same: no method writes into the buffer that its inputs lie in."""
    for i, case in enumerate(ROWS[name].cases):
        merged = open_family(tmp_path / f"{i}", name, draw_family(members(name, case), SHAPES), case)
        assert all(torch.equal(merged.read(tensor), merged.read(tensor)) for tensor in SHAPES)
