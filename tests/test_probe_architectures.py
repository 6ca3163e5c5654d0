"""The probe is its definition on any architecture: streamed or in memory, whatever the batch size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from probe_references import (  # noqa: F401 (a fixture for all)
    Family,
    Plain,
    Probed,
    kl,
    nll,
    one_thread_a_model,
    open_merge,
    random_tokens,
    run_plain,
    run_probe,
    subject_of,
    write_family,
)
from tiny_architectures import ARCHITECTURES

from ctl_merge.model import load_weights
from ctl_merge.probing.data import TokenSet
from ctl_merge.probing.run import Rider, Session

WEIGHTS = (0.6, 0.3)
STANDARD = {"attention": "self_attn", "mlp": "mlp"}
# Architecture -> the paths of attention and MLP below a block; where blocks differ, those of all of them.
PARTS: Mapping[str, Mapping[str, str | Sequence[str]]] = {
    "llama": STANDARD,
    "qwen3": STANDARD,
    "phi3": STANDARD,
    "olmo2": STANDARD,
    "cohere2": STANDARD,
    "glm4": STANDARD,
    "gemma2": STANDARD,
    "gpt2": {"attention": "attn", "mlp": "mlp"},
    "gpt_neox": {"attention": "attention", "mlp": "mlp"},
    "bloom": {"attention": "self_attention", "mlp": "mlp"},
    "falcon": {"attention": "self_attention", "mlp": "mlp"},
    "opt": {"attention": "self_attn"},
    "mixtral": STANDARD,
    "qwen3_moe": STANDARD,
    "olmoe": STANDARD,
    "gpt_oss": STANDARD,
    "llama4_text": {"attention": "self_attn"},
    "deepseek_v3": STANDARD,
    "mamba": {"attention": "mixer"},
    "jamba": {"attention": ("mamba", "self_attn"), "mlp": "feed_forward"},
    "qwen3_next": {"attention": ("linear_attn", "self_attn"), "mlp": "mlp"},
    "bert": {"attention": "attention"},
    "modernbert": {"attention": "attn", "mlp": "mlp"},
    "t5": {"attention": "layer.0", "mlp": ("layer.2", "layer.1")},
    "bart": {"attention": "self_attn"},
    "gemma3": STANDARD,
    "llava": STANDARD,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {"sliding_window": 6},  # shorter than a window of text
    "gpt_oss": {"sliding_window": 6},
    "gemma3": {"text_config": {**ARCHITECTURES["gemma3"]["text_config"], "sliding_window": 6}},
}
SLOW = ("qwen3_next",)  # its plain implementation works on chunks of 64 tokens, however few there are
DEPTHS = {"jamba": 4, "qwen3_next": 4, "t5": 5, "bart": 5}

every_architecture = pytest.mark.parametrize("name", PARTS)


@dataclass(frozen=True)
class Case:
    """A family, windows of text, and every feature of every model on them."""

    family: Family
    tokens: TokenSet
    plain: Plain


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    folder = tmp_path_factory.mktemp("probe")

    @cache
    def make(name: str) -> Case:
        family = write_family(folder / name, name, **CONFIGS.get(name, {}))
        tokens = random_tokens(2 if name in SLOW else 4, 18)
        return Case(family, tokens, run_plain(family, WEIGHTS, tokens.ids, PARTS[name]))

    return make


def assert_is_the_definition(probed: Probed, plain: Plain) -> None:
    """Every number at every site, up to the rounding of float32."""
    rows = probed.rows
    linear = [site for site in rows if site.endswith(".input") and plain.numbers(site)["nonlinearity"] < 1e-4]
    assert rows.keys() == plain.merged.keys()
    for site, row in rows.items():
        for name, wanted in plain.numbers(site).items():
            if wanted is None:
                assert row[name] is None
            elif site in linear and name.startswith("nonlinearity"):
                assert row[name] < 1e-4  # nothing is left but rounding
            else:
                assert row[name] == pytest.approx(wanted, rel=1e-4, abs=2e-5), (site, name)


@every_architecture
def test_in_memory_and_streamed_are_the_definition_whatever_the_batch(name: str, case: Callable[[str], Case]) -> None:
    own = case(name)
    for streamed, batch in ((False, 4), (True, 1)):
        probed = run_probe(own.family, WEIGHTS, own.tokens, streamed=streamed, batch=batch)
        assert_is_the_definition(probed, own.plain)
        blocks = list(probed.blocks().values())
        assert len(blocks) == DEPTHS.get(name, 3)
        assert all(row["effective_weight"] == pytest.approx(WEIGHTS, abs=1e-5) for row in blocks)
        assert all(row["nonlinearity"] > 0.01 for row in blocks)  # far above rounding: the comparison says something


@pytest.mark.parametrize("name", ["llama", "mixtral", "mamba", "bert"])
def test_streamed_is_in_memory_bit_for_bit(name: str, case: Callable[[str], Case]) -> None:
    own = case(name)
    one, other = (run_probe(own.family, WEIGHTS, own.tokens, streamed=streamed) for streamed in (False, True))
    assert one.rows == other.rows and one.losses == other.losses


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon", "mamba", "gemma3"])
def test_losses_are_those_of_whole_models(name: str, case: Callable[[str], Case]) -> None:
    own = case(name)
    assert_losses(run_probe(own.family, WEIGHTS, own.tokens).losses, own.plain, own.tokens.ids)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_scored_on_the_second_half_of_a_window(name: str, case: Callable[[str], Case]) -> None:
    own = case(name)
    assert_losses(run_probe(own.family, WEIGHTS, own.tokens).losses, own.plain, own.tokens.ids[:, 9:])


def assert_losses(losses: Mapping[str, Any], plain: Plain, labels: torch.Tensor) -> None:
    base, one, two, merged = plain.logits
    ensemble = base + WEIGHTS[0] * (one - base) + WEIGHTS[1] * (two - base)
    wanted = {
        name: nll(logits, labels) for name, logits in zip(("base", "1", "2", "merged"), plain.logits, strict=True)
    }
    assert {name: row["value"] for name, row in losses["nll"].items()} == pytest.approx(wanted, abs=1e-5)
    found = losses["merges"]["merged"]
    assert found["ensemble"]["value"] == pytest.approx(nll(ensemble, labels), abs=1e-5)
    assert found["nonlinearity_cost"]["value"] == pytest.approx(wanted["merged"] - nll(ensemble, labels), abs=1e-5)
    for parent in ("1", "2"):
        dilution = nll(ensemble, labels) - wanted[parent]
        assert found["dilution_cost"][parent]["value"] == pytest.approx(dilution, abs=1e-5)
    assert found["kl"]["value"] == pytest.approx(kl(merged, ensemble), abs=1e-5)
    agree = (merged[:, :-1].argmax(-1) == ensemble[:, :-1].argmax(-1)).double().mean()
    assert found["agreement"]["value"] == pytest.approx(float(agree))


@pytest.mark.parametrize("name", ["gemma3", "t5"])
def test_models_in_memory_are_left_as_they_were(name: str, case: Callable[[str], Case]) -> None:
    """Caches are off while blocks run twice, in every part of a model, and on again after."""
    own = case(name)
    subject = subject_of({"merged": open_merge(own.family, WEIGHTS)}, own.family)
    models = {n: load_weights(c) for n, c in {"base": subject.base, **subject.parents, **subject.merges}.items()}
    caching = [config_caches(model) for model in models.values()]
    with Session(subject, [Rider("merged", subject.merges["merged"])], models) as session:
        session.run(own.tokens.ids, own.tokens.strata)
        assert not any(any(config_caches(model)) for model in models.values())
    assert any(caching[0]) and [config_caches(model) for model in models.values()] == caching
    assert not any("forward" in vars(module) for model in models.values() for module in model.modules())


def config_caches(model: torch.nn.Module) -> list[bool]:
    return [getattr(m.config, "use_cache", False) for m in model.modules() if hasattr(m, "config")]


def test_an_encoder_predicts_no_next_token(case: Callable[[str], Case]) -> None:
    own = case("bert")
    assert run_probe(own.family, WEIGHTS, own.tokens).losses is None


def test_strata_are_told_apart(case: Callable[[str], Case]) -> None:
    own = case("llama")
    for site, row in run_probe(own.family, WEIGHTS, own.tokens).blocks().items():
        wanted = own.plain.strata(site, own.tokens.strata)
        assert list(row["by_stratum"]) == ["first", "delimiter", "other"]  # no roles: no prompt, no response
        assert row["by_stratum"] == pytest.approx({name: wanted[name] for name in row["by_stratum"]}, rel=1e-4)


def test_an_encoder_has_the_strata_of_the_first_half_of_a_window(case: Callable[[str], Case]) -> None:
    own = case("t5")
    rows = run_probe(own.family, WEIGHTS, own.tokens).rows
    for site, masks in (
        ("encoder.block.1", own.tokens.strata[..., :9]),
        ("decoder.block.1", own.tokens.strata[..., 9:]),
    ):
        wanted = own.plain.strata(site, masks)
        for name, found in rows[site]["by_stratum"].items():
            assert found is None if wanted[name] is None else found == pytest.approx(wanted[name], rel=1e-4)
