"""Statistics of features, and the metrics that follow from them."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctl_merge.probing.grams import MASSIVE, SiteGrams
from ctl_merge.probing.intervals import Draws
from ctl_merge.probing.losses import Losses
from ctl_merge.probing.metrics import (
    Fit,
    Site,
    Sources,
    cosine,
    disagreement,
    inner,
    ratio,
    unit,
)

# ---- Gram matrices


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=30, deadline=None)
@given(
    sources=st.integers(2, 5), batches=st.lists(st.integers(1, 3), min_size=1, max_size=3), tokens=st.integers(1, 6),
    width=st.integers(1, 20), seed=st.integers(0, 1000),
)  # fmt: skip
def test_grams_are_sums_over_the_tokens_of_each_stratum(
    sources: int, batches: list[int], tokens: int, width: int, seed: int
) -> None:
    features = draw(seed, sources, sum(batches), tokens, width)
    strata = draw(seed + 1, sum(batches), 2, tokens) > 0
    strata[0, 0, 0] = True
    a, b = draw(seed + 2, 2, sources, dtype=torch.float64)
    grams, start = SiteGrams([str(i) for i in range(sources)]), 0
    for count in batches:
        part = slice(start, start + count)
        grams.add(features[:, part], strata[part], [(a, b), (b, b)])
        start += count
    f, masks = features.double().numpy(), strata.numpy()
    first = (f[0, 0, masks[0].any(0)] ** 2).mean(0)
    assert set(grams.massive) == set(np.argsort(-first)[: min(MASSIVE, width)])
    rest = [d for d in range(width) if d not in grams.massive]
    for n, s in np.ndindex(sum(batches), 2):
        chosen = f[:, n, masks[n, s]]  # (M, tokens, H)
        few = chosen[..., rest]
        assert np.allclose(grams.gram[n][s], np.einsum("ath,bth->ab", chosen, chosen), atol=1e-10)
        assert np.allclose(grams.robust[n][s], np.einsum("ath,bth->ab", few, few), atol=1e-10)
        assert int(grams.tokens[n][s]) == masks[n, s].sum()
        left, right = (np.einsum("a,ath->th", x.numpy(), chosen) for x in (a, b))
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        assert float(grams.cosines[n][s, 0]) == pytest.approx(((left * right).sum(1) / norms).sum(), abs=1e-9)
        assert float(grams.cosines[n][s, 1]) == pytest.approx(masks[n, s].sum())


def test_features_in_float32_are_summed_in_float64() -> None:
    """A long text of large features loses nothing: float32 would end with the fourth digit."""
    features = torch.full((2, 1, 4096, 64), 1000.0)
    features[1] += 1 / 64
    grams = SiteGrams(["a", "b"])
    grams.add(features, torch.ones(1, 1, 4096, dtype=torch.bool), [(torch.ones(2), torch.ones(2))])
    apart = inner(grams.gram[0][0].numpy(), unit(0, 2) - unit(1, 2), unit(0, 2) - unit(1, 2))
    assert float(apart) == pytest.approx(4096 * 64 / 64**2, rel=1e-6)


def test_massive_dimensions_are_the_bases_largest_in_the_tokens_that_count() -> None:
    features = draw(0, 2, 2, 3, 16) * 0.1
    for dimension in range(1, 16, 2):
        features[0, 0, :2, dimension] = 10.0
    features[0, 0, 2, ::2] = 1e3  # a token that is masked out
    features[1], features[0, 1] = 1e3, 1e3  # not the base; a later sequence
    strata = torch.tensor([[[True, True, False]]]).expand(2, 1, 3)
    grams = SiteGrams(["base", "other"])
    grams.add(features, strata, [(torch.ones(2), torch.ones(2))])
    assert grams.massive == [1, 3, 5, 7, 9, 11, 13, 15]


# ---- metrics on Grams worked by hand


def gram_of(*vectors: Sequence[float]) -> np.ndarray:
    matrix = np.array(vectors, dtype=float)
    return matrix @ matrix.T


def numbers(grams: np.ndarray, coefficients: Sequence[float], ghost: int | None = None) -> tuple[Any, Any]:
    """Of N sequences; sources: base, parents, merged, ghost. The numbers, and the draws of those that have them."""
    site, c = Site(grams, grams.sum(0), len(coefficients), Draws(len(grams))), np.array(coefficients)
    at = Sources(1 + len(coefficients), ghost)
    drawn = site.drawn_numbers(c, at)
    values = {name: values[0].tolist() for name, values in drawn.items()}
    return SimpleNamespace(**values, **site.plain_numbers(c, at)), drawn


def metrics(gram: np.ndarray, coefficients: Sequence[float], ghost: int | None = None) -> Any:
    """Of one sequence."""
    return numbers(gram[None], coefficients, ghost)[0]


def least_squares(gram: np.ndarray, target: np.ndarray, count: int) -> tuple[Any, Any]:
    return Fit(gram, count).coefficients(target)


def test_two_orthogonal_parents_and_a_merge_that_is_their_mean() -> None:
    found = metrics(gram_of([0, 0], [2, 0], [0, 2], [1, 1]), [0.5, 0.5])
    assert found.nonlinearity == 0 and found.relative_deviation == 0
    assert found.cos == pytest.approx(1) and found.coef == pytest.approx(1)
    assert found.cos_parents == pytest.approx(0)
    assert found.cos_to_parents == pytest.approx([math.sqrt(0.5)] * 2)
    assert found.effective_feature == pytest.approx([0.5, 0.5]) and found.explained_feature == pytest.approx(1)
    assert not hasattr(found, "local") and not hasattr(found, "propagated")


def test_a_merge_that_loses_half_of_what_its_parents_share() -> None:
    """F_1 = (3, 1), F_2 = (3, -1), I = (3, 0), F_m = (1.5, 0): dev = 1.5, disagreement ¼ · 2² = 1."""
    found = metrics(gram_of([0, 0], [3, 1], [3, -1], [1.5, 0]), [0.5, 0.5])
    assert found.nonlinearity == pytest.approx(1.5) and found.relative_deviation == pytest.approx(0.5)
    assert found.cos == pytest.approx(1) and found.coef == pytest.approx(0.5)
    assert found.cos_parents == pytest.approx(0.8)
    assert found.effective_feature == pytest.approx([0.25, 0.25])


def test_a_merge_that_follows_one_parent() -> None:
    found = metrics(gram_of([1, 1, 1], [4, 1, 1], [1, 5, 1], [4, 1, 1]), [0.5, 0.5])
    assert found.effective_feature == pytest.approx([1, 0]) and found.explained_feature == pytest.approx(1)
    assert found.nonlinearity == pytest.approx(1)  # as far from the middle as the parents are
    assert found.cos_to_parents[0] == pytest.approx(1)


def test_what_no_combination_of_parents_explains() -> None:
    """F_m - F_0 = (1, 0, 1), of which the parents' task vectors reach the first half."""
    found = metrics(gram_of([0, 0, 0], [2, 0, 0], [0, 2, 0], [1, 0, 1]), [0.5, 0.5])
    assert found.effective_feature == pytest.approx([0.5, 0])
    assert found.explained_feature == pytest.approx(0.5)


