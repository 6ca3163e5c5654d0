"""A finetuned model's difference as an adapter: what PEFT makes of base and adapter is the model again."""

from __future__ import annotations

import json
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
            torch.testing.assert_close(both(**inputs(wanted)).logits, wanted(**inputs(wanted)).logits, rtol=0, atol=2e-4)
    both.merge_and_unload().save_pretrained(tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    expected = load_file(model / "model.safetensors")
    for tensor in expected:
        if tensor not in left_names:
            torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=2e-6)
    assert all(tensor.endswith(LEFT[name]) for tensor in left_names)
    assert bool(left_names) == (name in LEFT)
