"""The laws of Cross-Task Linearity, each by its words, on tiny models through the whole probe."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from probe_references import (  # noqa: F401 (a fixture for all)
    affine,
    combine,
    load,
    nll,
    nonlinearity,
    on_other_inputs,
    one_thread_a_model,
    open_merge,
    patched_logits,
    random_tokens,
    run_plain,
    run_probe,
    write_family,
)
from tiny_architectures import build, finetune
from torch import nn

from ctl_merge.probing.data import TokenSet
from ctl_merge.probing.grams import SiteGrams
from ctl_merge.probing.metrics import inner, interpolation, unit
from ctl_merge.probing.run import Rider

TOKENS = random_tokens(4, 18)
BLOCKS = [f"model.layers.{i}" for i in range(3)]
ROUNDING = 1e-4  # R of what is exactly linear, in float32


def only(wanted: str, scale: float = 0.05) -> Callable[[nn.Module, int], None]:
    """Parents that differ in one parameter alone."""

    def change(model: nn.Module, seed: int) -> None:
        parameter = model.get_parameter(wanted)
        parameter += scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))

    return change


# ---- 1 and 2: nothing to be linear about


def test_1_an_identical_pair_deviates_by_nothing_and_has_no_ratio(tmp_path: Path) -> None:
    family = write_family(tmp_path, change=lambda model, seed: finetune(model, 7))
    for weights in ((0.5, 0.5), (0.3, 0.7), (0.123, 0.877)):
        for row in run_probe(family, weights, TOKENS).rows.values():
            assert row["relative_deviation"] < 1e-6
            assert row["cos"] == pytest.approx(1, abs=1e-12) and row["coef"] == pytest.approx(1, abs=1e-6)
            assert row["nonlinearity"] is None and row["nonlinearity_robust"] is None
            assert row["nonlinearity_low"] is None and row["nonlinearity_high"] is None


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_2_at_alpha_0_or_1_nothing_deviates(alpha: float, tmp_path: Path) -> None:
    for row in run_probe(write_family(tmp_path), (alpha, 1 - alpha), TOKENS).rows.values():
        assert row["relative_deviation"] < 1e-6
        assert row["nonlinearity"] is None
        assert row["effective_feature"] == pytest.approx([alpha, 1 - alpha], abs=1e-5)


# ---- 3: what is exactly linear


@pytest.mark.parametrize("parameter", ["self_attn.o_proj.weight", "mlp.down_proj.weight"])
def test_3_models_that_differ_in_one_map_into_the_residual_are_linear_at_its_block(
    parameter: str, tmp_path: Path
) -> None:
    family = write_family(tmp_path, change=only(f"{BLOCKS[1]}.{parameter}"))
    rows = run_probe(family, (0.5, 0.5), TOKENS).rows
    part = f"{BLOCKS[1]}.{'attention' if 'attn' in parameter else 'mlp'}"
    assert rows[BLOCKS[0]]["nonlinearity"] is None
    assert rows[part]["nonlinearity"] < ROUNDING
    assert rows[BLOCKS[2]]["nonlinearity"] > 100 * ROUNDING
    if "mlp" in parameter:  # behind the attention comes the MLP of the same block, which is not linear
        assert rows[BLOCKS[1]]["nonlinearity"] < ROUNDING


def test_3_models_that_differ_in_the_embedding_are_linear_at_the_input(tmp_path: Path) -> None:
    rows = run_probe(write_family(tmp_path, change=only("model.embed_tokens.weight")), (0.5, 0.5), TOKENS).rows
    assert rows["model.layers.input"]["nonlinearity"] < ROUNDING
    assert all(rows[block]["nonlinearity"] > 100 * ROUNDING for block in BLOCKS)


def test_3_models_that_differ_in_the_head_are_linear_at_the_logits(tmp_path: Path) -> None:
    probed = run_probe(write_family(tmp_path, change=only("lm_head.weight", 0.5)), (0.3, 0.7), TOKENS)
    assert all(row["nonlinearity"] is None for row in probed.rows.values())
    found = probed.losses["merges"]["merged"]
    assert found["agreement"]["value"] == 1
    assert found["kl"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["nonlinearity_cost"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["dilution_cost"]["1"]["value"] != pytest.approx(0, abs=1e-3)


# ---- 4 and 5: identities


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
def test_4_one_linear_layer_deviates_by_the_product_of_the_differences(alpha: float) -> None:
    """dev = -α(1-α) (W_i - W_j)(H_i - H_j)."""
    generator = torch.Generator().manual_seed(0)
    (w, v), (h, g) = (torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in ((6, 5), (5, 1, 9)))
    mixed = alpha * w + (1 - alpha) * v, alpha * h + (1 - alpha) * g
    out = torch.stack([torch.einsum("od,dbt->bto", *pair) for pair in ((v * 0, h), (w, h), (v, g), mixed)])
    grams = SiteGrams(["base", "i", "j", "merged"])
    grams.add(out, torch.ones(1, 1, 9, dtype=torch.bool), [(torch.zeros(4), torch.zeros(4))])
    deviation = unit(3, 4) - interpolation(np.array([alpha, 1 - alpha]), 4)
    expected = alpha * (1 - alpha) * torch.einsum("od,dbt->bto", w - v, h - g).norm()
    found = inner(grams.gram[0].sum(0).numpy(), deviation, deviation)
    assert math.sqrt(found) == pytest.approx(float(expected), rel=1e-9)


def test_5_local_and_propagated_add_up_to_the_deviation(tmp_path: Path) -> None:
    """As vectors: their inner products with each other and with dev are those of the features themselves."""
    family, weights = write_family(tmp_path), (0.6, 0.3)
    plain, probed = run_plain(family, weights, TOKENS.ids), run_probe(family, weights, TOKENS)
    for site in BLOCKS:
        grams = probed.observed.grams.sites[site]
        names = grams.sources
        gram = torch.stack(grams.gram).sum((0, 1)).numpy()
        own, ghost = (unit(names.index(n), len(names)) for n in ("merged", "merged/ghost"))
        centre = interpolation(np.array(weights), len(names))
        vectors = (ghost - centre, own - ghost, own - centre)
        ideal = affine(weights, plain.sources[site])
        wanted = (plain.ghosts[site] - ideal, plain.merged[site] - plain.ghosts[site], plain.merged[site] - ideal)
        assert np.allclose(vectors[0] + vectors[1], vectors[2])
        size = float(wanted[2].square().sum())
        for a, x in zip(vectors, wanted, strict=True):
            for b, y in zip(vectors, wanted, strict=True):
                assert inner(gram, a, b) == pytest.approx(float((x * y).sum()), abs=1e-4 * size)


def test_5_the_first_block_inherits_nothing_as_the_embedding_is_linear(tmp_path: Path) -> None:
    rows = run_probe(write_family(tmp_path), (0.6, 0.3), TOKENS).blocks()
    assert rows[BLOCKS[0]]["propagated"] < ROUNDING
    assert rows[BLOCKS[0]]["local"] == pytest.approx(rows[BLOCKS[0]]["nonlinearity"], rel=1e-4)
    assert all(rows[block]["propagated"] > 100 * ROUNDING for block in BLOCKS[1:])


# ---- 6: the quadratic regime


def test_6_slopes_of_dev_1_minus_cos_and_the_ratio_are_2_4_1_when_tau_is_scaled(tmp_path: Path) -> None:
    scales = (0.25, 0.5, 1.0)
    rows = []
    for scale in scales:
        family = write_family(tmp_path / f"{scale}", scale=0.001 * scale)
        rows.append(run_probe(family, (0.5, 0.5), TOKENS).blocks())
    for site in BLOCKS:
        for slope, value in (
            (2, lambda row: row["relative_deviation"]),
            (4, lambda row: 1 - row["cos"]),
            (1, lambda row: row["nonlinearity"]),
            (2, lambda row: 1 - row["cos_parents"]),
        ):
            logs = np.log([value(row[site]) for row in rows])
            assert np.polyfit(np.log(scales), logs, 1)[0] == pytest.approx(slope, abs=0.12)


def test_6_dev_is_proportional_to_alpha_times_1_minus_alpha(tmp_path: Path) -> None:
    family = write_family(tmp_path, scale=0.0005)
    for site in BLOCKS:
        found = [
            run_probe(family, (a, 1 - a), TOKENS).blocks()[site]["relative_deviation"] / (a * (1 - a))
            for a in (0.1, 0.5)
        ]
        assert found == pytest.approx([found[0]] * 2, rel=0.05)


# ---- 7 and 8: what linearity is not


def test_7_independent_initialisations_are_not_linear(tmp_path: Path) -> None:
    def change(model: nn.Module, seed: int) -> None:
        model.load_state_dict(build("llama", seed + 50, **wide).state_dict())

    wide = {"initializer_range": 0.05}
    probed = run_probe(write_family(tmp_path, change=change, **wide), (0.5, 0.5), TOKENS)
    for row in probed.blocks().values():
        assert row["nonlinearity"] > 0.8
        assert 0.2 < row["cos"] < 0.7 and row["cos_parents"] < 0.1
    assert all(entry["cosine_to_base"] < 0.9 for entry in probed.data["lineage"])


def test_8_permuted_neurons_make_the_ratio_explode(tmp_path: Path) -> None:
    """The same function by other weights: the parents agree in their features, and the merge is far from both."""

    def change(model: nn.Module, seed: int) -> None:
        finetune(model, seed, 0.001)
        if seed == 2:
            for block in model.model.layers:
                order = torch.randperm(block.mlp.down_proj.in_features, generator=torch.Generator().manual_seed(3))
                for weight in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight):
                    weight.copy_(weight[order])
                block.mlp.down_proj.weight.copy_(block.mlp.down_proj.weight[:, order])

    family = write_family(tmp_path, change=change, initializer_range=0.1)
    plain = run_plain(family, (0.5, 0.5), TOKENS.ids)
    for site, row in run_probe(family, (0.5, 0.5), TOKENS).blocks().items():
        assert row["nonlinearity"] > 3 and 0.05 < row["relative_deviation"] < 1
        assert row["cos_parents"] > 0.998 > row["cos"]
        assert row["nonlinearity"] == pytest.approx(plain.numbers(site)["nonlinearity"], rel=1e-4)


# ---- 9 and 10: what must not matter


def test_9_padding_and_batch_size_change_nothing(tmp_path: Path) -> None:
    family = write_family(tmp_path)
    junk = torch.full((4, 5), 7)
    padded = TokenSet("padded", torch.cat([TOKENS.ids, junk], 1), nn.functional.pad(TOKENS.strata, (0, 5)))
    wanted = run_probe(family, (0.6, 0.3), TOKENS).rows
    for tokens, batch in ((TOKENS, 1), (TOKENS, 3), (padded, 4), (padded, 2)):
        for site, row in run_probe(family, (0.6, 0.3), tokens, batch=batch).rows.items():
            assert row["massive"] == wanted[site]["massive"]
            for name, value in row.items():
                if isinstance(value, float) and not (site.endswith("input") or name == "propagated"):
                    assert value == pytest.approx(wanted[site][name], rel=1e-4, abs=1e-6), (site, name)


def test_10_a_massive_dimension_drives_cos_to_1_and_leaves_the_ratio_alone(tmp_path: Path) -> None:
    def prepare(model: nn.Module) -> None:
        model.transformer.h[2].mlp.c_proj.bias[5] += 100.0

    site = "transformer.h.2"
    plain = run_probe(write_family(tmp_path / "plain", "gpt2"), (0.5, 0.5), TOKENS).rows[site]
    massive = run_probe(write_family(tmp_path / "massive", "gpt2", prepare=prepare), (0.5, 0.5), TOKENS).rows[site]
    assert 5 in massive["massive"]
    assert 1 - massive["cos"] < 1e-3 * (1 - plain["cos"]) and 1 - massive["cos_parents"] < 1e-3
    assert massive["nonlinearity"] == pytest.approx(plain["nonlinearity"], rel=1e-3)
    assert massive["nonlinearity_robust"] == pytest.approx(plain["nonlinearity_robust"], rel=0.1)
    assert massive["nonlinearity_robust"] == pytest.approx(massive["nonlinearity"], rel=0.2)


# ---- 11: adapters


def test_11_a_low_rank_adapter_is_merged_as_the_product_of_its_factors(tmp_path: Path) -> None:
    """As B A, written out: neither Σ c B times Σ c A nor anything else that bends."""
    name = f"{BLOCKS[1]}.mlp.down_proj.weight"

    def factors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(64, 4, generator=generator) * 0.1, torch.randn(4, 96, generator=generator) * 0.1

    def change(model: nn.Module, seed: int) -> None:
        b, a = factors(seed)
        model.get_parameter(name).add_(b @ a)

    family, weights = write_family(tmp_path, change=change), (0.6, 0.3)
    merge = open_merge(family, weights)
    base = load("llama", family.base).get_parameter(name).detach()
    products = [b @ a for b, a in map(factors, (1, 2))]
    expected = base + sum(c * product for c, product in zip(weights, products, strict=True))
    apart = [
        sum(c * part for c, part in zip(weights, parts, strict=True))
        for parts in zip(factors(1), factors(2), strict=True)
    ]
    assert torch.allclose(merge.merged.read(name), expected, atol=1e-6)
    assert not torch.allclose(merge.merged.read(name), base + apart[0] @ apart[1], atol=1e-3)
    assert run_probe(family, merge, TOKENS).rows[BLOCKS[1]]["nonlinearity"] < ROUNDING


# ---- 12: losses


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.1, 0.9), (0.3, 0.4)])
def test_12_an_ensemble_loses_no_more_than_its_members_on_average(weights: tuple[float, ...], tmp_path: Path) -> None:
    """For convex weights, the base's share included, as the loss is convex in the logits."""
    losses = run_probe(write_family(tmp_path, scale=0.05), weights, TOKENS).losses
    shares = (1 - sum(weights), *weights)
    mean = sum(share * losses["nll"][name]["value"] for share, name in zip(shares, ("base", "1", "2"), strict=True))
    assert losses["merges"]["merged"]["ensemble"]["value"] <= mean


