"""Each method against numbers worked by hand, against its definition in float64, and against other implementations."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft.utils.merge_utils as peft_merge
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from references import (
    METHODS,
    as_float64,
    cases,
    draw_family,
    elect_and_merge,
    expected,
    keep_largest,
    last_place,
    members,
    open_family,
    philox_uniform,
    round_once,
    ulps,
)

from ctl_merge.checkpoint import CHUNK
from ctl_merge.methods.order import count_lower, count_upper, locate, value_at
from ctl_merge.methods.sparsify import kept_count, kept_ranks, magnitude_cut, trim

W = "model.layers.0.weight"
SHAPES = {W: (80, 100), "model.layers.1.weight": (33, 7), "model.norm.weight": (64,)}


def call(name: str, rows: Sequence[Sequence[float]], **parameters: Any) -> list[float]:
    """A method as a plain function on the rows, per-model parameters given as tuples."""
    stack = torch.tensor(rows, dtype=torch.float64)
    columns = {
        n: torch.tensor(v, dtype=torch.float64).view(-1, 1) if isinstance(v, tuple) else v
        for n, v in parameters.items()
    }
    return METHODS[name].function(stack, **columns).tolist()


# ---- by hand


def test_linear_by_hand():
    rows = [[1.0, 2.0, -4.0], [3.0, 2.0, 4.0]]
    assert call("linear", rows, weight=(3.0, 1.0)) == [1.5, 2.0, -2.0]  # (3 · 1 + 1 · 3) / 4, ...
    assert call("linear", rows, weight=(3.0, 1.0), normalize=False) == [6.0, 8.0, -8.0]


def test_passthrough_by_hand():
    assert call("passthrough", [[1.0, -2.0]], scale=(1.5,)) == [1.5, -3.0]


def test_task_arithmetic_by_hand():
    rows = [[1.0, 2.0], [3.0, -2.0]]
    assert call("task_arithmetic", rows, weight=(1.0, 0.5)) == [2.5, 1.0]
    assert call("task_arithmetic", rows, weight=(1.0, 0.5), lambda_=2.0) == [5.0, 2.0]
    assert call("task_arithmetic", rows, weight=(3.0, 1.0), normalize=True) == [1.5, 1.0]


TIES_ROWS = [[3.0, -1.0, 2.0, 0.5], [1.0, -4.0, -2.0, 0.25], [-2.0, 5.0, 1.0, 0.0]]


def test_ties_by_hand():
    """Density 0.5 keeps two of four: (3, 2), (-4, -2), (-2, 5). Votes 1, 1, 0, 0 are all +: 3, 5 and 2 have it."""
    assert call("ties", TIES_ROWS, weight=(1.0, 1.0, 1.0), density=(0.5,) * 3) == [3.0, 5.0, 2.0, 0.0]


def test_ties_with_weights_by_hand():
    """Weights 1, 2, 1 turn two votes: 3 - 2, -8 + 5, 2 - 4, 0. The divisor is the weight, the number, or nothing."""
    own: dict[str, Any] = {"weight": (1.0, 2.0, 1.0), "density": (0.5,) * 3}
    assert call("ties", TIES_ROWS, **own) == [3.0, -4.0, -2.0, 0.0]
    assert call("ties", TIES_ROWS, **own, divide="count") == [3.0, -8.0, -4.0, 0.0]
    assert call("ties", TIES_ROWS, **own, divide="none") == [3.0, -8.0, -4.0, 0.0]
    assert call("ties", TIES_ROWS, **own, normalize=False, lambda_=0.5) == [1.5, -4.0, -2.0, 0.0]


def test_ties_rescaled_by_hand():
    """Of 1, -3, 2, 2 half is kept: -3 and both 2, times 8/7; a density of 1 changes nothing."""
    rows = [[1.0, -3.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0]]
    own = {"weight": (7.0, 1.0), "density": (0.5, 1.0), "rescale": True, "divide": "none"}
    assert call("ties", rows, **own) == [8.0, -24.0, 16.0, 16.0]


def test_ties_elections_by_hand():
    """Untrimmed: the second column's mass is -1 - 4 + 5 = 0, which counts as +, its majority of signs is -."""
    own: dict[str, Any] = {"weight": (1.0,) * 3, "density": (1.0,) * 3}
    assert call("ties", TIES_ROWS, **own, elect="unweighted") == [2.0, 5.0, 1.5, 0.375]
    assert call("ties", TIES_ROWS, **own, elect="count") == [2.0, -2.5, 1.5, 0.375]


