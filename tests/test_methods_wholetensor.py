"""The methods that look at whole tensors: worked by hand, and by what is true of angles and of singular values."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from definitions_wholetensor import karcher as karcher_by_steps
from references import METHODS, ROWS, as_float64, draw_family, expected, open_family, ulps, write_family

import ctl_merge
from ctl_merge.checkpoint import CHUNK
from ctl_merge.errors import MismatchError, RecipeError
from ctl_merge.estimate import memory_bound
from ctl_merge.merging import Merge
from ctl_merge.methods.angles import energy, energy_shares, gram
from ctl_merge.roles import roles
from ctl_merge.settings import parse_setting

W = "model.layers.0.weight"
ROOT2 = math.sqrt(2)


def call(name: str, stack: Any, **parameters: Any) -> torch.Tensor:
    """A method as a plain function of a stack, per-model parameters given as tuples."""
    tensors = torch.as_tensor(stack, dtype=torch.float64)
    ones = [1] * (tensors.ndim - 1)
    columns = {
        n: torch.tensor(v, dtype=torch.float64).view(-1, *ones) if isinstance(v, tuple) else v
        for n, v in parameters.items()
    }
    return METHODS[name].function(tensors, **columns)


def assert_near(found: torch.Tensor, wanted: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=torch.float64), rtol=0, atol=atol)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- nuslerp


def test_nuslerp_by_hand():
    """Weights 1 and 2 are t = 2/3: at a right angle 60° of 90°, so (cos 60° · 2, sin 60° · 4)."""
    rows = [[2.0, 0.0], [0.0, 4.0]]
    assert_near(call("nuslerp", rows, weight=(1.0, 2.0)), [1.0, 2 * math.sqrt(3)])
    assert_near(call("nuslerp", rows, weight=(1.0, -1.0)), [ROOT2, 2 * ROOT2])  # no weight: the middle


def test_nuslerp_by_rows_and_columns_by_hand():
    """The first pair of vectors is at a right angle, the second parallel: an arc and a straight line."""
    first, second = [[2.0, 0.0], [3.0, 3.0]], [[0.0, 4.0], [6.0, 6.0]]
    wanted = [[1.0, 2 * math.sqrt(3)], [5.0, 5.0]]
    by_rows = call("nuslerp", [first, second], weight=(1.0, 2.0), nuslerp_flatten=False)
    assert_near(by_rows, wanted)
    turned = torch.tensor([first, second]).transpose(1, 2)
    own = {"weight": (1.0, 2.0), "nuslerp_flatten": False, "nuslerp_row_wise": True}
    assert_near(call("nuslerp", turned, **own).T, wanted)


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("weight, model", [((1.0, 0.0), "a"), ((0.0, 1.0), "b")])
def test_nuslerp_ends_at_the_models(tmp_path: Path, flatten: bool, weight: tuple[float, float], model: str):
    family = draw_family(["base", "a", "b"], {W: (40, 50)})
    merged = open_family(tmp_path, "nuslerp", family, {"weight": weight, "nuslerp_flatten": flatten})
    assert torch.equal(merged.read(W), family[model][W])


def test_nuslerp_exchanged_is_the_same():
    stack = draw(2, 30, 20)
    for own in ({}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}):
        there = call("nuslerp", stack, weight=(0.3, 0.8), **own)
        assert_near(call("nuslerp", stack.flip(0), weight=(0.8, 0.3), **own), there)


@pytest.mark.parametrize("own", [{}, {"nuslerp_flatten": False}])
def test_nuslerp_of_opposite_vectors_is_a_straight_line(own: Mapping[str, Any]):
    delta = draw(1, 30, 20)
    assert_near(call("nuslerp", torch.cat([delta, -delta]), weight=(0.75, 0.25), **own), delta[0] / 2)


def test_nuslerp_with_a_zero_vector_is_finite():
    """It has no angle; a right one is assumed, as `slerp` does."""
    stack = torch.stack([draw(4, 5), torch.zeros(4, 5)])
    for own in ({}, {"nuslerp_flatten": False}):
        assert_near(call("nuslerp", stack, weight=(1.0, 1.0), **own), stack[0] / ROOT2)


# ---- multislerp


def test_multislerp_by_hand():
    """Directions (1, 0) and (0, 1), mean length 3: (3, 3) / √2; by weights 3 : 4 it is (3, 4) / 5 · (6 + 16) / 7."""
    rows = [[2.0, 0.0], [0.0, 4.0]]
    assert_near(call("multislerp", rows, weight=(1.0, 1.0)), [3 / ROOT2, 3 / ROOT2], 1e-7)
    assert_near(call("multislerp", rows, weight=(3.0, 4.0)), [3 / 5 * 22 / 7, 4 / 5 * 22 / 7], 1e-7)
    unnormalized = call("multislerp", rows, weight=(3.0, 4.0), normalize_weights=False, eps=0.0)
    assert_near(unnormalized, [3 / 5 * 22, 4 / 5 * 22])


def test_multislerp_adds_what_cancels_linearly():
    assert_near(call("multislerp", [[1.0, 0.0], [-2.0, 0.0]], weight=(1.0, 1.0)), [-0.5, 0.0])
    three = [[math.cos(angle), math.sin(angle)] for angle in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    assert_near(call("multislerp", three, weight=(1.0, 1.0, 1.0)), [0.0, 0.0])


def test_multislerp_returns_one_model_whatever_its_weight(tmp_path: Path):
    family = draw_family(["base", "a"], {W: (40, 50)})
    merged = open_family(tmp_path, "multislerp", family, {"weight": (0.3,), "normalize_weights": False})
    assert torch.equal(merged.read(W), family["a"][W])


def test_weights_that_cancel_are_refused_where_they_are_a_divisor(tmp_path: Path):
    family, case = draw_family(["base", "a", "b"], {W: (4, 5)}), {"weight": (1.0, -1.0)}
    with pytest.raises(MismatchError, match="set normalize_weights: false"):
        open_family(tmp_path, "multislerp", family, case)
    open_family(tmp_path, "multislerp", family, {**case, "normalize_weights": False}).read(W)


# ---- karcher


def test_karcher_by_hand():
    """On a circle the mean is at the mean angle: 0°, 20° and 100° give 40°; lengths 1, 2 and 6 give 3."""
    angles, lengths = [math.radians(a) for a in (0, 20, 100)], (1.0, 2.0, 6.0)
    rows = [[n * math.cos(a), n * math.sin(a)] for n, a in zip(lengths, angles, strict=True)]
    wanted = [3 * math.cos(math.radians(40)), 3 * math.sin(math.radians(40))]
    assert_near(call("karcher", rows, max_iter=100, tol=1e-12), wanted)
    assert_near(call("karcher", torch.eye(3) * 2), [2 / math.sqrt(3)] * 3)


def test_the_karcher_mean_of_two_is_slerp_at_one_half(tmp_path: Path):
    family = draw_family(["base", "a"], {W: (40, 50)}, spread=1.0)
    family = {model: {W: tensors[W] / tensors[W].norm()} for model, tensors in family.items()}
    slerp = open_family(tmp_path / "slerp", "slerp", family, {"t": 0.5}).read(W)
    mean = open_family(tmp_path / "karcher", "karcher", family, {}).read(W)
    assert ulps(mean, as_float64(slerp), [tensors[W] for tensors in family.values()]).max() <= 2


def test_the_karcher_mean_has_no_way_to_go():
    """The tangent vectors to all inputs sum to zero there."""
    stack = draw(5, 12) + 0.5
    mean = call("karcher", stack, max_iter=200, tol=1e-13)
    mean, units = mean / mean.norm(), stack / stack.norm(dim=1, keepdim=True)
    angles = torch.acos(units @ mean)
    logs = (units - torch.outer(units @ mean, mean)) * (angles / angles.sin()).unsqueeze(1)
    assert logs.norm(dim=1).min() > 0.5 and logs.sum(0).norm() < 1e-10


def test_karcher_of_opposite_and_of_zero_tensors():
    """Of two opposite directions the first is taken; a zero tensor has none, but counts in the mean length."""
    first = draw(6)
    assert_near(call("karcher", torch.stack([first, -first])), first)
    assert_near(call("karcher", torch.stack([first, 0 * first])), first / 2)
    assert_near(call("karcher", torch.zeros(3, 4)), [0.0] * 4)


def test_karcher_of_tiny_tensors_is_not_zero():
    """Lengths have no threshold: `tol` is an angle."""
    tiny = 1e-9 * draw(3, 7)
    wanted = karcher_by_steps(None, tiny.numpy(), None)
    np.testing.assert_allclose(call("karcher", tiny).numpy(), wanted, rtol=1e-9)


def test_steps_of_a_gradient_are_whole_numbers():
    """`max_iter: [1, 8]` is 1 up to the last layer: there is no fraction of a step to interpolate to."""
    setting = parse_setting([1, 8], METHODS["karcher"].parameters["max_iter"], [])
    assert setting is not None and [setting.at(W, place) for place in (0.0, 0.5, 0.9, 1.0)] == [1, 1, 1, 8]


# ---- model stock

STOCK = [[1.0, 0.0], [0.5, math.sqrt(3) / 2]]  # 60°: c = 1/2, t = 2 · 1/2 / (1 + 1/2) = 2/3


def test_model_stock_by_hand():
    assert_near(call("model_stock", STOCK), [0.5, math.sqrt(3) / 6])  # 2/3 of (3/4, √3/4)
    assert_near(call("model_stock", [*STOCK, STOCK[0]]), [6 / 7 * 2.5 / 3, 6 / 7 * math.sqrt(3) / 6])  # c = 2/3
    both = [[STOCK[0], [2.0, 0.0]], [STOCK[1], [2.0, 0.0]]]
    assert_near(call("model_stock", both, filter_wise=True), [[0.5, math.sqrt(3) / 6], [2.0, 0.0]])


def test_model_stock_of_opposed_task_vectors_by_hand():
    """120°: c = -1/2, t = -1 / (1/2) = -2, away from the mean (1/4, √3/4); 180°: no finite t, the base."""
    opposed = [[1.0, 0.0], [-0.5, math.sqrt(3) / 2]]
    assert_near(call("model_stock", opposed), [-0.5, -math.sqrt(3) / 2])
    assert_near(call("model_stock", opposed, clamp=True), [0.0, 0.0])
    assert_near(call("model_stock", [[1.0, 2.0], [-1.0, -2.0]]), [0.0, 0.0])
    three = [[math.cos(angle), math.sin(angle)] for angle in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    assert_near(call("model_stock", three), [0.0, 0.0])


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_returns_identical_task_vectors(filter_wise: bool):
    delta = draw(20, 30)
    assert_near(call("model_stock", delta.expand(3, -1, -1), filter_wise=filter_wise), delta)


def test_model_stock_of_orthogonal_task_vectors_is_the_base():
    assert_near(call("model_stock", torch.eye(4)), [0.0] * 4)


def test_the_angle_of_model_stock_does_not_depend_on_the_scale():
    """Norms whose product is small have their own cosine too."""
    stack = draw(3, 50) + 1
    assert_near(call("model_stock", 1e-6 * stack) * 1e6, call("model_stock", stack))


# ---- what all four have in common: inner products of whole tensors


ARCS = [
    ("nuslerp", {"weight": (0.7, 0.4)}),
    ("multislerp", {"weight": (0.7, 0.4, 0.3)}),
    ("karcher", {}),
    ("model_stock", {}),
]


@pytest.mark.parametrize("name, case", ARCS, ids=str)
def test_angles_are_those_of_the_whole_tensor(tmp_path: Path, name: str, case: Mapping[str, Any]):
    """Over several chunks, in the memory of one."""
    names = ["base", *"abc"][: len(case.get("weight", "abc")) + 1]
    family = draw_family(names, {W: (2 * CHUNK + 77,)}, spread=1.0)
    family["b"][W][:CHUNK] = family["a"][W][:CHUNK]  # parallel in the first chunk only
    family = {m: t for m, t in family.items() if m != "base" or name != "karcher"}
    merged = open_family(tmp_path, name, family, case)
    assert merged.block(W) == CHUNK
    wanted = expected(name, family, case, W)
    assert ulps(merged.read(W), wanted, [tensors[W] for tensors in family.values()]).max() <= 2


@pytest.mark.parametrize("name", ["nuslerp", "multislerp"])
def test_without_a_base_the_weights_themselves_are_merged(tmp_path: Path, name: str):
    family, case = draw_family("ab", {W: (40, 50)}, spread=1.0), {"weight": (0.7, 0.4)}
    merged = open_family(tmp_path, name, family, case)
    assert merged.plan.tensors[W].base is None
    wanted = expected(name, family, case, W)
    assert ulps(merged.read(W), wanted, [tensors[W] for tensors in family.values()]).max() <= 2
    other = open_family(tmp_path / "based", name, draw_family(["base", "a", "b"], {W: (40, 50)}, spread=1.0), case)
    assert other.plan.tensors[W].base is not None


def test_a_named_base_is_an_ordinary_input_of_karcher(tmp_path: Path):
    family = draw_family("abc", {W: (40, 50)}, spread=1.0)
    listed = open_family(tmp_path / "1", "karcher", family, {}).read(W)
    based = open_family(tmp_path / "2", "karcher", family, {}, base_model="c", order=["a", "b"]).read(W)
    assert torch.equal(listed, based)


def test_the_base_of_task_vectors_may_be_given_where_the_recipe_has_none(tmp_path: Path):
    family, case = draw_family(["base", "a", "b"], {W: (4, 5)}), {"weight": (0.7, 0.4)}
    recipe = write_family(tmp_path, "nuslerp", {m: family[m] for m in "ab"}, case)
    base = write_family(tmp_path, "nuslerp", family, case)
    with pytest.raises(RecipeError, match="nuslerp names no base model"):
        roles(Merge(recipe), None)
    found, parents = roles(Merge(recipe), base.base)
    assert torch.equal(found.read(W), family["base"][W]) and list(parents) == ["a", "b"]
    with pytest.raises(RecipeError, match="has a base in the recipe already"):
        roles(Merge(base), base.base)


def test_parameters_decide_tensor_by_tensor_what_is_merged_whole(tmp_path: Path):
    """Memory is that of the largest tensor that is merged whole, not of the largest."""
    name, own, whole, flag = "nuslerp", {"weight": (1.0, 1.0), "nuslerp_flatten": False}, "nuslerp_row_wise", True
    shapes = {"model.embed_tokens.weight": (CHUNK // 4, 16), "model.layers.0.mlp.weight": (20, 30)}
    family = draw_family(["base", "a", "b"], shapes)
    choices = [{"filter": "mlp", "value": flag}, {"value": not flag}]
    mixed = open_family(tmp_path / "mixed", name, family, {**own, whole: choices})
    assert [mixed.block(tensor) for tensor in shapes] == [CHUNK, 600]
    everywhere = open_family(tmp_path / "everywhere", name, family, {**own, whole: flag})
    assert [everywhere.block(tensor) for tensor in shapes] == [4 * CHUNK, 600]
    assert memory_bound([mixed], 1) < memory_bound([everywhere], 1)
    for tensor in shapes:
        value = flag if "mlp" in tensor else not flag
        wanted = expected(name, family, {**own, whole: value}, tensor)
        assert ulps(mixed.read(tensor), wanted, [tensors[tensor] for tensors in family.values()]).max() <= 2


# ---- reports

NORM = "model.norm.weight"


def report(folder: Path, name: str, family: Mapping[str, Mapping[str, Sequence[float]]], case: Mapping[str, Any]):
    tensors = {m: {n: torch.tensor(v) for n, v in t.items()} for m, t in family.items()}
    said = METHODS[name].report
    assert said is not None
    return said(open_family(folder, name, tensors, case).measures.all())


PLAIN = {"base": {W: [0.0, 0.0], NORM: [0.0, 0.0]}, "a": {W: [1.0, 0.0], NORM: [1.0, 0.0]}}


@pytest.mark.parametrize(
    "name, case, other, said",
    [
        ("nuslerp", {"weight": (1.0, 1.0)}, [0.0, 1.0], None),
        ("nuslerp", {"weight": (1.0, 1.0)}, [-1.0, 0.0], "1 of 2 tensors were interpolated linearly"),
        ("nuslerp", {"weight": (1.0, 1.0), "nuslerp_flatten": False}, [-1.0, 0.0], None),
        ("multislerp", {"weight": (1.0, 1.0)}, [0.0, 1.0], None),
        ("multislerp", {"weight": (1.0, 1.0)}, [-2.0, 0.0], "the weighted directions of 1 of 2 tensors cancel"),
        ("model_stock", {}, [-0.5, math.sqrt(3) / 2], "is -2 to 0 over 2 tensors; it is negative in 1: `clamp: true`"),
        ("model_stock", {"clamp": True}, [-0.5, math.sqrt(3) / 2], "is 0 to 0 over 2 tensors"),
        ("model_stock", {"filter_wise": True}, [-0.5, math.sqrt(3) / 2], None),
    ],
)
def test_what_a_reader_should_know_is_told(
    tmp_path: Path, name: str, case: Mapping[str, Any], other: Sequence[float], said: str | None
):
    """The norm's task vectors are at a right angle."""
    found = report(tmp_path, name, {**PLAIN, "b": {W: other, NORM: [0.0, 1.0]}}, case)
    assert (found is None) if said is None else (found is not None and said in found)
    assert found is None or "clamp" in (said or "") or "clamp: true" not in found


