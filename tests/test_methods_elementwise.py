"""The methods that work entry by entry: numbers worked by hand, tensors of several chunks, what is random."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import definitions_elementwise
import numpy as np
import pytest
import torch
from definitions_elementwise import keep_probabilities
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from references import METHODS, draw_family, expected, members, open_family, ulps

from ctl_merge.checkpoint import CHUNK
from ctl_merge.errors import MismatchError, RecipeError
from ctl_merge.manifest import method_notes
from ctl_merge.methods.della import keep_probability
from ctl_merge.methods.order import count_lower, count_upper, kth_largest, locate, value_at

W = "model.layers.0.weight"


def call(name: str, rows: Any, **parameters: Any) -> Any:
    """A method as a plain function on the rows, per-model parameters given as tuples."""
    stack = torch.tensor(rows, dtype=torch.float64)
    columns = {
        n: torch.tensor(v, dtype=torch.float64).view(-1, *[1] * (stack.ndim - 1)) if isinstance(v, tuple) else v
        for n, v in parameters.items()
    }
    return METHODS[name].function(stack, **columns).tolist()


def numbers(values: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_tensor(rows: Mapping[str, Sequence[float]]) -> dict[str, dict[str, torch.Tensor]]:
    return {model: {W: torch.tensor(row)} for model, row in rows.items()}


# ---- DELLA


def test_della_by_hand():
    """Ranks 0, 1, 1/2 at density 0.5 ± 0.25 are probabilities 0.25, 0.75, 0.5: the second entry is dropped."""
    own: dict[str, Any] = {"weight": (0.5,), "density": (0.5,), "epsilon": (0.25,)}
    noise = numbers([[0.24, 0.75, 0.49]])
    assert call("della_linear", [[1.0, -3.0, 2.0]], **own, noise=noise) == [0.5 / 0.25, 0.0, 0.5 * 2 / 0.5]
    assert call("della_linear", [[1.0, -3.0, 2.0]], **own, noise=noise, rescale=False) == [0.5, 0.0, 1.0]
    assert call("della_linear", [[1.0, -3.0, 2.0]], **own, noise=noise, rescale="l1") == [1.0, 0.0, 2.0]  # 6 / 3
    assert call("della_linear", [[1.0, -3.0, 2.0]], **own, noise=noise, normalize=True, lambda_=2.0) == [8.0, 0.0, 8.0]


def test_della_elects_a_sign():
    """(4, -, 4) of the first, (-8, 1, -) of the second at weight 0.75: ballots 4 - 6, 0.75, 4."""
    own: dict[str, Any] = {"weight": (1.0, 0.75), "density": (0.5, 0.5), "epsilon": (0.25, 0.0)}
    noise = numbers([[0.24, 0.75, 0.49], [0.0, 0.3, 0.6]])
    rows = [[1.0, -3.0, 2.0], [-4.0, 0.5, 7.0]]
    assert call("della", rows, **own, noise=noise) == [-8.0, 1.0, 4.0]
    assert call("della", rows, **own, noise=noise, normalize=False) == [-6.0, 0.75, 4.0]


def test_rows_are_ranked_apart_and_equal_magnitudes_alike():
    """Ranks 0, 1.5, 1.5 of the first row, all 1 of the second: probabilities 0.3, 0.6, 0.6 and 0.5."""
    delta = torch.tensor([[1.0, 2.0, -2.0], [0.0, 0.0, -0.0]], dtype=torch.float64)
    assert keep_probability(delta, 0.5, 0.2).flatten().tolist() == pytest.approx([0.3, 0.6, 0.6, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (1, 1, 1)])
def test_an_entry_alone_in_its_row_has_the_density(shape: tuple[int, ...]):
    assert (keep_probability(torch.ones(shape, dtype=torch.float64), 0.3, 0.2) == 0.3).all()


@settings(deadline=None)
@given(
    st_numpy.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 20)), elements=st.integers(-4, 4)),
    st.sampled_from([(0.5, 0.3), (0.2, 0.2), (0.9, 0.0), (0.0, 0.1), (1.0, 0.1)]),
)
def test_the_probabilities_are_their_definition_and_their_mean_is_the_density(
    deltas: np.ndarray, case: tuple[float, float]
):
    found = keep_probability(torch.from_numpy(deltas), *case).numpy()
    np.testing.assert_allclose(found, keep_probabilities(deltas, *case), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.mean(1), case[0], rtol=1e-12)


def della_of_a_ramp(folder: Path, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One model of which a row's entries grow, and what is kept of it: (rows, 1000) twice."""
    model = torch.arange(1.0, 1001).repeat(300, 1) * (1 - 2 * (torch.arange(1000) % 2))
    family = {"base": {W: torch.zeros_like(model)}, "a": {W: model}}
    case = {"weight": (1.0,), "density": (0.4,), "epsilon": (0.3,), **more}
    return model, open_family(folder, "della_linear", family, case).read(W)