def test_a_vote_of_zero_takes_the_majoritys_sign_where_the_paper_says_so():
    rows = [[1.0, -3.0, -2.0], [-1.0, -1.0, 1.0]]  # votes 0, -4, -1
    own: dict[str, Any] = {"weight": (1.0, 1.0), "density": (1.0, 1.0), "elect": "unweighted"}
    assert call("ties", rows, **own, majority=torch.tensor([-1.0])) == [-1.0, -2.0, -2.0]
    assert call("ties", rows, **own) == [1.0, -2.0, -2.0]


@pytest.mark.parametrize("last, majority", [(-5.0, -1.0), (5.0, 1.0), (0.0, 1.0)])
def test_the_majority_is_that_of_the_elected_signs(tmp_path: Path, last: float, majority: float):
    """Votes 0, 3, -40 and `last`: each counts once, whatever its mass, and a draw is +."""
    rows = [[1.0, 2.0, -30.0, last], [-1.0, 1.0, -10.0, 0.0]]
    family = {model: {W: torch.tensor(row)} for model, row in zip("ab", rows, strict=True)} | {
        "base": {W: torch.zeros(4)}
    }
    case = {"weight": (1.0, 1.0), "elect": "unweighted"}
    assert open_family(tmp_path, "ties", family, case).read(W).tolist() == [majority, 1.5, -20.0, last]


def test_a_negative_weight_turns_a_vote_around():
    """Ballots (2, 2) and (-1, -3): + by the first model, 2 · 1 / 1, and - by the second, 3 · -1 / -1."""
    rows = [[2.0, 2.0], [1.0, 3.0]]
    own: dict[str, Any] = {"weight": (1.0, -1.0), "density": (1.0, 1.0)}
    assert call("ties", rows, **own) == [2.0, 3.0]
    assert call("ties", rows, **own, divide="none") == [2.0, -3.0]


def test_a_cut_through_equal_magnitudes_keeps_them_all():
    """k = 2 of 5, but three entries have the second largest magnitude."""
    rows = [[1.0, -2.0, 2.0, 3.0, 2.0]]
    assert call("ties", rows, weight=(1.0,), density=(0.4,)) == [0.0, -2.0, 2.0, 3.0, 2.0]


def test_a_small_density_keeps_at_least_one_entry():
    assert call("ties", [[1.0, -3.0, 2.0]], weight=(1.0,), density=(0.01,)) == [0.0, -3.0, 0.0]


def test_a_density_of_zero_keeps_nothing():
    assert call("ties", [[1.0, -3.0, 2.0]] * 2, weight=(1.0, 1.0), density=(0.0, 1.0)) == [1.0, -3.0, 2.0]


DARE_ROWS, DARE_NOISE = [[2.0, -4.0, 6.0], [1.0, 1.0, -8.0]], [[0.1, 0.5, 0.49], [0.24, 0.25, 0.0]]


def dare(name: str, **parameters: Any) -> list[float]:
    """Densities 0.5 and 0.25 keep what has a smaller number: (2, -, 6) and (1, -, -8)."""
    noise = torch.tensor(DARE_NOISE, dtype=torch.float64)
    return call(name, DARE_ROWS, weight=(1.0, 0.5), density=(0.5, 0.25), noise=noise, **parameters)


def test_dare_linear_by_hand():
    assert dare("dare_linear") == [2 / 0.5 + 0.5 * 1 / 0.25, 0.0, 6 / 0.5 - 0.5 * 8 / 0.25]  # 6, 0, -4
    assert dare("dare_linear", rescale=False) == [2.5, 0.0, 2.0]
    # L1 norms 12 and 10 before, 8 and 9 after: factors 1.5 and 10 / 9.
    wanted = [2 * 1.5 + 0.5 * 10 / 9, 0.0, 6 * 1.5 - 0.5 * 80 / 9]
    assert dare("dare_linear", rescale="l1") == pytest.approx(wanted)
    assert dare("dare_linear", rescale=False, lambda_=3.0, normalize=True) == pytest.approx([5.0, 0.0, 4.0])


