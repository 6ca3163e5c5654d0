"""Compiled loops give the bytes of the plain definitions."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import recipe_text, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctl_merge import compiled, open_merge, parse_recipe
from ctl_merge.errors import NonFiniteError
from ctl_merge.methods import angles, registry
from ctl_merge.methods.della import rank_in_row
from ctl_merge.methods.order import count_lower, count_upper, locate

kernels = pytest.importorskip("ctl_merge.methods.kernels", reason="numba is not installed", exc_type=ImportError)

FUSED = sorted(name for name, method in registry().items() if method.fused)
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 2.0**-133, 65504.0, -3e4, 0.5]
SHAPES = ((1,), (7,), (3, 5), (64,), (2049,), (33, 65))


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype, base: Tensor | None = None) -> Tensor:
    """Numbers near the base, many of them equal to it, and some that are hard."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(shape, generator=generator) * 0.02
    if base is not None:
        own = base.float() + torch.where(torch.rand(shape, generator=generator) < 0.3, 0.0, own * 0.1)
    own = own.flatten()
    for place in torch.randperm(own.numel(), generator=generator)[: own.numel() // 6].tolist():
        own[place] = SPECIAL[place % len(SPECIAL)]
    return own.view(shape).to(dtype)


def family(folder: Path, dtypes: list[torch.dtype], seed: int, shapes: tuple = SHAPES) -> list[Path]:
    bases: dict[str, Tensor] = {}
    paths = []
    for model, dtype in enumerate(dtypes):
        own = {f"t{i}": values(s, 100 * seed + 10 * model + i, dtype, bases.get(f"t{i}")) for i, s in enumerate(shapes)}
        bases = bases or own
        paths.append(write_checkpoint(folder / f"m{model}", own))
    return paths


def recipe_of(method: str, paths: list[Path], given_: dict[str, Any], weights: list[float], **keys: Any) -> str:
    row = registry()[method]
    base, others = (paths[0], paths[1:]) if row.base == "required" else (None, paths)
    most = row.models[1]
    others = others[: len(others) if most is None else most - (row.base == "required" and row.space == "weights")]
    own = [{"weight": w} if "weight" in row.parameters else {} for w in weights]
    shared = {name: value for name, value in given_.items() if name in row.parameters}
    return recipe_text(method, list(zip(others, own, strict=False)), base, shared, **keys)


def both(text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the loops read, and what the plain definition does."""
    found = []
    for least in (0, 1 << 62):
        monkeypatch.setattr(compiled, "LEAST", least)
        merged = open_merge(parse_recipe(text))
        assert merged.has_loops == (least == 0)
        found.append({name: merged.read(name) for name in merged.tensors})
    return found[0], found[1]


def assert_same_bytes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = both(text, monkeypatch)
    for name, wanted in plain.items():
        bits = BITS[wanted.dtype]
        assert torch.equal(ours[name].view(bits), wanted.view(bits)), name


@pytest.mark.parametrize("method", FUSED)
@pytest.mark.parametrize(
    "dtypes", [[torch.bfloat16] * 4, [torch.float32, torch.bfloat16, torch.float16, torch.float32]]
)
def test_every_method_has_the_bytes_of_its_definition(method, dtypes, tmp_path, monkeypatch):
    paths = family(tmp_path, dtypes, seed=len(method))
    given_ = {"density": 0.4, "t": 0.3, "scale": 0.7, "lambda": 1.3, "gamma": 0.1}
    for extra in ({}, {"normalize": False}, {"normalize": True, "t": 0.0}):
        assert_same_bytes(recipe_of(method, paths, given_ | extra, [0.6, 0.3, 0.45, 0.2]), monkeypatch)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_parameters_have_the_bytes_of_the_definition(tmp_path_factory, data):
    method = data.draw(
        st.sampled_from(
            ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "linear"]
        )
    )
    kind = data.draw(st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, torch.float64]))
    share = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.99))
    given_: dict[str, Any] = {
        "density": [data.draw(share)] * 2, "gamma": data.draw(st.floats(0, 0.3)), "lambda": data.draw(st.floats(-2, 2)),
        "normalize": data.draw(st.booleans()),
    }  # fmt: skip
    if method == "ties":
        given_["elect"] = data.draw(st.sampled_from(["weighted", "unweighted", "count"]))
        given_["divide"] = data.draw(st.sampled_from(["weights", "count", "none"]))
        given_["trim"] = data.draw(st.sampled_from(["tensor", "model"]))
    if method.startswith("della"):
        given_["epsilon"] = data.draw(st.floats(0, 0.5)) * 2 * min(given_["density"][0], 1 - given_["density"][0])
    if method.startswith(("dare", "della")):
        given_["rescale"] = data.draw(st.sampled_from([True, False, "l1"]))
    count = data.draw(st.integers(3, 9))  # with the base: loops take up to three models in a pass
    weights = data.draw(st.lists(st.floats(0.05, 2), min_size=count, max_size=count))
    weights[0] *= data.draw(st.sampled_from([1, -1]))
    shapes = ((data.draw(st.integers(1, 5000)),), (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))))
    folder = tmp_path_factory.mktemp("family")
    paths = family(folder, [kind] * count, data.draw(st.integers(0, 10**6)), shapes)
    given_["density"] = given_["density"][0]
    with pytest.MonkeyPatch.context() as patch:
        text = recipe_of(method, paths, given_, weights, dtype=data.draw(st.sampled_from(["bfloat16", "float32"])))
        assert_same_bytes(text, patch)


@pytest.mark.parametrize("method", sorted(name for name in FUSED if registry()[name].models[1] is None))
@pytest.mark.parametrize("count", [2, 3, 5, 6, 8])
def test_any_number_of_models_has_the_bytes_of_the_definition(method, count, tmp_path, monkeypatch):
    """Of sums, elections, and anchored sums, whose anchor is the heaviest model: the first, the last, between."""
    paths = family(tmp_path, [torch.bfloat16] * (count + 1), seed=count, shapes=((33, 65),))
    for heaviest in (0, count // 2, count - 1, count):
        weights = [0.1 + (7 * i % 5) / 4 for i in range(count + 1)]
        weights[heaviest] = 3.0
        assert_same_bytes(recipe_of(method, paths, {"density": 0.4}, weights), monkeypatch)


@pytest.mark.parametrize("method", FUSED)
def test_what_loops_do_not_decide_is_as_the_definition_has_it(method, tmp_path, monkeypatch):
    """The largest number there is: the definition goes on with what the loops measured."""
    paths = family(tmp_path, [torch.bfloat16] * 4, 7, shapes=((33, 65),))
    for path in paths:
        tensors = load_file(path / "model.safetensors")
        tensors["t0"][0, 0] = torch.finfo(torch.bfloat16).max
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    given_ = {"density": 0.4, "t": 0.3, "clamp": True, "normalize": True, "trim": "model"}
    text = recipe_of(method, paths, given_, [0.6, 0.3, 0.45, 0.2])
    found = []
    for least in (0, 1 << 62):
        monkeypatch.setattr(compiled, "LEAST", least)
        merged = open_merge(parse_recipe(text))
        try:
            found.append(merged.read("t0").view(torch.int16).tolist())
        except NonFiniteError as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_blocks_of_inner_products_are_those_of_the_definition():
    assert kernels.BLOCK == angles.BLOCK


def test_a_piece_is_a_slice_of_the_whole(tmp_path, monkeypatch):
    """Wherever it begins: random numbers come in blocks of eight, reading in chunks."""
    monkeypatch.setattr(compiled, "LEAST", 0)
    paths = family(tmp_path, [torch.bfloat16] * 3, 5, shapes=((compiled.LOOP_CHUNK + 4099,),))
    merged = open_merge(parse_recipe(recipe_of("dare_ties", paths, {"density": 0.5}, [0.5, 0.5])))
    whole = merged.read("t0")
    for start, count in ((0, 1), (3, 50), (8, 2050), (compiled.LOOP_CHUNK - 8, 4107), (compiled.LOOP_CHUNK - 5, 99)):
        piece = torch.empty(count, dtype=torch.bfloat16)
        merged.read_into("t0", piece, start)
        assert torch.equal(piece.view(torch.int16), whole[start : start + count].view(torch.int16))


@pytest.mark.parametrize("width", [1, 5, 31, 33, 777, 2051, 40_001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_places_in_rows_of_any_width_are_those_of_the_definition(width, dtype, tmp_path, monkeypatch):
    """Wherever a piece begins; and where the plain definition is asked for a part of a row."""
    monkeypatch.setattr(compiled, "LOOP_CHUNK", 1 << 14)
    shape = (max(2, 20_011 // width), width)
    paths = family(tmp_path, [dtype] * 3, width, shapes=(shape, shape[1:]))
    for method, given_ in (("della", {"rescale": False}), ("della_linear", {}), ("della", {"rescale": "l1"})):
        text = recipe_of(method, paths, {"density": 0.4, "epsilon": 0.3} | given_, [0.6, 0.3], dtype="bfloat16")
        assert_same_bytes(text, monkeypatch)
    monkeypatch.setattr(compiled, "LEAST", 0)
    merged = open_merge(parse_recipe(text))
    whole = merged.read("t0").flatten()
    assert merged.block("t0") % width == 0
    for start, count in ((0, 1), (width - 1, 2), (whole.numel() - width - 1, 2), (width, width)):
        piece = torch.empty(count, dtype=torch.bfloat16)
        merged.read_into("t0", piece, start)
        assert torch.equal(piece, whole[start : start + count])


def hard_rows(width: int) -> dict[str, Tensor]:
    """Rows that a sort by buckets makes nothing of."""
    generator = torch.Generator().manual_seed(width)
    drawn = torch.rand(width, generator=generator, dtype=torch.float64)
    outlier = drawn * 1e-6
    outlier[width // 2] = 3e38
    return {
        "one size": torch.full((width,), -0.25).double(), "zeros": torch.zeros(width).double(),
        "few apart": 1 + drawn * 2.0**-16, "falling": torch.arange(width, 0, -1).double() * 2.0**-149,
        "an outlier": outlier, "beyond float32": drawn * 1e300, "many octaves": 2.0 ** (drawn * 250 - 125),
        "two sizes": torch.where(drawn < 0.5, 1.0, 1e-30).double(), "ordinary": drawn - 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("width", [1, 2, 32, 33, 1000, 1025, 30_000])
def test_places_are_those_of_the_definition_for_rows_of_every_kind(width):
    rows = hard_rows(width)
    deltas = torch.stack([row[torch.randperm(width)] if width % 2 else row for row in rows.values()])
    words = [np.empty(width, np.uint64) for _ in range(2)]
    ranking = np.empty((1, width)), np.empty(width, np.uint32), *words, np.empty(1 << 14, np.int64)
    wanted = rank_in_row(deltas)
    for name, delta, places in zip(rows, deltas, wanted, strict=True):
        assert not kernels._rank(rows_of(delta[None]), False, 0, width, width, ranking)
        np.testing.assert_array_equal(ranking[0][0], places.numpy(), err_msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["linear", "ties", "della"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_is_refused_by_name(bad, method, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "LEAST", 0)
    paths = family(tmp_path, [dtype] * 3, 1)
    broken = {f"t{i}": values(shape, i, dtype) for i, shape in enumerate(SHAPES)}
    broken["t4"][2047] = bad
    write_checkpoint(paths[2], broken)
    merged = open_merge(parse_recipe(recipe_of(method, paths, {"density": 0.5}, [0.5, 0.5, 0.5])))
    assert merged.read("t1").isfinite().all()
    with pytest.raises(NonFiniteError, match=r"m2: t4 holds (nan|inf) at element 2047"):
        merged.read("t4")


def test_results_beyond_the_range_are_refused_and_the_largest_is_not(tmp_path, monkeypatch):
    largest = torch.finfo(torch.bfloat16).max
    paths = [
        write_checkpoint(tmp_path / f"m{i}", {"t": torch.full((9,), largest, dtype=torch.bfloat16)}) for i in (0, 1)
    ]
    assert_same_bytes(recipe_of("linear", paths, {}, [1.0, 3.0]), monkeypatch)
    merged = open_merge(parse_recipe(recipe_of("linear", paths, {"normalize": False}, [1.0, 1.0])))
    with pytest.raises(NonFiniteError, match="bfloat16 ends at"):
        merged.read("t")


def test_words_are_numpys():
    for key, counter, blocks in (((3, 2**63 + 5), 0, 1), ((2**64 - 1, 7), 2**40, 33)):
        words = np.empty(4 * blocks, np.uint64)
        kernels.philox(np.uint64(key[0]), np.uint64(key[1]), counter, words)
        wanted = np.random.Philox(key=np.array(key, np.uint64), counter=(counter - 1) % 2**256).random_raw(4 * blocks)
        np.testing.assert_array_equal(words, wanted)


def rows_of(stack: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the loops take, of a float64 (models, n)."""
    rows = stack.numpy()
    return np.array([row.ctypes.data for row in rows], np.int64), rows[0, :0]


@pytest.mark.parametrize("count", [1, 2047, 2048, 6001])
def test_counts_are_those_of_the_definition(count):
    deltas = torch.stack([values((count,), seed, torch.float64) for seed in (1, 2)])
    keys, raw = np.empty((2, kernels.BLOCK), np.uint32), rows_of(deltas)
    upper = np.zeros((2, 1 << 15), np.int64)
    wanted = count_upper(deltas.abs())
    bins = locate(wanted, [[1, (count + 1) // 2]])
    near = np.zeros((2, 2, 3, 1 << 16), np.int64)
    assert not kernels.count_upper(raw, False, count, keys, upper, bins[..., 0] - 1, near)
    np.testing.assert_array_equal(upper, wanted.numpy())
    lower = np.zeros((2, 2, 1 << 16), np.int64)
    assert not kernels.count_lower(raw, False, count, keys, bins[..., 0], lower)
    np.testing.assert_array_equal(lower, count_lower(deltas.abs(), bins).numpy())
    np.testing.assert_array_equal(near[:, :, 1], lower)
    np.testing.assert_array_equal(near.sum(-1)[:, :, 0], np.take_along_axis(upper, bins[..., 0] - 1, 1))


def test_a_numba_that_does_not_work_is_done_without(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "LEAST", 0)
    monkeypatch.setitem(sys.modules, "ctl_merge.methods.kernels", None)  # its import fails
    monkeypatch.delattr("ctl_merge.methods.kernels", raising=False)
    paths = family(tmp_path, [torch.bfloat16] * 3, 2)
    merged = open_merge(parse_recipe(recipe_of("ties", paths, {"density": 0.5}, [0.5, 0.5])))
    assert merged.has_loops and merged._loops is None
    assert merged.read("t5").shape == (33, 65)


def test_small_merges_do_not_wait_for_a_compiler(tmp_path):
    paths = family(tmp_path, [torch.bfloat16] * 3, 2)
    assert not open_merge(parse_recipe(recipe_of("ties", paths, {"density": 0.5}, [0.5, 0.5]))).has_loops


@pytest.mark.parametrize("method", ["model_stock", "sce", "ram", "consensus", "metagpt", "multislerp", "nuslerp"])
def test_measures_and_methods_without_a_loop_get_the_same_stack(method, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "LOOP_CHUNK", 1 << 18)
    paths = family(tmp_path, [torch.bfloat16] * 4, 3, shapes=((1 << 19 | 1,), (3, 100_003), (5,)))
    assert_same_bytes(recipe_of(method, paths, {"select_topk": 0.4}, [0.6, 0.3, 0.45, 0.2]), monkeypatch)