def test_karcher_tells_which_tensors_ran_out_of_steps(tmp_path: Path):
    rows = {m: {W: v, NORM: [1.0, 0.0]} for m, v in zip("abc", ([1.0, 0.0], [0.9, 0.3], [0.0, 1.0]), strict=True)}
    assert report(tmp_path / "1", "karcher", rows, {"max_iter": 1}) == "1 of 2 tensors took all of `max_iter` steps"
    assert report(tmp_path / "2", "karcher", rows, {"max_iter": 100}) is None


# ---- matrices


def diagonal(*values: float) -> list[list[float]]:
    return np.diag(values).tolist()


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix)


def low_rank(models: int, rows: int, columns: int, rank: int) -> torch.Tensor:
    return draw(models, rows, rank, seed=1) @ draw(models, rank, columns, seed=2)


def test_tsv_by_hand():
    """One triple each; those of the first two are orthogonal and stay, the small ones fall."""
    assert_near(call("tsv", [diagonal(3, 0.5), diagonal(0.25, 2)]), diagonal(3, 2))
    assert_near(call("tsv", [diagonal(3, 0.5), diagonal(0.25, 2)], lambda_=0.5), diagonal(1.5, 1))
    # The same left vector twice: made as orthogonal as one dimension allows, it is e₁ / √2 twice.
    assert_near(call("tsv", [diagonal(3, 0), [[0, 2], [0, 0]]]), [[3 / ROOT2, 2 / ROOT2], [0, 0]])