def test_12_the_loss_gap_is_nonlinearity_cost_and_dilution_cost(tmp_path: Path) -> None:
    losses = run_probe(write_family(tmp_path, scale=0.05), (0.6, 0.3), TOKENS).losses
    cost = losses["merges"]["merged"]
    for parent in ("1", "2"):
        gap = losses["nll"]["merged"]["value"] - losses["nll"][parent]["value"]
        assert cost["nonlinearity_cost"]["value"] + cost["dilution_cost"][parent]["value"] == pytest.approx(gap)


@pytest.mark.parametrize("streamed", [False, True], ids=["in_memory", "streamed"])
def test_a_patch_puts_the_interpolation_in_place_of_a_blocks_features(streamed: bool, tmp_path: Path) -> None:
    family, weights = write_family(tmp_path, scale=0.05), (0.6, 0.3)
    merge = open_merge(family, weights)
    riders = [Rider(f"merged/patch@{s}", merge.merged, ghost=False, patch=s, weights_of=0) for s in BLOCKS]
    probed = run_probe(family, merge, TOKENS, riders=riders, streamed=streamed)
    plain = run_plain(family, weights, TOKENS.ids)
    merged = combine("llama", family.base, family.models(), weights)
    for site in BLOCKS:
        patched = patched_logits(merged, TOKENS.ids, site, affine(weights, plain.sources[site]))
        gained = nll(plain.logits[-1], TOKENS.ids) - nll(patched, TOKENS.ids)
        assert probed.losses["merges"]["merged"]["patch"][site]["value"] == pytest.approx(gained, abs=1e-5)
    assert probed.rows[BLOCKS[1]]["nonlinearity"] == pytest.approx(plain.numbers(BLOCKS[1])["nonlinearity"], rel=1e-4)