def test_della_keeps_large_entries_more_often(tmp_path: Path):
    """In tenths of the ranks from 0.13 to 0.67, each within four standard deviations."""
    _, merged = della_of_a_ramp(tmp_path, rescale=False)
    shares = (merged != 0).double().view(300, 10, 100).mean((0, 2))
    wanted = 0.1 + 0.6 * (torch.arange(10) * 100 + 49.5) / 999
    assert ((shares - wanted).abs() < 4 * (wanted * (1 - wanted) / 30_000).sqrt()).all()


def test_della_is_unbiased(tmp_path: Path):
    model, merged = della_of_a_ramp(tmp_path)
    kept = merged != 0
    assert (merged[kept] / model[kept]).min() > 1 / 0.71 and (merged[kept] / model[kept]).max() < 1 / 0.0999
    assert (merged / model).mean() == pytest.approx(1, abs=0.015)


@pytest.mark.parametrize("density, epsilon, most", [(0.9, 0.15, "0.1"), (0.1, 0.15, "0.1"), (0.3, 0.31, "0.3")])
@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_an_epsilon_that_leaves_the_probabilities_is_refused(
    tmp_path: Path, name: str, density: float, epsilon: float, most: str
):
    family = draw_family(["base", "a"], {W: (3, 4)})
    with pytest.raises(MismatchError, match=rf"density {density} ± epsilon {epsilon} leaves .* from 0 to {most}"):
        open_family(tmp_path, name, family, {"weight": (1.0,), "density": (density,), "epsilon": (epsilon,)})


def test_a_density_that_drops_nothing_has_no_use_for_epsilon(tmp_path: Path):
    family = draw_family(["base", "a"], {W: (3, 4)})
    merged = open_family(tmp_path, "della", family, {"weight": (1.0,), "density": (1.0,)})
    assert torch.equal(merged.read(W), family["a"][W])


# ---- Model Breadcrumbs

RAMP = [[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0]]


def crumbs(rows: Sequence[Sequence[float]], density: float, gamma: float, **more: Any) -> list[float]:
    return call("breadcrumbs", rows, weight=(1.0,), density=(density,), gamma=(gamma,), **more)


def test_breadcrumbs_by_hand():
    """Of ten entries γ = 0.2 drops 10 and 9, density 0.5 keeps 8 to 4."""
    assert crumbs(RAMP, 0.5, 0.2) == [0, 0, 0, -4, 5, -6, 7, -8, 0, 0]
    assert crumbs(RAMP, 0.5, 0.0) == [0, 0, 0, 0, 0, -6, 7, -8, 9, -10]
    assert crumbs(RAMP, 0.5, 0.2, rescale=True) == pytest.approx([v * 55 / 30 for v in crumbs(RAMP, 0.5, 0.2)])


def test_the_density_comes_before_the_outliers():
    """0.9 + 0.3 is more than all: only one entry is left to drop. A density of 1 leaves none."""
    assert crumbs(RAMP, 0.9, 0.3) == [*RAMP[0][:9], 0]
    assert crumbs(RAMP, 1.0, 0.3) == RAMP[0]


def test_a_density_below_one_entry_keeps_none():
    assert crumbs([[1.0, 2.0, 3.0]], 0.3, 0.0) == [0, 0, 0]


def test_cuts_through_equal_magnitudes_keep_them_all():
    """The band is 2 to 2: two of three are wanted, and all are kept."""
    assert crumbs([[3.0, 2.0, -2.0, 2.0, 1.0]], 0.4, 0.2) == [0, 2, -2, 2, 0]


def test_breadcrumbs_ties_by_hand():
    """Kept (-, 3, 2) and (-4, -, -1) of four: γ drops 9 and 5. Ballots -4, 3, 2 - 1."""
    own: dict[str, Any] = {"weight": (1.0, 1.0), "density": (0.5, 0.5), "gamma": (0.25, 0.25)}
    rows = [[9.0, 1.0, 3.0, 2.0], [5.0, -4.0, 0.0, -1.0]]
    assert call("breadcrumbs_ties", rows, **own) == [0, -4, 3, 2]
    assert call("breadcrumbs_ties", rows, **own, normalize=True, lambda_=2.0) == [0, -8, 6, 4]