def test_tsv_of_orthogonal_tasks_is_their_sum():
    left, right = (torch.linalg.qr(draw(12, 12, seed=seed)).Q for seed in (1, 2))
    values = torch.arange(12, 0, -1, dtype=torch.float64)
    tasks = [(left[:, i::3] * values[i::3]) @ right[:, i::3].T for i in range(3)]
    assert_near(call("tsv", torch.stack(tasks)), sum(tasks))


def test_tsv_of_one_task_is_the_task():
    delta = draw(1, 9, 14)
    assert_near(call("tsv", delta), delta[0])
    assert_near(call("tsv", low_rank(1, 9, 14, 3)), low_rank(1, 9, 14, 3)[0])


def test_tsv_of_copies_is_their_leading_part():
    """Every copy keeps the same triples; nothing of vectors that a singular value of zero would make up."""
    delta = draw(12, 9)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    assert_near(call("tsv", delta.expand(3, -1, -1)), (u[:, :3] * s[:3]) @ vt[:3])
    assert_near(call("tsv", delta.expand(3, -1, -1), k=99), delta)


def test_k_beyond_the_rank_keeps_the_whole_rank():
    """Of rank 2, whatever k: no triple is made up for a singular value of zero."""
    deltas = low_rank(2, 10, 8, 2)
    assert_near(call("tsv", deltas, k=2), call("tsv", deltas, k=7))
    assert int((singular_values(call("tsv", deltas)) > 1e-9).sum()) == 4


