"""Random numbers by address: no result of a merge may depend on who asks for them, in which order or in what pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import philox_uniform

from ctl_merge.methods.noise import uniform

KNOWN = [1792414, 11263943, 3927830, 16004447, 9176143, 16530419, 7917856, 14437032]
KNOWN_FAR = [13957053, 1656715]
ADDRESS = (0, "org/model", "model.layers.0.mlp.up_proj.weight")


def test_the_stream_never_changes():
    """Masks of merges that people have published depend on these numbers: they are part of the format."""
    assert uniform(*ADDRESS, 0, 8).mul(2**24).to(torch.int64).tolist() == KNOWN
    assert uniform(7, "a", "b", 2**40, 2).mul(2**24).to(torch.int64).tolist() == KNOWN_FAR


def test_it_is_philox_of_the_address():
    wanted = philox_uniform(3, "base", "lm_head.weight", 1001)
    np.testing.assert_array_equal(uniform(3, "base", "lm_head.weight", 0, 1001).numpy(), wanted)


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(0, 200))
def test_any_piece_is_a_slice_of_the_whole(start: int, count: int):
    whole = uniform(*ADDRESS, 0, 700)
    assert torch.equal(uniform(*ADDRESS, start, count), whole[start : start + count])


@settings(deadline=None)
@given(st.integers(2**31 - 50, 2**33), st.integers(1, 20))
def test_pieces_far_out_agree_too(start: int, count: int):
    """Tensors have more than 2^31 entries, and addresses must not wrap."""
    around = uniform(*ADDRESS, start - 9, count + 18)
    assert torch.equal(uniform(*ADDRESS, start, count), around[9 : 9 + count])


@pytest.mark.parametrize(
    "other", [(1, *ADDRESS[1:]), (0, "org/model2", ADDRESS[2]), (0, "org/model", "model.layers.1.mlp.up_proj.weight")]
)
def test_another_seed_model_or_tensor_has_unrelated_numbers(other: tuple[int, str, str]):
    ours, theirs = uniform(*ADDRESS, 0, 100_000).double(), uniform(*other, 0, 100_000).double()
    correlation = torch.corrcoef(torch.stack([ours, theirs]))[0, 1]
    assert abs(correlation) < 4 / 100_000**0.5


def test_parts_of_the_address_do_not_run_together():
    assert not torch.equal(uniform(1, "1a", "b", 0, 8), uniform(11, "a", "b", 0, 8))
    assert not torch.equal(uniform(1, "a", "bc", 0, 8), uniform(1, "ab", "c", 0, 8))


def test_numbers_are_uniform_in_0_1():
    numbers = uniform(*ADDRESS, 0, 1_000_000)
    assert numbers.dtype == torch.float32 and 0 <= numbers.min() and numbers.max() < 1
    counts = torch.histc(numbers, bins=100, min=0, max=1).double()
    chi_squared = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert 45 < chi_squared < 170  # 99 degrees of freedom: mean 99, standard deviation 14
    neighbours = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(neighbours) < 4 / 1000


def test_no_entries_are_no_numbers():
    assert uniform(*ADDRESS, 5, 0).shape == (0,)