# ---- 13: all that a model consists of


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "deepseek_v3"])
def test_13_tied_embeddings_biases_and_buffers_are_merged(name: str, tmp_path: Path) -> None:
    def change(model: nn.Module, seed: int) -> None:
        finetune(model, seed, 0.02)
        for key, buffer in model.named_buffers():
            if key in model.state_dict():
                buffer += torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed))

    family = write_family(tmp_path, name, change=change)
    plain = run_plain(family, (0.6, 0.3), TOKENS.ids)
    for streamed in (False, True):
        probed = run_probe(family, (0.6, 0.3), TOKENS, streamed=streamed)
        for site, row in probed.blocks().items():
            wanted = plain.numbers(site)
            for key in ("nonlinearity", "cos", "local", "relative_deviation"):
                assert row[key] == pytest.approx(wanted[key], rel=1e-4)
        for model, logits in zip(("base", "1", "2", "merged"), plain.logits, strict=True):
            assert probed.losses["nll"][model]["value"] == pytest.approx(nll(logits, TOKENS.ids), abs=1e-5)


# ---- 14: and methods that are not linear in the weights


@pytest.mark.parametrize("method, parameters", [("ties", {"density": 0.4}), ("dare_linear", {"density": 0.5})])
def test_14_a_streamed_probe_of_any_method_is_the_plain_definition(
    method: str, parameters: dict[str, float], tmp_path: Path
) -> None:
    """With the coefficients ĉ_w of each block: those of the combination that the merged task vector is closest to."""
    family = write_family(tmp_path / "models")
    merge = open_merge(family, (0.8, 0.6), method, parameters=parameters)
    merge.write(tmp_path / "written")
    models, merged = family.models(), load("llama", tmp_path / "written")
    rows = run_probe(family, merge, TOKENS, streamed=True).rows
    fits = {site: weight_coefficients([*models, merged], site) for site in BLOCKS}
    for site, (found, explained) in fits.items():
        row, plain = rows[site], run_plain(family, found, TOKENS.ids, merged=merged)
        assert row["effective_weight"] == pytest.approx(found, abs=1e-5)
        assert 0.1 < explained < 0.95 and row["explained_weight"] == pytest.approx(explained, abs=1e-5)
        wanted = plain.numbers(site)
        for key in ("nonlinearity", "nonlinearity_robust", "cos", "coef", "explained_feature", "relative_deviation"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-3), (site, key)
        assert row["effective_feature"] == pytest.approx(wanted["effective_feature"], abs=1e-4)
    for before, site in pairwise(BLOCKS):
        mixed, centre = (affine(fits[s][0], plain.sources[s]) for s in (before, site))
        ghost = on_other_inputs(merged, TOKENS.ids, site, mixed, {})[site]
        size = float((plain.merged[site] - centre).norm()) / rows[site]["nonlinearity"]
        assert rows[site]["propagated"] == pytest.approx(float((plain.merged[site] - ghost).norm()) / size, rel=1e-3)
        assert rows[site]["local"] == pytest.approx(float((ghost - centre).norm()) / size, rel=1e-3)