@pytest.mark.parametrize("shape", [(3, 2, 7), (3, 7, 2)])
def test_tsv_averages_matrices_that_have_no_triple_for_every_task(shape: tuple[int, ...]):
    assert_near(call("tsv", draw(*shape)), draw(*shape).mean(0))


def test_knots_by_hand():
    """One direction for both task vectors, whose coordinates 3 and -1 are voted on: + wins, of one model."""
    ones = (1.0, 1.0)
    parallel = [[[3, 0], [3, 0]], [[-1, 2], [-1, 2]]]
    assert_near(call("knots", parallel, weight=ones, density=ones), [[3, 2], [3, 2]])
    # Orthogonal columns: nobody else has a coordinate there, so that each is kept as it is.
    assert_near(call("knots", [diagonal(3, 0), diagonal(0, -2)], weight=ones, density=ones), diagonal(3, -2))
    weighted = call("knots", parallel, weight=(0.5, 2.0), density=ones, inner="linear", divide="none", lambda_=2.0)
    assert_near(weighted, [[-1, 8], [-1, 8]])


def test_knots_keeps_adapters_in_the_space_that_they_span():
    deltas = low_rank(2, 10, 8, 2)
    assert int((singular_values(call("knots", deltas, weight=(1.0, 1.0), density=(0.5, 0.5))) > 1e-9).sum()) <= 4


