"""Intervals, paired differences, blame and scaling, against the plain definitions resampled in loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import recipe_text
from probe_references import (  # noqa: F401 (a fixture for all)
    Plain,
    affine,
    combine,
    definition,
    load,
    nll,
    one_thread_a_model,
    open_merge,
    patched_logits,
    random_tokens,
    run_plain,
    run_probe,
    subject_of,
    write_family,
)
from test_probe_laws import weight_coefficients
from tiny_architectures import finetune
from torch import nn

import ctl_merge
from ctl_merge.checkpoint import CHUNK
from ctl_merge.merging import Merge
from ctl_merge.probing.costs import blame
from ctl_merge.probing.intervals import DRAWS, Draws
from ctl_merge.probing.null import Combination, SignFlipped
from ctl_merge.probing.observer import Rider
from ctl_merge.probing.report import rebuild
from ctl_merge.probing.run import Running, observe
from ctl_merge.probing.scaling import SCALES, scaled
from ctl_merge.probing.statistics import Statistics

TOKENS = random_tokens(4, 18)
BLOCKS = [f"model.layers.{i}" for i in range(3)]
WEIGHTS = (0.6, 0.3)


def resampled(count: int, of: Callable[[np.ndarray], Any]) -> list[Any]:
    """What `of` finds on every draw; the draws are those that the product says it makes.

    The order within a draw changes nothing: of four sequences there are 35 draws, and each is computed once.
    """
    found = cache(lambda index: of(np.array(index)))
    draws = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    return [found(tuple(sorted(index))) for index in draws.tolist()]


def ends(values: Any) -> list:
    return np.quantile(np.array(values), [0.025, 0.975], axis=0).tolist()


def bounds(row: dict[str, Any], name: str) -> list:
    found = [row[f"{name}_low"], row[f"{name}_high"]]
    return [list(end.values()) for end in found] if isinstance(found[0], dict) else found


# ---- draws


def test_draws_are_the_sample_itself_and_resamples_of_its_size() -> None:
    draws = Draws(7)
    assert draws.weights.shape == (1 + DRAWS, 7) and draws.weights[0].tolist() == [1] * 7
    assert (draws.weights.sum(1) == 7).all()
    values = np.arange(14.0).reshape(7, 2)
    expected = resampled(7, lambda index: values[index].sum(0))
    assert np.allclose(draws.sums(values)[1:], expected) and np.allclose(draws.means(values)[0], values.mean(0))
    assert np.allclose(np.array(draws.bounds(draws.sums(values))), ends(expected))


def test_one_sequence_has_no_interval() -> None:
    found = Draws(1).interval(Draws(1).sums(np.array([3.0])))
    assert found["value"] == 3 and math.isnan(found["low"]) and math.isnan(found["high"])


def test_draws_without_a_value_are_left_out() -> None:
    drawn = np.arange(2.0 * (1 + DRAWS)).reshape(1 + DRAWS, 2)
    drawn[1:501, 0], drawn[:, 1] = np.nan, np.nan
    low, high = Draws(3).bounds(drawn)
    assert [low[0], high[0]] == pytest.approx(np.quantile(drawn[501:, 0], [0.025, 0.975]).tolist())
    assert np.isnan(low[1]) and np.isnan(high[1])


# ---- rows


def pick(plain: Plain, site: str, index: np.ndarray) -> dict[str, Any]:
    sources = [f[index] for f in plain.sources[site]]
    return definition(plain.merged[site][index], plain.ghosts[site][index], sources, plain.coefficients)


def test_intervals_are_those_of_the_definition_on_resampled_sequences(tmp_path: Path) -> None:
    family, site = write_family(tmp_path), BLOCKS[1]
    row = run_probe(family, WEIGHTS, TOKENS).data["sets"]["random"]["blocks"]
    row = next(own for own in row if own["block"] == site)
    plain = run_plain(family, WEIGHTS, TOKENS.ids)
    names = "nonlinearity cos coef effective_feature explained_feature local propagated".split()
    drawn = resampled(4, lambda index: pick(plain, site, index))
    for name in names:
        wanted = ends(np.array([numbers[name] for numbers in drawn]))
        assert np.allclose(bounds(row, name), wanted, rtol=1e-3, atol=1e-6), name
        value = row[name] if not isinstance(row[name], dict) else list(row[name].values())
        assert np.allclose(value, pick(plain, site, np.arange(4))[name], rtol=1e-3, atol=1e-6), name


def test_the_null_is_a_parent_with_random_signs_in_a_merge_with_the_other(tmp_path: Path) -> None:
    family = write_family(tmp_path)
    merge = open_merge(family, WEIGHTS)
    subject = subject_of({"merged": merge}, family)
    one, two = subject.parents.values()
    flipped = SignFlipped(subject.base, two)
    nulls = Combination(subject.base, [one, flipped], WEIGHTS)
    riders = [
        Rider("merged/null", nulls, ghost=False, weights_of=0),
        Rider("merged/null-parent", flipped, ghost=False, weights_of=0),
    ]
    rows = run_probe(family, merge, TOKENS, riders=riders).rows
    base, first, second = family.models()
    signs = load("llama", family.base)
    with torch.no_grad():
        for name, parameter in signs.named_parameters():
            parameter.copy_(flipped.read(name))
            moved, own = parameter - base.get_parameter(name), second.get_parameter(name) - base.get_parameter(name)
            assert torch.allclose(moved.abs(), own.abs(), atol=1e-7)
            if own.numel() > 1000:
                assert 0.4 < float(((moved > 0) == (own > 0)).float().mean()) < 0.6
    signs.save_pretrained(tmp_path / "signs")
    fake = type(family)("llama", family.base, {"1": family.parents["1"], "2": tmp_path / "signs"})
    plain = run_plain(fake, WEIGHTS, TOKENS.ids, merged=combine("llama", family.base, [base, first, signs], WEIGHTS))
    for site in BLOCKS:
        row = rows[site]
        numbers = lambda index, site=site: pick(plain, site, index)["nonlinearity"]  # noqa: E731
        assert row["nonlinearity_null"] == pytest.approx(numbers(np.arange(4)), rel=1e-3)
    assert bounds(rows[BLOCKS[2]], "nonlinearity_null") == pytest.approx(
        ends(resampled(4, lambda index: pick(plain, BLOCKS[2], index)["nonlinearity"])), rel=1e-3
    )


def test_what_rounding_does_has_intervals(tmp_path: Path) -> None:
    family = write_family(tmp_path / "models", scale=0.003)
    merge = open_merge(family, WEIGHTS, dtype="bfloat16")
    merge.write(tmp_path / "written")
    written = Rider("merged/written", merge.merged, ghost=False, as_written=True, weights_of=0)
    row = run_probe(family, merge, TOKENS, riders=[written]).rows[BLOCKS[2]]
    exact = run_plain(family, WEIGHTS, TOKENS.ids)
    rounded = run_plain(family, WEIGHTS, TOKENS.ids, merged=load("llama", tmp_path / "written"))

    def floor(index: np.ndarray) -> float:
        sources = [f[index] for f in exact.sources[BLOCKS[2]]]
        centre, own = affine(WEIGHTS, sources), exact.merged[BLOCKS[2]][index]
        size = float((own - centre).norm()) / pick(exact, BLOCKS[2], index)["nonlinearity"]
        return float((rounded.merged[BLOCKS[2]][index] - own).norm()) / size

    assert bounds(row, "floor") == pytest.approx(ends(resampled(4, floor)), rel=1e-2)
    r = resampled(4, lambda index: pick(rounded, BLOCKS[2], index)["nonlinearity"])
    assert bounds(row, "nonlinearity_written") == pytest.approx(ends(r), rel=1e-2)


def test_recipes_that_ride_together_are_compared_on_the_same_draws(tmp_path: Path) -> None:
    family = write_family(tmp_path)
    merges = {"first": open_merge(family, WEIGHTS), "same": open_merge(family, WEIGHTS),
              "other": open_merge(family, (0.5, 0.5))}  # fmt: skip
    subject = subject_of(merges, family)
    riders = [Rider(name, checkpoint, ghost=False) for name, checkpoint in subject.merges.items()]
    report = rebuild(Statistics.of(subject, riders, observe(subject, riders, [TOKENS], Running())))
    rows = {(row["block"], row["merge"]): row for row in report.rows}
    plains = [run_plain(family, weights, TOKENS.ids) for weights in (WEIGHTS, (0.5, 0.5))]
    for site in BLOCKS:
        assert "nonlinearity_against_first" not in rows[site, "first"]
        same = rows[site, "same"]
        none = [same["nonlinearity_against_first"], *bounds(same, "nonlinearity_against_first")]
        assert none == pytest.approx([0, 0, 0], abs=1e-12)
        other = rows[site, "other"]
        apart = rows[site, "other"]["nonlinearity"] - rows[site, "first"]["nonlinearity"]
        assert other["nonlinearity_against_first"] == pytest.approx(apart)
        low, high = bounds(other, "nonlinearity_against_first")
        assert low < apart < high
    drawn = resampled(4, lambda i: [pick(plain, BLOCKS[1], i)["nonlinearity"] for plain in plains])
    wanted = ends([other - first for first, other in drawn])
    assert bounds(rows[BLOCKS[1], "other"], "nonlinearity_against_first") == pytest.approx(wanted, abs=1e-4)


def test_prompt_and_response_are_told_apart_at_every_block(tmp_path: Path) -> None:
    family = write_family(tmp_path)
    first, delimiter, *_, other = TOKENS.strata.unbind(1)
    answer = torch.arange(TOKENS.ids.shape[1]) >= 9
    masks = torch.stack([first, delimiter, other & ~answer, other & answer, torch.zeros_like(other)], dim=1)
    plain = run_plain(family, WEIGHTS, TOKENS.ids)
    for site, row in run_probe(family, WEIGHTS, replace(TOKENS, strata=masks)).blocks().items():
        wanted = plain.strata(site, masks)
        assert list(row["by_stratum"]) == ["first", "delimiter", "prompt", "response"]
        assert row["by_stratum"] == pytest.approx({name: wanted[name] for name in row["by_stratum"]}, rel=1e-4)


# ---- losses


def test_losses_are_compared_on_the_same_draws(tmp_path: Path) -> None:
    family = write_family(tmp_path, scale=0.05)
    found = run_probe(family, WEIGHTS, TOKENS).found
    logits = dict(zip(("base", "1", "2", "merged"), run_plain(family, WEIGHTS, TOKENS.ids).logits, strict=True))
    own = {name: np.array([nll(x[n : n + 1], TOKENS.ids[n : n + 1]) for n in range(4)]) for name, x in logits.items()}
    first, second = sorted(("1", "2"), key=lambda name: own[name].mean())
    best, cost = found["best_parent"], found["losses"]["merges"]["merged"]
    assert (best["parent"], best["second"]) == (first, second) and cost["against_best_parent"]["parent"] == first
    for interval, (one, other) in (
        (best["margin"], (second, first)),
        (cost["against_best_parent"], ("merged", first)),
        (cost["against_base"], ("merged", "base")),
    ):
        apart = own[one] - own[other]
        assert interval["value"] == pytest.approx(apart.mean(), abs=1e-5)
        wanted = ends(resampled(4, lambda index, apart=apart: apart[index].mean()))
        assert [interval["low"], interval["high"]] == pytest.approx(wanted, abs=1e-5)


def test_one_parent_has_no_second(tmp_path: Path) -> None:
    best = run_probe(write_family(tmp_path, parents=1), (0.5,), TOKENS).found["best_parent"]
    assert best == {"parent": "1", "second": None, "margin": None}


# ---- blame


def patched(family: Any, merge: Any, **how: Any) -> Any:
    riders = [Rider(f"merged/patch@{s}", merge.merged, ghost=False, patch=s, weights_of=0) for s in how.pop("sites")]
    return run_probe(family, merge, TOKENS, riders=riders, **how).losses["merges"]["merged"]


def check_blame(cost: dict[str, Any], sites: Sequence[str]) -> None:
    """Successive differences, and all of the non-linearity cost."""
    assert list(cost["blame"]) == [*sites, "logits"]
    gains = [0.0, *(cost["patch"][site]["value"] for site in sites), cost["nonlinearity_cost"]["value"]]
    values = [share["value"] for share in cost["blame"].values()]
    assert values == pytest.approx(np.diff(gains).tolist(), abs=1e-12)
    assert sum(values) == pytest.approx(cost["nonlinearity_cost"]["value"], abs=1e-12)
    assert all(share["low"] <= share["value"] <= share["high"] for share in cost["blame"].values())


def test_what_blocks_are_blamed_for_adds_up_to_the_nonlinearity_cost(tmp_path: Path) -> None:
    family = write_family(tmp_path, scale=0.05)
    cost = patched(family, open_merge(family, WEIGHTS), sites=BLOCKS)
    check_blame(cost, BLOCKS)
    plain = run_plain(family, WEIGHTS, TOKENS.ids)
    merged = combine("llama", family.base, family.models(), WEIGHTS)
    after = [patched_logits(merged, TOKENS.ids, s, affine(WEIGHTS, plain.sources[s])) for s in BLOCKS]
    ensemble = affine(WEIGHTS, plain.logits[:3])
    own = [[nll(x[n : n + 1], TOKENS.ids[n : n + 1]) for n in range(4)] for x in (plain.logits[3], *after, ensemble)]
    shares = -np.diff(np.array(own), axis=0)  # (sites and logits, N)
    for interval, share in zip(cost["blame"].values(), shares, strict=True):
        assert interval["value"] == pytest.approx(share.mean(), abs=1e-5)
        wanted = ends(resampled(4, lambda index, share=share: share[index].mean()))
        assert [interval["low"], interval["high"]] == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("method, parameters", [("ties", {"density": 0.4}), ("dare_ties", {"density": 0.5}),
                                                ("dare_linear", {"density": 0.5})])  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True], ids=["in_memory", "streamed"])
def test_a_patch_of_any_method_takes_the_coefficients_of_its_block(
    streamed: bool, method: str, parameters: dict[str, float], tmp_path: Path
) -> None:
    family = write_family(tmp_path / "models", scale=0.05)
    merge = open_merge(family, (0.8, 0.6), method, parameters=parameters)
    merge.write(tmp_path / "written")
    cost = patched(family, merge, sites=BLOCKS, streamed=streamed)
    check_blame(cost, BLOCKS)
    models, merged = family.models(), load("llama", tmp_path / "written")
    for site in BLOCKS:
        c = weight_coefficients([*models, merged], site)[0]
        plain = run_plain(family, c, TOKENS.ids, merged=merged)
        gone = patched_logits(merged, TOKENS.ids, site, affine(c, plain.sources[site]))
        gained = nll(plain.logits[-1], TOKENS.ids) - nll(gone, TOKENS.ids)
        assert cost["patch"][site]["value"] == pytest.approx(gained, abs=2e-5)


def test_a_decoder_alone_accounts_for_the_cost_and_its_encoder_starts_anew() -> None:
    gains = {f"encoder.block.{i}": np.array([0.1 * i]) for i in (1, 2)}
    gains |= {f"decoder.block.{i}": np.array([0.3 * i]) for i in (1, 2)}
    found = {site: float(share[0]) for site, share in blame(gains, np.array([1.0])).items()}
    assert found == pytest.approx({"encoder.block.1": 0.1, "encoder.block.2": 0.1, "decoder.block.1": 0.3,
                                   "decoder.block.2": 0.3, "logits": 0.4})  # fmt: skip
    assert blame({}, np.array([1.0])) == {}


# ---- scaling


@pytest.mark.parametrize("method, weights", [("slerp", None), ("ties", (0.8, 0.6))])
def test_a_scaled_merge_is_the_base_and_a_part_of_its_task_vector(
    method: str, weights: Sequence[float] | None, tmp_path: Path
) -> None:
    """Of a method that sees whole tensors too, larger than what is read at once."""
    family = write_family(tmp_path / "models", vocab_size=3000)
    listed = [(path, {"weight": w}) for path, w in zip(family.parents.values(), weights or (1, 1), strict=True)]
    text = recipe_text(method, listed, family.base, {"density": 0.5})
    if weights is None:
        text = recipe_text("slerp", [(path, {}) for path in family.parents.values()], family.parents["1"], {"t": 0.5})
    merged = Merge(ctl_merge.parse_recipe(text))
    merged.fetch()
    base = open_merge(family, (0.0, 0.0)).merged
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        own, whole = base.read(name), merged.merged.read(name)
        assert name.startswith("model.layers") or own.numel() > CHUNK
        found = Combination(base, [merged.merged], [0.25]).read(name)
        assert torch.allclose(found, own + 0.25 * (whole - own), atol=1e-6)
        assert not torch.allclose(found, own, atol=1e-4)


def scale(family: Any, merge: Any) -> list[dict[str, Any]]:
    subject = subject_of({"merged": merge}, family)
    runs = {}
    for s in (1.0, *SCALES):
        own = subject if s == 1 else scaled(subject, "merged", s)
        riders = [Rider("merged", own.merges["merged"], ghost=False)]
        runs[s] = observe(own, riders, [TOKENS], Running())
    whole = runs.pop(1.0)
    return rebuild(Statistics.of(subject, [], whole, scaled=runs)).rows


@pytest.mark.parametrize("weights", [WEIGHTS, (0.5, 0.5)])
def test_6_the_scaling_option_finds_slopes_of_2_4_and_1(weights: Sequence[float], tmp_path: Path) -> None:
    """Those of families that were written at each scale, by the plain definition."""
    family = write_family(tmp_path / "1", scale=0.004)
    rows = {row["block"]: row for row in scale(family, open_merge(family, weights))}
    small = [run_plain(write_family(tmp_path / f"{s}", scale=0.004 * s), weights, TOKENS.ids) for s in (0.25, 0.5, 1)]
    for site in BLOCKS:
        row = rows[site]
        assert row["quadratic"] is True
        for name, of in (
            ("slope_deviation", lambda n: n["relative_deviation"]),
            ("slope_cos", lambda n: 1 - n["cos"]),
            ("slope_nonlinearity", lambda n: n["nonlinearity"]),
        ):
            logs = np.log([of(plain.numbers(site)) for plain in small])
            slope = np.polyfit(np.log([0.25, 0.5, 1]), logs, 1)[0]
            assert row[name] == pytest.approx(slope, abs=0.05)  # written in float32, as the option does not
            assert row[f"{name}_low"] - 1e-9 <= row[name] <= row[f"{name}_high"] + 1e-9
    assert rows["model.layers.input"]["quadratic"] is None  # exactly linear: rounding alone is left


def test_far_from_the_base_the_regime_is_not_quadratic(tmp_path: Path) -> None:
    family = write_family(tmp_path, scale=0.3)
    rows = scale(family, open_merge(family, (0.5, 0.5)))
    assert [row["quadratic"] for row in rows if row["part"] == "block"] == [False] * 3


def test_a_method_that_is_not_linear_deviates_to_first_order(tmp_path: Path) -> None:
    family = write_family(tmp_path, scale=0.004)
    rows = scale(family, open_merge(family, (0.8, 0.6), "ties", parameters={"density": 0.4}))
    for row in (row for row in rows if row["part"] == "block"):
        assert row["quadratic"] is False and row["slope_deviation"] == pytest.approx(1, abs=0.1)


def test_where_nothing_deviates_nothing_is_said_of_the_regime(tmp_path: Path) -> None:
    def change(model: nn.Module, seed: int) -> None:
        finetune(model, 7, 0.01)

    family = write_family(tmp_path, change=change)
    assert all(row["quadratic"] is None for row in scale(family, open_merge(family, (0.5, 0.5))))