def test_a_flipped_sign_shows_in_the_cosine() -> None:
    assert metrics(gram_of([0, 0], [1, 1], [1, -1], [-1, 0]), [0.5, 0.5]).cos == pytest.approx(-1)


def test_local_and_propagated_parts_by_hand() -> None:
    """I = (0, 3), B_m(I) = (0, 4), F_m = (2, 4), disagreement 1: created 1, inherited 2."""
    found = metrics(gram_of([9, 9], [1, 3], [-1, 3], [2, 4], [0, 4]), [0.5, 0.5], ghost=4)
    assert found.local == pytest.approx(1) and found.propagated == pytest.approx(2)


def test_cosines_and_coefficients_are_means_over_sequences_and_ratios_are_of_sums() -> None:
    grams = np.stack([gram_of([0, 0], [2, 0], [0, 2], [1, 1]), gram_of([0, 0], [20, 0], [0, 20], [10, -10])])
    found = numbers(grams, [0.5, 0.5])[0]
    assert found.cos == pytest.approx(0.5) and found.coef == pytest.approx(0.5)
    assert found.nonlinearity == pytest.approx(math.sqrt(400 / (2 + 200)))


# ---- disagreement, ratios, least squares


@settings(max_examples=50, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 1000))
def test_the_disagreement_of_two_parents_is_alpha_times_1_minus_alpha_times_their_distance(
    alpha: float, seed: int
) -> None:
    base, one, two = draw(seed, 3, 8, dtype=torch.float64).numpy()
    found = disagreement(gram_of(base, one, two), np.array([alpha, 1 - alpha]))
    assert float(found) == pytest.approx(alpha * (1 - alpha) * ((one - two) ** 2).sum(), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(-1, 1), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_disagreement_is_the_spread_around_the_interpolation(weights: list[float], seed: int) -> None:
    """Whatever is added to all features alike, and with the base's share where the coefficients do not sum to 1."""
    sources = draw(seed, len(weights) + 1, 8, dtype=torch.float64).numpy()
    shares = np.array([1 - sum(weights), *weights])
    wanted = sum(abs(a) * ((f - shares @ sources) ** 2).sum() for a, f in zip(shares, sources, strict=True))
    for shift in (0.0, 3.0):
        assert float(disagreement(gram_of(*(sources + shift)), np.array(weights))) == pytest.approx(wanted, abs=1e-8)


def test_parents_that_float32_cannot_tell_apart_agree() -> None:
    one = np.array([1000.0, 1.0])
    same, other = gram_of([0, 0], one, one * (1 + 1e-7)), gram_of([0, 0], one, one * (1 + 1e-5))
    assert disagreement(same, np.array([0.5, 0.5])) == 0 < disagreement(other, np.array([0.5, 0.5]))
    assert disagreement(np.stack([same, other]), np.array([0.5, 0.5])).shape == (2,)


def test_nothing_over_nothing_is_no_number() -> None:
    assert np.isnan(ratio(np.array(0.0), np.array(0.0))) and np.isnan(ratio(np.array(2.0), np.array(0.0)))
    assert ratio(np.array([8.0, -1e-20]), np.array([2.0, 1.0])).tolist() == [2.0, 0.0]
    assert np.isnan(cosine(gram_of([0.0, 0.0], [1.0, 0.0]), unit(0, 2), unit(1, 2)))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 4), seed=st.integers(0, 1000))