def test_iso_c_by_hand():
    """diag(3, 1), turned by 90°: both singular values become 2."""
    assert_near(call("iso_c", [[[0, 2], [0.5, 0]], [[0, 1], [0.5, 0]]]), [[0, 2], [2, 0]])
    assert_near(call("iso_c", [diagonal(-3, 0), diagonal(0, 1)], lambda_=0.5), diagonal(-1, 1))


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("shape", [(3, 12, 9), (3, 9, 12), (1, 9, 12)])
def test_isotropic_merges_have_one_singular_value(name: str, shape: tuple[int, ...]):
    values = singular_values(call(name, draw(*shape)))
    assert_near(values, values.mean().expand(9))
    if name == "iso_c":
        assert_near(values.mean(), singular_values(draw(*shape).sum(0)).mean())


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_isotropic_merges_keep_the_rank(name: str):
    """What LoRAs have left untouched stays so, and the sum of Iso-C's singular values is that of the sum."""
    deltas = low_rank(3, 20, 15, 2)
    values = singular_values(call(name, deltas))
    assert values[6:].max() < 1e-9
    assert_near(values[:6], values[:6].mean().expand(6))
    assert_near(values.sum(), singular_values(deltas.sum(0)).sum(), 1e-9)


def test_iso_cts_by_hand():
    """Rank 4, half of it common: 8 and 4 of the sum, then 3 and 2 of the tasks' own; their mean is 17 / 4."""
    stack = [diagonal(4, 1, 3, 0), diagonal(4, 3, 0, 2)]
    assert_near(call("iso_cts", stack, common_space_fraction=0.5), diagonal(*[17 / 4] * 4))
    assert_near(call("iso_cts", stack, common_space_fraction=1.0), diagonal(*[17 / 4] * 4))  # (8 + 4 + 3 + 2) / 4