def weight_coefficients(models: Sequence[nn.Module], site: str) -> tuple[list[float], float]:
    """argmin ‖τ_m - Σ c_i τ_i‖² over a block's tensors, and its R², from base, parents and merge."""
    base, *others = (
        torch.cat([p.detach().double().flatten() for p in model.get_submodule(site).parameters()]).numpy()
        for model in models
    )
    *parents, merged = (weights - base for weights in others)
    matrix = np.stack(parents, axis=1)
    found = np.linalg.lstsq(matrix, merged, rcond=None)[0]
    return found.tolist(), 1 - float(((merged - matrix @ found) ** 2).sum() / (merged**2).sum())


# ---- parents that were trained in parts


def test_a_parent_that_leaves_a_block_alone_still_counts_there(tmp_path: Path) -> None:
    """Its features differ from the base's by what lies before: ĉ_w of the block alone would not know of them."""

    def change(model: nn.Module, seed: int) -> None:
        for site in BLOCKS if seed == 2 else BLOCKS[:1]:
            finetune(model.get_submodule(site), seed, 0.02)

    family, weights = write_family(tmp_path, change=change), (0.6, 0.3)
    plain = run_plain(family, weights, TOKENS.ids)
    for site, row in run_probe(family, weights, TOKENS).blocks().items():
        assert row["effective_weight"] == pytest.approx(weights, abs=1e-5)
        assert row["nonlinearity"] == pytest.approx(plain.numbers(site)["nonlinearity"], rel=1e-4)