def test_effective_coefficients_are_those_of_lstsq_on_the_features(count: int, seed: int) -> None:
    base, *rest = draw(seed, count + 2, 30, dtype=torch.float64).numpy()
    *parents, merged = rest
    matrix = np.stack([parent - base for parent in parents], axis=1)
    wanted = np.linalg.lstsq(matrix, merged - base, rcond=None)[0]
    found, explained = least_squares(gram_of(base, *parents, merged), unit(count + 1, count + 2), count)
    assert found == pytest.approx(wanted, abs=1e-8)
    left = ((merged - base - matrix @ wanted) ** 2).sum() / ((merged - base) ** 2).sum()
    assert explained == pytest.approx(1 - left, abs=1e-9)


def test_a_parent_that_did_not_move_gets_no_coefficient() -> None:
    found, explained = least_squares(gram_of([1, 1], [1, 1], [3, 1], [2, 1]), unit(3, 4), 2)
    assert found == pytest.approx([0, 0.5]) and explained == pytest.approx(1)


def test_collinear_parents_share_by_the_smallest_coefficients() -> None:
    found, explained = least_squares(gram_of([0, 0], [1, 0], [2, 0], [5, 0]), unit(3, 4), 2)
    assert found == pytest.approx([1, 2]) and explained == pytest.approx(1)


def test_a_merge_that_is_the_base_has_coefficients_of_zero_and_nothing_to_explain() -> None:
    found, explained = least_squares(gram_of([1, 2], [3, 2], [1, 4], [1, 2]), unit(3, 4), 2)
    assert found == pytest.approx([0, 0]) and math.isnan(explained)


def test_the_interval_of_r_covers_what_many_texts_would_give() -> None:
    """In 9 of 10 draws of 40 sequences and more, it holds the value of 4000."""
    generator = np.random.default_rng(0)

    def sample(count: int) -> np.ndarray:
        size = generator.lognormal(sigma=0.5, size=(count, 1, 1))
        parents, noise = generator.normal(size=(count, 2, 16)), 0.5 * generator.normal(size=(count, 1, 16))
        stack = np.concatenate([parents * 0, parents, parents.mean(1, keepdims=True) + noise], axis=1) * size
        stack = stack[:, [0, 2, 3, 4]]
        return np.einsum("nah,nbh->nab", stack, stack)

    truth = numbers(sample(4000), [0.5, 0.5])[0].nonlinearity
    found = [Draws(40).bounds(numbers(sample(40), [0.5, 0.5])[1]["nonlinearity"]) for _ in range(60)]
    assert 0.85 <= np.mean([low <= truth <= high for low, high in found]) <= 1
    assert all(0 < low < high < 2 * truth for low, high in found)


# ---- losses


def test_losses_are_sums_over_predicted_tokens_of_each_sequence() -> None:
    logits = {name: draw(i, 3, 5, 7) for i, name in enumerate(("base", "one", "two", "merged"))}
    ids = torch.arange(15).view(3, 5) % 7
    losses = Losses(list(logits), ["merged"])
    losses.add(logits, ids, [np.array([0.6, 0.3])], 3)
    mixed = 0.1 * logits["base"].double() + 0.6 * logits["one"].double() + 0.3 * logits["two"].double()
    for n in range(3):
        log = {name: t[n, :-1].double().log_softmax(-1) for name, t in {**logits, "ensemble": mixed}.items()}
        nll = {name: -sum(float(p[t, ids[n, t + 1]]) for t in range(4)) for name, p in log.items()}
        assert {name: losses.nll[name][n] for name in logits} == pytest.approx({m: nll[m] for m in logits})
        assert losses.ensemble["merged"][n] == pytest.approx(nll["ensemble"])
        divergence = (log["merged"].exp() * (log["merged"] - log["ensemble"])).sum()
        assert losses.kl["merged"][n] == pytest.approx(float(divergence))
        agree = (log["merged"].argmax(-1) == log["ensemble"].argmax(-1)).sum()
        assert losses.agree["merged"][n] == int(agree)
    assert losses.tokens == [4, 4, 4]