def test_iso_cts_without_own_directions_is_iso_c():
    assert_near(call("iso_cts", draw(3, 12, 9), common_space_fraction=1.0), call("iso_c", draw(3, 12, 9)))


def test_iso_cts_shares_out_no_more_directions_than_there_are():
    """Rank 5 for three tasks without common space: two each would be six."""
    values = singular_values(call("iso_cts", draw(3, 5, 8), common_space_fraction=0.0))
    assert_near(values, values.mean().expand(5))


def test_wudi_by_hand():
    """Tasks that respond to different inputs keep what each does: their sum. On a shared input it is the mean."""
    assert_near(call("wudi", [diagonal(3, 0), diagonal(0, 2)], ridge=1e-12), diagonal(3, 2), 1e-9)
    assert_near(call("wudi", [[[2.0], [0.0]], [[0.0], [4.0]]]), [[1.0], [2.0]])
    # Σ G = diag(1, 1), ρ = 1: halfway from the mean diag(1.5, 1) to the sum.
    assert_near(call("wudi", [diagonal(3, 0), diagonal(0, 2)], ridge=1.0), diagonal(2.25, 1.5))


@pytest.mark.parametrize("shape", [(3, 30, 20), (3, 4, 20), (2, 20, 20), (3, 7, 21)])
def test_wudi_is_a_stationary_point_of_its_loss(shape: tuple[int, ...]):
    """In both ways of solving: by columns, and by the fewer rows of all task vectors."""
    deltas, ridge = draw(*shape), 1e-3
    tau = call("wudi", deltas, ridge=ridge).requires_grad_()
    squares = deltas.square().sum((1, 2))
    loss = (((tau - deltas) @ deltas.transpose(1, 2)).square().sum((1, 2)) / squares).sum()
    pull = ridge * shape[0] / shape[2] * (tau - deltas.mean(0)).square().sum()
    (gradient,) = torch.autograd.grad(loss + pull, tau)
    assert gradient.abs().max() < 1e-12
    (elsewhere,) = torch.autograd.grad(
        (((tau + 0.01 - deltas) @ deltas.transpose(1, 2)).square().sum((1, 2)) / squares).sum(), tau
    )
    assert elsewhere.abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(3, 30, 20), (3, 4, 20)])