# ---- precision and lineage


def test_rounding_to_the_artifacts_dtype_is_told_apart_from_nonlinearity(tmp_path: Path) -> None:
    """A light merge is lost in bfloat16: its deviation as written is no larger than rounding alone."""
    family, weights = write_family(tmp_path / "models", scale=1e-4), (0.5, 0.5)
    merge = open_merge(family, weights, dtype="bfloat16")
    merge.write(tmp_path / "written")
    written = Rider("merged/written", merge.merged, ghost=False, as_written=True, weights_of=0)
    rows = run_probe(family, merge, TOKENS, riders=[written]).rows
    exact = run_plain(family, weights, TOKENS.ids)
    rounded = run_plain(family, weights, TOKENS.ids, merged=load("llama", tmp_path / "written"))
    for site in BLOCKS:
        row, ideal = rows[site], affine(weights, exact.sources[site])
        r = nonlinearity(exact.merged[site], exact.sources[site], weights)
        size = float((exact.merged[site] - ideal).norm()) / r
        assert row["nonlinearity"] == pytest.approx(r, rel=1e-2)
        assert row["nonlinearity_written"] == pytest.approx(rounded.numbers(site)["nonlinearity"], rel=1e-3)
        assert row["floor"] == pytest.approx(float((rounded.merged[site] - exact.merged[site]).norm()) / size, rel=1e-3)
        assert row["nonlinearity"] < row["floor"] / 3 and row["nonlinearity_written"] < 3 * row["floor"]


def test_lineage_is_the_size_of_the_task_vector_and_its_angle_to_the_base(tmp_path: Path) -> None:
    family = write_family(tmp_path)
    base, *parents = (nn.utils.parameters_to_vector(m.parameters()).detach().double() for m in family.models())
    found = run_probe(family, (0.5, 0.5), TOKENS).data["lineage"]
    between = float(torch.cosine_similarity(parents[0] - base, parents[1] - base, dim=0))
    for entry, parent in zip(found, parents, strict=True):
        assert entry["cosine_to_others"] == pytest.approx(between, rel=1e-6)
        assert entry["relative_norm"] == pytest.approx(float((parent - base).norm() / base.norm()), rel=1e-6)
        assert entry["cosine_to_base"] == pytest.approx(float(torch.cosine_similarity(parent, base, dim=0)), rel=1e-6)