def test_dare_ties_by_hand():
    """Rescaled (4, 0, 12) and (4, 0, -32), ballots 4 + 2 and 12 - 16: the last entry is the second model's."""
    assert dare("dare_ties") == [6.0, 0.0, -16.0]
    assert dare("dare_ties", normalize=True) == [4.0, 0.0, -32.0]


def test_slerp_at_a_right_angle_by_hand():
    """From (2, 0) to (0, 4) at 60°, t = 2/3: (cos 60° · 2, sin 60° · 4)."""
    assert call("slerp", [[2.0, 0.0], [0.0, 4.0]], t=2 / 3) == pytest.approx([1.0, 2 * math.sqrt(3)])
    assert call("slerp", [[2.0, 0.0], [0.0, 4.0]], t=0.5) == pytest.approx([math.sqrt(2), 2 * math.sqrt(2)])


# ---- against the definition in float64, through the whole pipe


def families(name: str, case: Mapping[str, Any], dtype: torch.dtype, **more: Any) -> dict[str, dict[str, torch.Tensor]]:
    return draw_family(members(name, case), SHAPES, dtype, **more)


# Float32 units in the last place of the largest operand, and the share that must be the definition rounded once.
TOLERANCE = 2.0
SAME = 0.999


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name, case", cases(), ids=str)
def test_every_method_is_its_definition(tmp_path: Path, name: str, case: Mapping[str, Any], storage: torch.dtype):
    """To the last places of float32 in every entry; of 16 bits, rounded once, almost everywhere."""
    family = families(name, case, storage)
    wanted = expected(name, family, case, W, seed=5)
    slack = TOLERANCE * last_place(wanted, [tensors[W] for tensors in family.values()])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        merged = open_family(tmp_path, name, family, case, dtype=str(dtype).removeprefix("torch."), seed=5)
        tensor = merged.read(W)
        assert tensor.dtype == dtype and tensor.shape == SHAPES[W]
        found = as_float64(tensor)
        if dtype == torch.float32:
            assert (np.abs(found - wanted) <= slack).all()
        else:
            assert (round_once(wanted - slack, dtype) <= found).all() and (
                found <= round_once(wanted + slack, dtype)
            ).all()
            assert (found == round_once(wanted, dtype)).mean() >= SAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name, case",
    [
        ("linear", {"weight": (0.5, 0.3, 0.2)}),
        ("linear", {"weight": (1, 1, 1)}),
        ("task_arithmetic", {"weight": (1, 1, 1), "lambda": 0.3}),
        ("slerp", {"t": 0.5}),
    ],
    ids=str,
)
def test_a_sum_halfway_between_two_numbers_becomes_one_of_them(
    tmp_path: Path, name: str, case: Mapping[str, Any], dtype: torch.dtype
):
    """Weights with few digits often give such sums; to which side they go is left to the arithmetic."""
    family = families(name, case, dtype, spread=0.01)
    found = as_float64(open_family(tmp_path, name, family, case).read(W))
    wanted = expected(name, family, case, W)
    slack = 2 * last_place(wanted, [tensors[W] for tensors in family.values()])
    assert (round_once(wanted - slack, dtype) <= found).all() and (found <= round_once(wanted + slack, dtype)).all()


def test_the_outputs_dtype_is_the_bases_unless_the_recipe_names_one(tmp_path: Path):
    family = draw_family(["base", "a"], SHAPES, torch.bfloat16)
    family["a"] = {name: tensor.float() for name, tensor in family["a"].items()}
    case = {"weight": (1.0,)}
    assert open_family(tmp_path, "task_arithmetic", family, case).read(W).dtype == torch.bfloat16
    asked = open_family(tmp_path, "task_arithmetic", family, case, dtype="float32", out_dtype="float16")
    assert asked.read(W).dtype == torch.float16