def test_wudi_without_ridge_is_the_papers_closed_form(shape: tuple[int, ...]):
    deltas = draw(*shape)
    grams = deltas.transpose(1, 2) @ deltas / deltas.square().sum((1, 2)).view(-1, 1, 1)
    wanted = (deltas @ grams).sum(0) @ torch.linalg.pinv(grams.sum(0), rtol=1e-10)
    assert_near(call("wudi", deltas, ridge=1e-10), wanted, 1e-6)


def test_wudi_leaves_a_zero_task_vector_out_of_its_loss():
    deltas = torch.cat([draw(2, 9, 6), torch.zeros(1, 9, 6)])
    assert_near(call("wudi", deltas, ridge=1e-9), call("wudi", deltas[:2], ridge=1e-9), 1e-7)


MATRICES = [("tsv", {}), ("tsv", {"k": 2}), ("iso_c", {}), ("iso_cts", {"common_space_fraction": 0.5}), ("wudi", {})]


def rotation(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed)).Q


def with_values(values: Sequence[float], seed: int) -> torch.Tensor:
    """A matrix with these singular values, equal ones among them."""
    return rotation(len(values), seed) @ torch.diag(torch.tensor(values)).double() @ rotation(len(values), seed + 50)


@pytest.mark.parametrize(
    "values", [(3, 3, 3, 3, 1, 1), (1, 1, 1, 1, 1, 1), (3, 2, 2, 2, 0, 0), (6, 5, 4, 3, 2, 1), (0, 0, 0, 0, 0, 0)]
)
@pytest.mark.parametrize("name, case", MATRICES, ids=str)
def test_the_basis_that_an_svd_happens_to_return_does_not_matter(
    name: str, case: Mapping[str, Any], values: Sequence[float]
):
    """Rotating all task vectors rotates the result; where singular values are equal an SVD takes other vectors then."""
    deltas = torch.stack([with_values(values, seed) for seed in (1, 2, 3)])
    left, right = rotation(6, 8), rotation(6, 9)
    assert_near(call(name, left @ deltas @ right, **case), left @ call(name, deltas, **case) @ right, 1e-9)
    assert_near(call(name, deltas.flip(0), **case), call(name, deltas, **case), 1e-9)


