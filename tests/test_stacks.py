"""Blocks of any model are found; text's way through them is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from probe_references import inputs_of, nonlinearity, one_thread_a_model, stacks  # noqa: F401
from tiny_architectures import ARCHITECTURES, VOCABULARY, build, finetune
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import ctl_merge
from ctl_merge.architecture import empty_model
from ctl_merge.errors import ProbeError
from ctl_merge.probing.data import STRATA, TokenSet
from ctl_merge.probing.loaded import LoadedCheckpoint
from ctl_merge.probing.observer import Rider, Subject
from ctl_merge.probing.run import Session, batches
from ctl_merge.reference import ModelRef
from ctl_merge.stacks import every_block, find_blocks, tensors_below, text_sites
from ctl_merge.stored import open_checkpoint
from ctl_merge.weights import task_grams

NO_TEXT = ("whisper", "vit", "swin", "clip")
WIDE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY}
GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
# Model type -> its Auto class, config, and stack: none of them has GradientCheckpointingLayers.
OLDER: dict[str, tuple[Any, dict[str, Any], str]] = {
    "ctrl": (AutoModelForCausalLM, {**GPT, "dff": 96}, "transformer.h"),
    "gpt_neox_japanese": (AutoModelForCausalLM, {**WIDE, "intermediate_multiple_size": 2}, "gpt_neox_japanese.layers"),
    "openai-gpt": (AutoModelForCausalLM, GPT, "transformer.h"),
    "xlnet": (
        AutoModelForCausalLM, {"vocab_size": VOCABULARY, "d_model": 64, "n_layer": 3, "n_head": 4, "d_inner": 96},
        "transformer.layer",
    ),
    "mpnet": (AutoModelForMaskedLM, {**WIDE, "intermediate_size": 96}, "mpnet.encoder.layer"),
    "fsmt": (
        AutoModelForSeq2SeqLM,
        {"src_vocab_size": 64, "tgt_vocab_size": 64, "langs": ["en", "de"], "d_model": 64, "encoder_layers": 2,
         "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
         "decoder_ffn_dim": 96},
        "model.decoder.layers",
    ),
}  # fmt: skip

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def older(name: str) -> nn.Module:
    auto, config, _ = OLDER[name]
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(name, **config)).eval()


@every_architecture
def test_blocks_are_the_outermost_lists_of_layers(name: str) -> None:
    model = build(name)
    found = find_blocks(model)
    assert found.keys() == stacks(model).keys()
    for path, blocks in found.items():
        assert list(blocks) == [f"{path}.{i}" for i in range(len(blocks))]
        assert all(block is model.get_submodule(site) for site, block in blocks.items())


@pytest.mark.parametrize("name", OLDER)
def test_blocks_of_older_architectures_are_found_by_class_or_depth(name: str) -> None:
    """Of fsmt the larger of two stacks; a list of embeddings as long as the model is deep is smaller."""
    model = older(name)
    assert not stacks(model)
    model.more = nn.ModuleList(nn.Linear(1, 1) for _ in range(model.config.num_hidden_layers))
    assert list(find_blocks(model)) == [OLDER[name][2]]


def test_lists_that_share_the_work_are_no_stack() -> None:
    """XLM and FlauBERT keep attentions and MLPs apart: neither list gives the residual stream."""
    config = AutoConfig.for_model("flaubert", vocab_size=64, emb_dim=64, n_layers=3, n_heads=4)
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    with pytest.raises(ProbeError, match=r"--blocks; lists: .*transformer\.attentions.*transformer\.ffns"):
        find_blocks(model)


def test_a_probe_of_an_older_architecture_is_its_definition(tmp_path: Path) -> None:
    """GPT has no norm after its last block, so that transformers' own hidden states are the blocks' outputs."""
    models = []
    for seed in range(3):
        model = older("openai-gpt")
        if seed:
            finetune(model, seed, 0.02)
        model.save_pretrained(tmp_path / f"{seed}")
        models.append(model)
    ids = torch.randint(3, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0))
    merged = older("openai-gpt")
    with torch.no_grad():
        for own, base, one, two in zip(*(m.parameters() for m in (merged, *models)), strict=True):
            own.copy_(base + 0.6 * (one - base) + 0.3 * (two - base))
        kept = [[h.double() for h in m(ids, output_hidden_states=True).hidden_states] for m in (*models, merged)]
    with ctl_merge.observing(models[0], {"1": models[1], "2": models[2]}, {"merged": merged}) as seen:
        seen.run(ids)
        rows = {row["block"]: row for row in seen.report().rows if row["part"] == "block"}
    assert list(rows) == [f"transformer.h.{i}" for i in range(3)]
    for i, row in enumerate(rows.values(), 1):
        assert row["nonlinearity"] == pytest.approx(
            nonlinearity(kept[3][i], [k[i] for k in kept[:3]], (0.6, 0.3)), rel=1e-4
        )


# ---- text's way


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in NO_TEXT])
def test_text_runs_through_the_sites_that_are_said(name: str) -> None:
    model = build(name)
    found = find_blocks(model)
    ran: list[str] = []
    for site, block in every_block(found).items():
        block.register_forward_hook(lambda *_, site=site: ran.append(site))
    with torch.no_grad():
        model(**inputs_of(model, torch.arange(3, 15).view(1, -1)))
    assert sorted(text_sites(model, found)) == sorted(ran)
    assert (name in ("gemma3", "llava")) == (len(ran) < len(every_block(found)))


# ---- tensors


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in NO_TEXT])
def test_every_tensor_is_below_the_block_that_it_becomes_part_of(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(ModelRef.parse(str(tmp_path)))
    model = empty_model(checkpoint.config, name)
    sites = every_block(find_blocks(model))
    found = tensors_below(model, checkpoint.tensors, sites)
    everything = [tensor for tensors in found.values() for tensor in tensors]
    assert len(everything) == len(set(everything))
    for site, block in sites.items():
        state = sum(t.numel() for t in block.state_dict().values())
        assert sum(checkpoint.tensors[tensor].numel for tensor in found[site]) == state


# ---- no blocks


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(2, 2)])


class _Model(nn.Module):
    _no_split_modules: set[str] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([_Layer(), _Layer()])


def test_without_layers_the_classes_that_must_not_be_split_are_the_blocks() -> None:
    model = _Model()
    model._no_split_modules = {"_Layer"}
    assert {path: list(blocks) for path, blocks in find_blocks(model).items()} == {"stages": ["stages.0", "stages.1"]}


def test_a_model_without_blocks_asks_for_their_path_and_lists_the_choices() -> None:
    with pytest.raises(ProbeError, match=r"--blocks; lists: stages, stages\.0\.heads, stages\.1\.heads"):
        find_blocks(_Model())
    assert list(find_blocks(_Model(), "stages")["stages"]) == ["stages.0", "stages.1"]


def test_a_path_that_is_no_list_is_refused_with_the_choices() -> None:
    with pytest.raises(ProbeError, match=r"--blocks model\.layer: .*it has: model\.layers$"):
        find_blocks(build("llama"), "model.layer")


@pytest.mark.parametrize("shape", [(3, 20), (8, 8), (2, 2), (1, 5)])
def test_features_that_are_not_batch_first_are_refused_by_name(shape: tuple[int, int]) -> None:
    """XLNet's blocks put out (T, B, H); a square batch would hide it."""
    base, parent, merged = (LoadedCheckpoint(n, older("xlnet")) for n in ("base", "one", "merged"))
    subject = Subject(base, {"one": parent}, {"merged": merged}, task_grams(base, [parent], [merged]))
    models = {name: older("xlnet") for name in ("base", "one", "merged")}
    tokens = torch.randint(3, 60, shape)
    strata = torch.ones(shape[0], len(STRATA), shape[1], dtype=torch.bool)
    with Session(subject, [Rider("merged", merged)], models) as session, pytest.raises(ProbeError, match="XLNetLMHead"):
        for ids, own in batches(TokenSet("random", tokens, strata), 8):
            session.run(ids, own)