# ---- SCE, RAM

SCE_ROWS = [[1.0, 2.0, 0.0, -1.0], [3.0, 2.0, 0.0, 2.0]]


def test_sce_by_hand():
    """Energies 6 and 17 weight the first entry; the last is the second model's alone."""
    assert call("sce", SCE_ROWS) == pytest.approx([(6 * 1 + 17 * 3) / 23, 2, 0, 2])


def test_sce_selects_by_variance():
    """The models differ in two entries, in the last one more: half of two is one. A tenth of two is none."""
    assert call("sce", SCE_ROWS, select_topk=0.5) == [0, 0, 0, 2]
    assert call("sce", SCE_ROWS, select_topk=0.1) == [0, 0, 0, 0]


def test_sce_keeps_all_of_equal_variance():
    assert call("sce", [[1.0, 5.0, 2.0], [2.0, 5.0, 3.0]], select_topk=0.5) == pytest.approx([22 / 14, 0, 38 / 14], 0.1)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0])
def test_sces_weights_do_not_depend_on_the_scale(size: float):
    """mergekit's are equal below 1e-6."""
    rows = [[value * size for value in row] for row in SCE_ROWS]
    wanted = [value * size for value in call("sce", SCE_ROWS, select_topk=0.9)]
    assert call("sce", rows, select_topk=0.9) == pytest.approx(wanted, rel=1e-9)


def test_ram_by_hand():
    """|d| = 0.5 is not above ε = 0.5."""
    assert call("ram", [[1.0, 2.0, 0.5, -1.0], [3.0, 0.5, 0.0, -2.0]], epsilon=0.5) == [2.0, 2.0, 0.0, -1.5]


def test_ramplus_by_hand():
    """The first model shares one entry and owns one, the second owns two: 1 + 0.1 · 0.2; 1 + 0.5 and 1 + 0.5 / 2."""
    rows = [[1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 8.0, -4.0]]
    assert call("ramplus_tl", rows) == pytest.approx([2.0, 2.0 * 1.02, 8.0 * 1.02, -4.0 * 1.02])
    assert call("ramplus_tl", rows, r=0.5, alpha=3.0) == pytest.approx([2.0, 3.0, 10.0, -5.0])


def test_ramplus_without_own_entries_is_ram():
    assert call("ramplus_tl", [[1.0, 0.0], [3.0, 0.0]]) == [2.0, 0.0]


# ---- two models


def test_nearswap_by_hand():
    assert call("nearswap", [[3.0, -0.5, 0.125, 0.0]], t=0.25) == [0.25, -0.25, 0.125, 0.0]


def test_a_step_is_not_negative(tmp_path: Path):
    with pytest.raises(RecipeError, match="`t`"):
        open_family(tmp_path, "nearswap", draw_family(["base", "a"], {W: (3,)}), {"t": -0.1})


def test_arcee_fusion_by_hand():
    """Softmax of (0, ln a) is (1, a) / (1 + a), of the base (1, 1) / 2.

    The importances are 0 four times, 0.039, 0.144, 0.267, more: quartiles 0, 0, 0.144, and 1.5 · 0.144 is below 0.267.
    """
    rows = [[0.0, math.log(a)] for a in (2, 3, 4, 50)]
    wanted = [[0.0, 0.0], [0.0, 0.0], rows[2], rows[3]]
    assert call("arcee_fusion", [[[0.0, 0.0]] * 4, rows]) == wanted


def test_rows_of_one_entry_diverge_nowhere_and_are_taken_over():
    """All importances are 0, which is what the threshold is."""
    assert call("arcee_fusion", [[[1.0], [2.0]], [[3.0], [5.0]]]) == [[3.0], [5.0]]


# ---- whole models


def test_localize_and_stitch_by_hand():
    """Half of four: (5, -, -, -4) and (3, -2, -, -)."""
    assert call("localize_and_stitch", [[5.0, 1.0, 0.0, -4.0], [3.0, -2.0, 1.0, 0.0]], sparsity=0.5) == [4, -2, 0, -4]


def test_an_entry_that_a_model_did_not_change_it_does_not_keep():
    assert call("localize_and_stitch", [[5.0, 0.0], [0.0, 0.0]], sparsity=1.0) == [5.0, 0.0]