def test_a_named_base_is_an_ordinary_input_of_linear(tmp_path: Path):
    family = draw_family(["a", "b"], SHAPES)
    found = open_family(tmp_path, "linear", family, {"weight": (0.25, 0.75)}, base_model="a").read(W)
    wanted = 0.25 * as_float64(family["a"][W]) + 0.75 * as_float64(family["b"][W])
    assert ulps(found, wanted, [tensors[W] for tensors in family.values()]).max() <= 2


def test_a_model_without_weight_costs_no_precision(tmp_path: Path):
    """A first model of large numbers at weight 0 must not round the small ones of the others away."""
    family = {"a": {W: torch.full((4,), 1000.0)}, "b": {W: torch.tensor([1e-6, 2e-6, -3e-6, 4.0])}}
    family = {model: {n: t.bfloat16() for n, t in tensors.items()} for model, tensors in family.items()}
    found = open_family(tmp_path, "linear", family, {"weight": (0.0, 1.0)}).read(W)
    assert torch.equal(found, family["b"][W])


Vectors = st_numpy.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(0, 40)), elements=st.floats(-1e3, 1e3, width=32)
)


@settings(deadline=None)
@given(Vectors, st.data())
def test_linear_and_task_arithmetic_are_weighted_sums(vectors: np.ndarray, data: st.DataObject):
    weight = tuple(data.draw(st.floats(-2, 2)) for _ in vectors)
    wanted = np.einsum("i,in->n", weight, vectors.astype(np.float64))
    for found in (
        call("task_arithmetic", vectors.tolist(), weight=weight),
        call("linear", vectors.tolist(), weight=weight, normalize=False),
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-10)


# ---- TIES in every variant

INTEGERS = {"model.layers.0.weight": (30, 20), "model.layers.1.weight": (50,), "model.layers.2.weight": (7, 3)}