@pytest.mark.parametrize("name, case", MATRICES, ids=str)
def test_experts_that_are_stored_as_one_tensor_are_merged_as_those_stored_apart(name: str, case: Mapping[str, Any]):
    stacked = draw(3, 4, 12, 9)
    apart = [call(name, stacked[:, expert], **case) for expert in range(4)]
    assert torch.equal(call(name, stacked, **case), torch.stack(apart))


@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 4, 5, 3, 3)])
@pytest.mark.parametrize("name, case", MATRICES, ids=str)
def test_numbers_vectors_and_kernels_are_averaged(name: str, case: Mapping[str, Any], shape: tuple[int, ...]):
    assert_near(call(name, draw(*shape), **case), draw(*shape).mean(0))


@pytest.mark.parametrize("name, case", MATRICES, ids=str)
def test_task_vectors_that_cancel_or_are_zero(name: str, case: Mapping[str, Any]):
    delta = draw(1, 8, 6)
    assert_near(call(name, torch.zeros(3, 8, 6), **case), torch.zeros(8, 6))
    found = call(name, torch.cat([delta, -delta]), **case)
    assert found.isfinite().all()
    if name != "iso_cts":  # its remainders are those of each task
        assert_near(found, torch.zeros(8, 6))
    assert call(name, torch.cat([delta, 0 * delta]), **case).isfinite().all()


@pytest.mark.parametrize("name, case", MATRICES, ids=str)
def test_what_is_not_finite_spoils_its_matrix_only(tmp_path: Path, name: str, case: Mapping[str, Any]):
    """With `nonfinite: allow` there is a result, not a failed decomposition."""
    family = draw_family(["base", "a", "b"], {W: (2, 12, 9)})
    family["a"][W][0, 3, 4] = torch.nan
    found = open_family(tmp_path, name, family, case, nonfinite="allow").read(W)
    assert found[0].isnan().all() and found[1].isfinite().all()


def test_a_recipe_names_its_options(tmp_path: Path):
    for name, case in [("tsv", {"k": None}), ("tsv", {"k": [3, None]}), ("wudi", {"ridge": "1e-4"})]:
        open_family(tmp_path, name, draw_family(["base", "a", "b"], {W: (6, 8)}), case).read(W)
    for name, case in [("tsv", {"k": 0}), ("wudi", {"ridge": 0}), ("iso_cts", {"common_space_fraction": 1.1})]:
        with pytest.raises(RecipeError, match=next(iter(case))):
            open_family(tmp_path, name, draw_family(["base", "a", "b"], {W: (6, 8)}), case)


def test_every_method_here_has_a_definition():
    assert {name for name, _ in ARCS} | {name for name, _ in MATRICES} == ROWS.keys() & {
        "nuslerp", "multislerp", "karcher", "model_stock", "tsv", "iso_c", "iso_cts", "wudi",
    }  # fmt: skip


def test_a_merge_is_written_with_what_it_tells(tmp_path: Path):
    family = draw_family(["base", "a", "b"], {W: (30, 40), NORM: (64,)})
    result = ctl_merge.merge(write_family(tmp_path, "model_stock", family, {}), tmp_path / "out")
    assert any(line.startswith("t, the share of the mean task vector") for line in result.manifest["decisions"])


@pytest.mark.parametrize("count", [1, 2, 1023, 1024, 1025, 5000, 1 << 17])
def test_inner_products_are_the_exact_ones_but_for_a_few_roundings(count: int):
    """Against a sum that is rounded once; a sum in halves rounds a term as often as the count can be halved."""
    one, other = torch.randn(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    products = (one * other).tolist()
    bound = (math.log2(count) + 2) * 2.0**-53 * sum(map(abs, products))
    found = gram(torch.stack([one, other]))
    assert abs(float(found[0, 1]) - math.fsum(products)) <= bound
    assert torch.equal(found, found.T) and torch.equal(found.diagonal(), energy(torch.stack([one, other])))


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_shares_of_energy_are_equal_where_none_can_be_told(make: Any):
    for energies, wanted in (([1.0, 3.0], [0.25, 0.75]), ([0.0, 0.0], [0.5, 0.5]), ([math.nan, 5.0], [0.5, 0.5])):
        assert energy_shares(make(energies), 1).tolist() == wanted