def test_what_is_localized_is_the_largest_of_the_whole_model(tmp_path: Path):
    first, second = "model.layers.0.weight", "model.layers.1.weight"
    family = {
        model: {first: torch.tensor(values[:2]), second: torch.tensor(values[2:])}
        for model, values in {"base": [0.0] * 4, "a": [1.0, 2.0, 3.0, 4.0], "b": [8.0, 7.0, 0.0, 5.0]}.items()
    }
    merged = open_family(tmp_path, "localize_and_stitch", family, {"sparsity": 0.5})
    assert merged.read(first).tolist() == [8, 7] and merged.read(second).tolist() == [3, 4]
    assert method_notes(merged) == ["entries are kept from |d| = 3, 7"]


def test_metagpt_by_hand():
    """Squared norms 9 and 1: coefficients 0.9 and 0.1."""
    assert call("metagpt", [[1.0, 2.0, 2.0], [0.0, -1.0, 0.0]]) == pytest.approx([0.9, 1.7, 1.8])


def test_metagpts_norms_are_those_of_the_whole_model(tmp_path: Path):
    """Squared norms 1 + 2² + 2² and 1 over two tensors."""
    family = {
        model: {W: torch.tensor(values[:1]), "model.norm.weight": torch.tensor(values[1:])}
        for model, values in {"base": [0.0] * 3, "a": [1.0, 2.0, 2.0], "b": [0.0, -1.0, 0.0]}.items()
    }
    merged = open_family(tmp_path, "metagpt", family, {})
    assert merged.read(W).tolist() == pytest.approx([0.9])
    assert merged.read("model.norm.weight").tolist() == pytest.approx([1.7, 1.8])
    assert method_notes(merged) == ["coefficients: 0.9, 0.1"]


def test_pcb_by_hand():
    """|d| is clamped to 0.1 .. 0.3, within is exp(n norm²), against the others tanh(d Σ d); three of four are kept."""
    rows = [[0.1, 0.2, -0.3, 0.4], [0.3, 0.1, 0.2, -0.4]]
    sums = [0.4, 0.3, -0.1, 0.0]
    clamped = ([0.1, 0.2, -0.3, 0.3], [0.3, 0.1, 0.2, -0.3])
    scores = [
        [math.exp(2 * ((abs(x) - 0.1) / 0.2) ** 2) * math.tanh(d * s) for x, d, s in zip(*three, strict=True)]
        for three in zip(clamped, rows, [sums, sums], strict=True)
    ]
    cuts = [sorted(found)[1] for found in scores]
    weights = [
        [max(value - cut, 0) / (max(found) - cut) for value in found] for found, cut in zip(scores, cuts, strict=True)
    ]
    together = zip(*weights, *clamped, strict=True)
    wanted = [(p * x + q * y) / (p + q) if p + q else 0.0 for p, q, x, y in together]
    assert call("pcb", rows, ratio=0.75) == pytest.approx(wanted, rel=1e-5)
    assert call("pcb", rows, ratio=0.75, lambda_=2.0) == pytest.approx([2 * value for value in wanted], rel=1e-5)


def test_consensus_by_hand():
    """Sums 3, 2, -0.5. The second entry is in one mask only: 2 > 0. The third in two: 1 > 0.2 and 0.5 > 0.4."""
    rows = [[1.0, 0.0, -1.0], [1.0, 2.0, 0.5], [1.0, 0.0, 0.0]]
    own: dict[str, Any] = {"tall_lambda": (0.4,) * 3}
    assert call("consensus", rows, **own) == [3.0, 0.0, -0.5]
    assert call("consensus", rows, **own, k=3, lambda_=0.5) == [1.5, 0.0, 0.0]
    assert call("consensus", rows, **own, k=0) == [3.0, 2.0, -0.5]
    assert call("consensus", rows, tall_lambda=(0.4, 0.6, 0.4)) == [3.0, 0.0, 0.0]


def test_more_masks_than_models_are_refused(tmp_path: Path):
    family = draw_family(["base", "a", "b"], {W: (3,)})
    with pytest.raises(MismatchError, match="k = 3 models .* set k from 0 to 2"):
        open_family(tmp_path, "consensus", family, {"k": 3})


def test_other_parameters_elsewhere_do_not_go_with_what_is_measured_over_the_model(tmp_path: Path):
    family = draw_family(["base", "a", "b"], {W: (3,), "model.layers.1.weight": (3,)})
    with pytest.raises(MismatchError, match="whole model .localize_and_stitch. needs parameters that are the same"):
        open_family(
            tmp_path,
            "localize_and_stitch",
            family,
            {"sparsity": [{"value": 0.1, "filter": "layers.0"}, {"value": 0.2}]},
        )


