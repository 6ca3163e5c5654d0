"""A finetuned model's difference as an adapter: what PEFT makes of base and adapter is the model again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import KINDS, TIED, UNTIED, train
from peft import PeftModel
from safetensors.torch import load_file
from tiny_architectures import auto_class, build

import ctl_merge
from ctl_merge.errors import CtlMergeError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
FAMILY = Path(__file__).parents[2] / "shared" / "models"
FILE = "model.safetensors"
ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", UNTIED), ("llama", TIED), ("qwen3", {}), ("gpt2", {}), ("gpt_neox", {}), ("mixtral", {}), ("t5", {}),
    ("qwen3_moe", {}), ("gpt_oss", {}), ("opt", {}), ("mamba", {}), ("bert", {}),
]  # fmt: skip
# What PEFT cannot store: parameters beside matrices of one module, and what is tied to a part of a module.
LEFT: dict[str, tuple[str, ...]] = {
    "gpt_oss": ("sinks", "_bias", "router.bias"), "mamba": ("mixer.D", "A_log"),
    "bert": ("cls.predictions.bias", "word_embeddings.weight"),
}  # fmt: skip


def finetuned(name: str, folder: Path, changes: dict[str, Any]) -> tuple[Path, Path]:
    """A base, and a model of which every weight is a little different."""
    model = build(name, **changes)
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "finetuned")
    return folder / "base", folder / "finetuned"


def adapted(name: str, base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    return PeftModel.from_pretrained(
        auto_class(name).from_pretrained(base, dtype=dtype), adapter, autocast_adapter_dtype=False
    ).eval()


def inputs(model: Any) -> dict[str, Any]:
    ids = torch.arange(3, 33).view(2, 15)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


@pytest.mark.parametrize(("name", "changes"), ARCHITECTURES, ids=str)
def test_all_of_a_difference_gives_the_model_back(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    base, model = finetuned(name, tmp_path, changes)
    result = ctl_merge.extract_lora(model, base, tmp_path / "adapter", rank=1000, save=["all"])
    left = result.manifest["adapter"]["left_out"]
    left_names = {own["tensor"] for own in left}
    both = adapted(name, base, result.folder)
    wanted = auto_class(name).from_pretrained(model).eval()
    if not left:
        with torch.inference_mode():
            logits, expected_logits = both(**inputs(wanted)).logits, wanted(**inputs(wanted)).logits
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=2e-4)
    both.merge_and_unload().save_pretrained(tmp_path / "again")
    found = load_file(tmp_path / "again" / FILE)
    expected = load_file(model / FILE)
    for tensor in expected:
        if tensor not in left_names:
            torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=2e-6)
    assert all(tensor.endswith(LEFT[name]) for tensor in left_names)
    assert bool(left_names) == (name in LEFT)


def test_a_model_that_is_base_and_adapter_is_extracted_exactly(tmp_path: Path) -> None:
    """Of rank 4, from float64 sums; the written model, in float32, but for its rounding."""
    one = train(tmp_path, *KINDS["lora"])
    result = ctl_merge.extract_lora(one.both, one.base, tmp_path / "adapter", rank=4, dtype="float64")
    summary = result.manifest["adapter"]["summary"]
    assert summary["ranks"] == [4, 4] and summary["error"] < 1e-12
    one.merged(tmp_path / "written", torch.float32)
    written = ctl_merge.extract_lora(tmp_path / "written", one.base, tmp_path / "second", rank=4)
    assert written.manifest["adapter"]["summary"]["error"] < 1e-5


def test_a_head_tied_to_its_table_has_the_rank_of_the_table(tmp_path: Path) -> None:
    """By energy, so that every module has a rank of its own. PEFT runs it as our merge does, which is as near as told;
    PEFT's own merge would add the table's change twice, and that is told too."""
    base, model = finetuned("llama", tmp_path, TIED)
    result = ctl_merge.extract_lora(model, base, tmp_path / "adapter", energy=0.5, save=["norms"])
    assert "would add it twice" in (result.folder / "README.md").read_text()
    path = tmp_path / "both.yaml"
    path.write_text(f"merge_method: passthrough\nmodels: [{{model: {base}+{result.folder}}}]\n")
    merged = ctl_merge.load_model(path)
    with torch.inference_mode():
        logits, again = adapted("llama", base, result.folder)(**inputs(merged)).logits, merged(**inputs(merged)).logits
    torch.testing.assert_close(logits, again, rtol=0, atol=2e-4)
    expected, start, found = load_file(model / FILE), load_file(base / FILE), dict(merged.named_parameters())
    for own in result.manifest["adapter"]["parameters"]:
        wanted, name = expected[own["parameter"]].double(), own["parameter"]
        missed = (wanted - found[name]).norm() / (wanted - start[name]).norm()
        assert float(missed) == pytest.approx(own.get("error", 0.0), rel=1e-3, abs=1e-5), own


def test_a_recipe_is_a_model(tmp_path: Path) -> None:
    """A merge that is never written, as an adapter; by energy, capped or not."""
    base, model = finetuned("llama", tmp_path, UNTIED)
    path = tmp_path / "half.yaml"
    path.write_text(f"merge_method: linear\nmodels:\n- {{model: {base}, parameters: {{weight: 1}}}}\n"
                    f"- {{model: {model}, parameters: {{weight: 1}}}}\n")  # fmt: skip
    result = ctl_merge.extract_lora(path, base, tmp_path / "adapter", energy=0.9)
    before, after = load_file(base / FILE), load_file(model / FILE)
    for own in result.manifest["adapter"]["parameters"]:
        values = torch.linalg.svdvals((after[own["parameter"]] - before[own["parameter"]]).double()).square()
        kept = values.cumsum(0) / values.sum()
        assert own["rank"] == int((kept < 0.9).sum()) + 1, own
        assert own["energy"] == pytest.approx(float(kept[own["rank"] - 1]), rel=1e-5)
    assert (result.folder / "ctl_merge_recipe.yaml").read_text() == path.read_text().replace(str(tmp_path), ".")
    left = result.manifest["adapter"]["left_out"]
    assert len(left) == 7 and all("--save-modules norms" in own["why"] for own in left)
    capped = ctl_merge.extract_lora(path, base, tmp_path / "capped", energy=0.9, rank=5).manifest["adapter"]
    assert capped["summary"]["ranks"] == [5, 5]


def test_what_cannot_be_extracted_is_refused(tmp_path: Path) -> None:
    base, model = finetuned("llama", tmp_path, UNTIED)
    other, _ = finetuned("llama", tmp_path / "wide", {**UNTIED, "hidden_size": 128})
    out = tmp_path / "out"
    for arguments, message in [
        ((base, base), "is the base itself"),
        ((model, other), "An adapter fits the base's own shapes"),
        ((tmp_path / "nothing", base), "neither a folder"),
    ]:
        with pytest.raises(CtlMergeError, match=message):
            ctl_merge.extract_lora(*arguments, out)
    for how, message in [
        ({"save": ["norm"]}, "--save-modules norm"),
        ({"energy": 2.0}, "--energy"),
        ({"rank": 0}, "--rank"),
    ]:
        with pytest.raises(CtlMergeError, match=message):
            ctl_merge.extract_lora(model, base, out, **how)
    assert not out.exists()


def test_a_randomised_svd_is_near_the_best() -> None:
    from ctl_merge.factors import truncated

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(1400, 1200, generator=generator, dtype=torch.float64)).Q for _ in "ab")
    values = 0.97 ** torch.arange(1200, dtype=torch.float64)
    matrix = (left * values) @ right.T
    found = truncated(matrix, 20, None, "a")
    assert found.how == "randomised SVD" and found.rank == 20
    best = float(values[20:].square().sum())
    assert best * (1 - 1e-9) <= found.lost(matrix) <= best * 1.001
    assert torch.equal(found.a, truncated(matrix, 20, None, "a").a)
    by_energy = truncated(matrix, None, 0.9, "a")
    kept = values.square().cumsum(0) / values.square().sum()
    assert by_energy.rank == int((kept < 0.9).sum()) + 1


@pytest.mark.real
@pytest.mark.skipif(not FAMILY.is_dir(), reason="the real model family is not beside the project")
def test_a_real_expert_and_its_losses(tmp_path: Path) -> None:
    data = f"{FAMILY.parent / 'data' / 'gsm8k' / 'test.jsonl'}:question,answer"
    result = ctl_merge.extract_lora(
        FAMILY / "math", FAMILY / "stories260K", tmp_path / "adapter", rank=64, save=["all"], data=data, sequences=4
    )
    (losses,) = result.manifest["adapter"]["losses"].values()
    assert losses["base + adapter"] == pytest.approx(losses["model"], abs=1e-4)
    assert losses["base"] > losses["model"] + 0.5
    assert "| loss on |" in (result.folder / "README.md").read_text()