def integer_family(models: Sequence[str], seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Task vectors of small integers: many equal magnitudes at the cut, many votes of exactly zero, no rounding."""
    generator = torch.Generator().manual_seed(seed)
    return {
        model: {n: torch.randint(-4, 5, shape, generator=generator).float() for n, shape in INTEGERS.items()}
        for model in models
    }


@pytest.mark.parametrize("trim", ["tensor", "model"])
@pytest.mark.parametrize("elect", ["weighted", "unweighted", "count"])
@pytest.mark.parametrize("divide", ["weights", "count", "none"])
@pytest.mark.parametrize(
    "own",
    [
        {"weight": (1.0, 1.0, 1.0), "density": (0.3, 0.3, 0.3)},
        {"weight": (0.5, 1.0, 0.25), "density": (0.1, 0.6, 1.0), "lambda": 0.5},
        {"weight": (1.0, -0.5, 0.5), "density": (0.5, 0.0, 0.8), "normalize": False},
        {"weight": (0.0, -0.5, -1.0), "density": (1.0, 1.0, 1.0)},
    ],
    ids=["equal", "mixed", "negative weight", "untrimmed"],
)
def test_ties_in_every_variant_with_ties_at_the_cut_and_in_the_votes(
    tmp_path: Path, trim: str, elect: str, divide: str, own: dict[str, Any]
):
    family, case = integer_family(["base", *"abc"]), {**own, "trim": trim, "elect": elect, "divide": divide}
    merged = open_family(tmp_path, "ties", family, case)
    for tensor in INTEGERS:
        wanted = expected("ties", family, case, tensor)
        assert ulps(merged.read(tensor), wanted, [t[tensor] for t in family.values()]).max() <= 1


def test_the_papers_trim_cuts_the_whole_task_vector(tmp_path: Path):
    """Small entries survive in a tensor that has moved much, and large ones fall in one whose neighbours are larger."""
    base = {"model.layers.0.weight": torch.zeros(4), "model.layers.1.weight": torch.zeros(4)}
    model = {
        "model.layers.0.weight": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "model.layers.1.weight": torch.arange(4) + 5.0,
    }
    family, own = {"base": base, "a": model}, {"weight": (1.0,), "density": (0.5,)}
    by_model = open_family(tmp_path / "by model", "ties", family, {**own, "trim": "model"})
    by_tensor = open_family(tmp_path / "by tensor", "ties", family, own)
    assert by_model.read("model.layers.0.weight").tolist() == [0, 0, 0, 0]
    assert by_model.read("model.layers.1.weight").tolist() == [5, 6, 7, 8]
    assert by_tensor.read("model.layers.0.weight").tolist() == [0, 0, 3, 4]
    assert by_tensor.read("model.layers.1.weight").tolist() == [0, 0, 7, 8]


def test_the_papers_cut_is_the_kth_value_of_the_concatenated_vector(tmp_path: Path):
    family = draw_family(["base", *"abc"], {"model.layers.0.weight": (600, 700), "model.layers.1.weight": (5000,)})
    case = {"weight": (1.0,) * 3, "density": (0.2, 0.05, 0.7), "trim": "model", "elect": "unweighted"}
    merged = open_family(tmp_path, "ties", family, case)
    for model, density, cut in zip("abc", case["density"], merged.measures.all()[W]["cut"].flatten(), strict=True):
        deltas = [family[model][name].double() - family["base"][name].double() for name in family["base"]]
        magnitude = torch.cat([delta.flatten() for delta in deltas]).abs().float()
        n, k = len(magnitude), int(density * len(magnitude))
        assert cut == magnitude.kthvalue(n - k + 1).values


# ---- the cut


def cut_by_counting(chunks: Sequence[torch.Tensor], density: Sequence[float]) -> torch.Tensor:
    """The two counting passes over chunks (models, n), as the engine makes them."""
    share, numel = torch.tensor(density, dtype=torch.float64), sum(chunk.shape[1] for chunk in chunks)
    upper = sum((count_upper(chunk.abs()) for chunk in chunks), torch.tensor(0))
    found = locate(upper, kept_ranks(numel, density=share))
    lower = sum((count_lower(chunk.abs(), found) for chunk in chunks), torch.tensor(0))
    return torch.from_numpy(value_at(lower, found))


# Few different values make ties; all of float32 makes denormals, zeros of both signs and neighbours in the last bit.
Deltas = st.one_of(
    st_numpy.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 60)), elements=st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 1.0000001, 2.0, -65536.0, 1e-45, -1e-45, 3e38]
    )),
    st_numpy.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 60)), elements=st.floats(
        width=32, allow_nan=False, allow_infinity=False
    )),
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(Deltas, st.data())
def test_counting_finds_the_cut_exactly(deltas: np.ndarray, data: st.DataObject):
    """Whatever the values and wherever the chunks end: the plain definition's bits, and at least k entries above."""
    models, numel = deltas.shape
    density = [data.draw(st.sampled_from([1e-9, 0.1, 0.3, 0.5, 0.99, 1.0])) for _ in range(models)]
    ends = sorted(data.draw(st.lists(st.integers(0, numel), max_size=3)))
    whole = torch.from_numpy(deltas)
    chunks = [whole[:, a:b] for a, b in zip([0, *ends], [*ends, numel], strict=True) if b > a]
    cut = cut_by_counting(chunks, density)
    assert torch.equal(cut, magnitude_cut(whole, torch.tensor(density, dtype=torch.float64)))
    for row, share, bound in zip(whole.abs(), density, cut.flatten(), strict=True):
        k = max(1, int(share * numel))
        assert kept_count(share, numel) == k <= (row >= bound).sum() and (row > bound).sum() < k


@settings(deadline=None)
@given(Deltas, st.sampled_from([0.0, 0.01, 0.4, 0.9, 1.0]), st.sampled_from([torch.float32, torch.float64]))
def test_trimming_keeps_what_is_not_below_the_cut(deltas: np.ndarray, density: float, dtype: torch.dtype):
    stack = torch.from_numpy(deltas).to(dtype)
    found = trim(stack, torch.full((len(stack), 1), density, dtype=torch.float64), None)
    np.testing.assert_array_equal(found.numpy(), [keep_largest(row, density) for row in deltas.astype(np.float64)])


def test_the_engine_finds_the_cut_exactly_over_chunks_and_tensors(tmp_path: Path):
    """A tensor of several chunks and smaller ones, by tensor and by model, against the plain definition."""
    shapes = {
        "model.layers.0.weight": (2 * CHUNK + 12345,),
        "model.layers.1.weight": (1000, 30),
        "model.norm.weight": (7,),
    }
    family = draw_family(["base", "a", "b"], shapes, torch.bfloat16)  # 16 bits: many equal magnitudes
    density = (0.2, 0.61)
    stacks = {
        n: torch.stack([(family[m][n].float() - family["base"][n].float()).flatten() for m in "ab"]) for n in shapes
    }
    own = {"weight": (1.0, 1.0), "density": density}
    by_tensor = open_family(tmp_path, "ties", family, own).measures.all()
    by_model = open_family(tmp_path, "ties", family, {**own, "trim": "model"}).measures.all()
    whole = magnitude_cut(torch.cat(list(stacks.values()), dim=1), torch.tensor(density))
    for name, stack in stacks.items():
        assert torch.equal(torch.from_numpy(by_tensor[name]["cut"]), magnitude_cut(stack, torch.tensor(density)))
        assert torch.equal(torch.from_numpy(by_model[name]["cut"]), whole)


# ---- other implementations

# PEFT's functions take task vectors and return one. Where they differ from ours by design: `topk` keeps exactly k
# entries, and which of equal ones depends on the sort (the values below are all different); a vote of zero is +, with
# us the majority's sign; DARE TIES elects without weights and divides by the number of agreeing models, ours elects by
# weight as mergekit does (at equal weights they are the same); DARE draws from torch's global generator.


def peft_deltas(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, 40, 50, generator=generator, dtype=torch.float64))