# ---- notes in the manifest


def test_sce_and_ramplus_tell_their_weights(tmp_path: Path):
    family = one_tensor({"base": [0.0] * 4, "a": SCE_ROWS[0], "b": SCE_ROWS[1]})
    told = method_notes(open_family(tmp_path, "sce", family, {}))
    assert told == ["weights of the models, from tensor to tensor: 0.261 to 0.261, 0.739 to 0.739"]
    told = method_notes(open_family(tmp_path, "ramplus_tl", family, {"r": 0.5, "alpha": 9.0}))
    assert told == ["factors of the models' own entries, the mean over tensors: 1, 1"]


# ---- tensors of several chunks, rows that no chunk is a multiple of

NAMES = sorted(definitions_elementwise.ROWS)
LARGE = {W: (1353, 97), "model.layers.1.weight": (64,), "model.layers.2.weight": (5, 1, 3), "model.norm.weight": ()}


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_several_chunks_is_its_definition(tmp_path: Path, name: str, storage: torch.dtype):
    """Of bfloat16 many magnitudes are equal."""
    case = definitions_elementwise.ROWS[name].cases[0]
    family = draw_family(members(name, case), LARGE, storage)
    merged = open_family(tmp_path, name, family, case, dtype="float32", seed=3)
    assert merged.tensors[W].numel > merged.block(W)
    for tensor in LARGE:
        wanted = expected(name, family, case, tensor, seed=3)
        assert ulps(merged.read(tensor), wanted, [tensors[tensor] for tensors in family.values()]).max() <= 2


@pytest.mark.parametrize("width", [3001, CHUNK - 1, CHUNK + 1])
@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].grain == "row"])
def test_rows_come_whole_and_any_part_of_them_has_the_same_bits(tmp_path: Path, name: str, width: int):
    case = definitions_elementwise.ROWS[name].cases[0]
    shape = (2 * CHUNK // width + 2, width)
    family = draw_family(members(name, case), {W: shape}, torch.bfloat16)
    merged = open_family(tmp_path, name, family, case, dtype="float32")
    assert merged.block(W) == width * max(1, CHUNK // width)
    whole = merged.read(W).view(-1)
    for start, count in [(0, 1), (width - 1, 2), (CHUNK - 3, 7), (5, width), (merged.block(W) - 1, width + 2)]:
        part = torch.empty(count)
        merged.read_into(W, part, start)
        assert torch.equal(part, whole[start : start + count])
    rows = {m: {W: t[W][1:2].clone()} for m, t in family.items()}
    if not METHODS[name].measures:
        alone = open_family(tmp_path / "row", name, rows, case, dtype="float32").read(W)
        assert torch.equal(alone, whole.view(shape)[1:2])


# ---- order statistics


@settings(deadline=None)
@given(
    st_numpy.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, -1.0000001, 1e-45, -1e-45, -3e38]),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
    )),
    st.data(),
)  # fmt: skip
def test_counting_finds_any_order_statistic(values: np.ndarray, data: st.DataObject):
    """Several ranks at once, of numbers of either sign, wherever the chunks end."""
    rows, numel = values.shape
    ranks = torch.tensor([[data.draw(st.integers(0, numel)) for _ in range(3)] for _ in range(rows)])
    whole, end = torch.from_numpy(values), data.draw(st.integers(0, numel))
    chunks = [chunk for chunk in (whole[:, :end], whole[:, end:]) if chunk.numel()]
    for signed, pieces in ((True, chunks), (False, [chunk.abs() for chunk in chunks])):
        found = locate(sum((count_upper(chunk, signed) for chunk in pieces), torch.tensor(0)), ranks)
        counts = sum((count_lower(chunk, found, signed) for chunk in pieces), torch.tensor(0))
        ordered = np.sort(np.concatenate([chunk.numpy() for chunk in pieces], axis=1), axis=1)[:, ::-1]
        for row, wanted, result in zip(ordered, ranks.tolist(), value_at(counts, found, signed).tolist(), strict=True):
            assert result == [row[rank - 1] if rank else math.inf for rank in wanted]
        plain = kth_largest(torch.cat(pieces, dim=1), ranks)
        assert torch.equal(torch.from_numpy(value_at(counts, found, signed)), plain)
