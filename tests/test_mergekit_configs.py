"""Real mergekit files: each plans against small stand-ins of its models, or is refused for the reason listed here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from ctl_merge import merging, stored
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.errors import CtlMergeError
from ctl_merge.merging import Merge
from ctl_merge.recipe_file import load_recipe
from ctl_merge.reference import ModelRef

CONFIGS = Path(__file__).parent.parent.parent / "shared" / "mergekit_configs"

# Why a person would refuse these too. All others plan.
REFUSED = {
    "000_moe": "'path/to/self_attn_donor' is neither a folder",  # an example with names to fill in
    "001_moe": "'path/to/self_attn_donor' is neither a folder",
    "017_slerp": "t' is shared by all models",  # `t` under each model, which mergekit does not read, and three models
    **dict.fromkeys(("032_slerp", "035_slerp", "040_slerp", "044_slerp"), "slerp needs a `base_model`"),
    "038_dare_ties": "no parameter 'dare'",
    "043_slerp": "'./merged_step1' is neither a folder that exists",
    "047_moe": "`experts` make a mixture of experts, which has no `merge_method`",
    "050_sce": "sce has no parameter 'normalize'",  # mergekit does not read it
    "051_sce": "'./Base_6_v2' is neither a folder|unknown key 'dype'",
    "053_della_linear": "'./intermediates/First' is neither a folder",
    "061_model_stock": "model_stock has no parameter 'weight'",
    "063_dare_linear": "'/home/llm/mergequant/.*' is neither a folder",
    "064_dare_linear": "'D:/Uni/.*' is neither a folder",
    "068_passthrough": "a revision is written after the model's name",
}
EVOLVE = "mergekit-evolve genome is not a recipe"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not CONFIGS.is_dir(), reason="the collection of mergekit files lies beside the project only"),
]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 80 layers of width 4, with a tokenizer."""
    config = LlamaConfig(
        num_hidden_layers=80, vocab_size=4, hidden_size=4, intermediate_size=4, num_attention_heads=1,
        max_position_embeddings=8, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("stand-in")
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"model": {"type": "BPE", "vocab": {t: i for i, t in enumerate("abcd")}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps({**vocabulary, "added_tokens": []}))
    return folder


def paths() -> list[Path]:
    return sorted(CONFIGS.glob("*.yaml")) if CONFIGS.is_dir() else []


@pytest.mark.parametrize("path", paths(), ids=lambda path: path.stem)
def test_it_plans_or_is_refused_rightly(path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def open_stand_in(ref: ModelRef) -> FileCheckpoint:
        opened.append(ref.text)
        found = stored.open_checkpoint(ModelRef(ref.text, folder=stand_in))
        found.ref = ref
        return found

    monkeypatch.setattr(merging, "open_checkpoint", open_stand_in)
    expected = EVOLVE if path.stem.endswith("evolve") else REFUSED.get(path.stem)
    if expected is not None:
        with pytest.raises(CtlMergeError) as raised:
            Merge(path)
        assert re.search(expected, str(raised.value))
        return
    merge = Merge(path)
    assert opened == [ref.text for ref in load_recipe(path).refs]
    slices = [part.layers for part in merge.recipe.slices if part.layers]
    layers = {name.split(".")[2] for name in merge.plan.tensors if name.startswith("model.layers.")}
    assert len(layers) == (sum(slices) or 80)
    assert merge.merged.config["num_hidden_layers"] == len(layers)