PEFT_WEIGHT = (0.7, 0.4, 1.3)


def ours(name: str, deltas: Sequence[torch.Tensor], **parameters: Any) -> torch.Tensor:
    return torch.tensor(call(name, [delta.flatten().tolist() for delta in deltas], **parameters))


def assert_same(found: torch.Tensor, peft: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), peft.flatten().double(), rtol=1e-6, atol=1e-6)


def test_task_arithmetic_is_pefts():
    deltas = peft_deltas()
    wanted = peft_merge.task_arithmetic(deltas, torch.tensor(PEFT_WEIGHT, dtype=torch.float64))
    assert_same(ours("task_arithmetic", deltas, weight=PEFT_WEIGHT), wanted)


def test_trimmed_sums_are_pefts_magnitude_prune():
    """`elect` and `divide` out of the way by one model at a time: what is left is the trim."""
    for delta, weight in zip(peft_deltas(), PEFT_WEIGHT, strict=True):
        wanted = peft_merge.magnitude_prune([delta], torch.tensor([weight], dtype=torch.float64), 0.37)
        assert_same(ours("ties", [delta], weight=(weight,), density=(0.37,), divide="none"), wanted)


@pytest.mark.parametrize("method, elect", [("total", "unweighted"), ("frequency", "count")])
def test_ties_is_pefts(method: Any, elect: str):
    deltas = peft_deltas()
    wanted = peft_merge.ties(deltas, torch.tensor(PEFT_WEIGHT, dtype=torch.float64), 0.4, method)
    found = ours("ties", deltas, weight=PEFT_WEIGHT, density=(0.4,) * 3, elect=elect, divide="count")
    assert_same(found, wanted)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Our random numbers, and PEFT made to draw its masks from them."""
    numbers = torch.from_numpy(np.stack([philox_uniform(0, model, W, 2000) for model in "abc"])).view(3, 40, 50)
    masks = iter(numbers)
    monkeypatch.setattr(torch, "bernoulli", lambda share: (next(masks) < share).to(share))
    return numbers


def test_dare_linear_is_pefts(noise: torch.Tensor):
    deltas = peft_deltas()
    wanted = peft_merge.dare_linear(deltas, torch.tensor(PEFT_WEIGHT, dtype=torch.float64), 0.3)
    found = ours("dare_linear", deltas, weight=PEFT_WEIGHT, density=(0.3,) * 3, noise=noise.view(3, -1))
    assert_same(found, wanted)


def test_dare_ties_is_pefts_at_equal_weights(noise: torch.Tensor):
    deltas = peft_deltas()
    wanted = peft_merge.dare_ties(deltas, torch.ones(3, dtype=torch.float64), 0.3)
    found = ours("dare_ties", deltas, weight=(1.0,) * 3, density=(0.3,) * 3, noise=noise.view(3, -1), normalize=True)
    assert_same(found, wanted)


@settings(deadline=None)
@given(
    st_numpy.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.integers(-5, 5)),
    st.sampled_from(["weighted", "unweighted", "count"]),
    st.sampled_from(["weights", "count", "none"]),
    st.sampled_from([0.1, 0.5, 0.75, 1.0]),
)
def test_ties_as_a_function_is_its_definition(deltas: np.ndarray, elect: str, divide: str, density: float):
    """Without a measured majority a vote of zero is +, so the definition of the weighted election serves for all."""
    weight = (1.0,) * len(deltas)
    found = call(
        "ties", deltas.tolist(), weight=weight, density=weight and (density,) * len(deltas), elect=elect, divide=divide
    )
    kept = np.stack([keep_largest(delta, density) for delta in deltas])
    wanted = elect_and_merge(kept, weight, "count" if elect == "count" else "weighted", divide)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


# ---- DARE's masks

N, DENSITY = 300_000, 0.3
FOUR_SIGMA = 4 * math.sqrt(DENSITY * (1 - DENSITY) / N)


def dare_of_ones(folder: Path, storage: torch.dtype = torch.float32, seed: int = 0, **parameters: Any) -> torch.Tensor:
    """Two models that are one where the base is zero, the second at weight 2: (N,)."""
    family = {m: {W: torch.full((N,), float(m != "base"), dtype=storage)} for m in ("base", "a", "b")}
    case = {"weight": (1.0, 2.0), "density": (DENSITY, DENSITY), **parameters}
    return open_family(folder, "dare_linear", family, case, dtype="float32", seed=seed).read(W)


def test_dare_keeps_the_share_it_is_told_and_each_model_its_own(tmp_path: Path):
    merged = dare_of_ones(tmp_path, rescale=False)  # 0: both dropped, 1: the first kept, 2: the second, 3: both
    shares = torch.stack([(merged == value).double().mean() for value in range(4)])
    independent = torch.tensor([0.7 * 0.7, 0.3 * 0.7, 0.7 * 0.3, 0.3 * 0.3], dtype=torch.float64)
    assert shares.sum() == 1
    assert (shares - independent).abs().max() < FOUR_SIGMA


def test_dare_is_unbiased(tmp_path: Path):
    """Dividing by the density restores the expectation, 1 + 2."""
    assert abs(dare_of_ones(tmp_path).double().mean() - 3) < 3 * FOUR_SIGMA / DENSITY
    assert abs(dare_of_ones(tmp_path, rescale=False).double().mean() - 3 * DENSITY) < 3 * FOUR_SIGMA


def test_dare_l1_restores_the_norm(tmp_path: Path):
    family = draw_family(["base", "a"], {W: (5, 7), "model.layers.1.weight": (CHUNK + 99,)})
    case = {"weight": (1.0,), "density": (0.1,), "rescale": "l1"}
    merged = open_family(tmp_path, "dare_linear", family, case, dtype="float64")
    for name in merged:
        base, model = (family[m][name].double() for m in ("base", "a"))
        norm, wanted = ((tensor - base).abs().sum().item() for tensor in (merged.read(name), model))
        assert norm == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16], ids=str)
def test_dares_masks_do_not_depend_on_the_dtype(tmp_path: Path, storage: torch.dtype):
    assert torch.equal(dare_of_ones(tmp_path, storage, rescale=False), dare_of_ones(tmp_path, rescale=False))


def test_dares_masks_are_another_seeds_others(tmp_path: Path):
    first, second = (dare_of_ones(tmp_path, seed=seed, rescale=False) for seed in (0, 1))
    same = (first == second).double().mean()
    assert same == pytest.approx(0.49**2 + 2 * 0.21**2 + 0.09**2, abs=0.01)  # as for independent masks


def test_dares_densities_of_0_and_1_drop_all_and_nothing(tmp_path: Path):
    merged = dare_of_ones(tmp_path, density=(0.0, 1.0))
    assert torch.equal(merged, torch.full((N,), 2.0))


# ---- slerp


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_ends_at_the_models(tmp_path: Path, t: float):
    family = draw_family(["base", "a"], SHAPES, spread=1.0)
    merged = open_family(tmp_path, "slerp", family, {"t": t})
    assert all(torch.equal(merged.read(name), family["a" if t else "base"][name]) for name in SHAPES)


def test_slerp_of_unit_vectors_keeps_the_norm(tmp_path: Path):
    family = draw_family(["base", "a"], {W: (300, 1000)}, spread=2.0)
    family = {model: {W: tensors[W] / tensors[W].norm()} for model, tensors in family.items()}
    for t in (0.2, 0.5, 0.9):
        assert open_family(tmp_path, "slerp", family, {"t": t}).read(W).norm() == pytest.approx(1.0, abs=1e-5)


def test_slerp_exchanged_is_slerp_from_the_other_end(tmp_path: Path):
    family = draw_family(["base", "a"], SHAPES, spread=1.0)
    there = open_family(tmp_path / "there", "slerp", family, {"t": 0.3})
    back = open_family(tmp_path / "back", "slerp", {"base": family["a"], "a": family["base"]}, {"t": 0.7})
    for name in SHAPES:
        operands = [tensors[name] for tensors in family.values()]
        assert ulps(there.read(name), as_float64(back.read(name)), operands).max() <= 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_slerp_of_almost_parallel_models_is_linear(tmp_path: Path, sign: float):
    """Opposite ones too: no arc between them is the shortest."""
    family = draw_family(["base", "a"], {W: (100, 10)}, spread=0.01)
    family["a"][W] *= sign
    merged = open_family(tmp_path, "slerp", family, {"t": 0.25})
    wanted = 0.75 * as_float64(family["base"][W]) + 0.25 * as_float64(family["a"][W])
    assert abs(merged.measures.all()[W]["cosine"]) > 0.9995
    assert ulps(merged.read(W), wanted, [family["base"][W], family["a"][W]]).max() <= 1


def test_slerp_of_models_that_are_near_but_not_parallel_is_an_arc(tmp_path: Path):
    family = draw_family(["base", "a"], {W: (100, 10)}, spread=0.1)
    merged = open_family(tmp_path, "slerp", family, {"t": 0.5})
    wanted = expected("slerp", family, {"t": 0.5}, W)
    assert 0.99 < merged.measures.all()[W]["cosine"] < 0.9995
    assert ulps(merged.read(W), wanted, [family["base"][W], family["a"][W]]).max() <= 2


def test_the_angle_of_slerp_is_that_of_the_whole_tensor(tmp_path: Path):
    """Over several chunks."""
    shapes = {W: (2 * CHUNK + 77,)}
    family = draw_family(["base", "a"], shapes, spread=1.0)
    family["a"][W][:CHUNK] = family["base"][W][:CHUNK]  # parallel in the first chunk only
    merged = open_family(tmp_path, "slerp", family, {"t": 0.3})
    wanted = expected("slerp", family, {"t": 0.3}, W)
    assert ulps(merged.read(W), wanted, [tensors[W] for tensors in family.values()]).max() <= 2


@pytest.mark.parametrize("zero", ["base", "a", "both"])
def test_slerp_with_a_tensor_of_zeros_is_finite(tmp_path: Path, zero: str):
    """A zero tensor has no angle; a right one is assumed, so that t = 0.5 gives the other model times sin 45°."""
    family = draw_family(["base", "a"], {W: (6, 7)})
    for model in ("base", "a") if zero == "both" else (zero,):
        family[model][W].zero_()
    found = open_family(tmp_path, "slerp", family, {"t": 0.5}).read(W)
    other = family["a" if zero == "base" else "base"][W]
    torch.testing.assert_close(found, other * math.sqrt(0.5))
