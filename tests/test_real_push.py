"""The real family, pushed to the loopback Hub and pulled back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import snapshot_download
from peft import PeftModel
from pushes import commits, contents, remote, to
from test_real import FAMILY, pytestmark  # noqa: F401
from transformers import AutoModelForCausalLM

import ctl_merge
from ctl_merge import publishing
from ctl_merge.merging import Merge
from ctl_merge.original import Original
from ctl_merge.publishing import Upload
from ctl_merge.reproduce import reproduce

INPUT = torch.arange(1, 65).view(1, -1)


def family_recipe(place: Path, base: str, models: list[str]) -> Path:
    lines = [f"merge_method: ties\nbase_model: {base}\nparameters: {{density: 0.4, weight: 1}}\nmodels:"]
    path = place / "recipe.yaml"
    path.write_text("\n".join([*lines, *(f"  - model: {model}" for model in models), ""]))
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(INPUT).logits


@pytest.mark.parametrize("streamed", [False, True])
def test_a_merge_comes_back_byte_identical_and_loads(hub: HubServer, tmp_path: Path, streamed: bool) -> None:
    for name in ("stories260K", "math", "code"):
        hub.add(f"karpathy/{name}", FAMILY / name)
    recipe = family_recipe(tmp_path, "karpathy/stories260K", ["karpathy/math", "karpathy/code@main"])
    here = Merge(recipe, max_shard_size="400KB").write(tmp_path / "plain" / "merged").folder
    upload = Upload(to("org/stories-math-code"), streamed)
    result = Merge(recipe, max_shard_size="400KB").write(tmp_path / "merged", stream=upload.stream)
    pushed = upload.finish(result.folder)
    shutil.rmtree(result.folder)
    back = Path(snapshot_download(pushed.repo_id, local_dir=tmp_path / "back", ignore_patterns=".gitattributes"))
    shutil.rmtree(back / ".cache")
    assert contents(back) == contents(here) == remote(hub, repo_id=pushed.repo_id)
    assert commits(hub, repo_id=pushed.repo_id) == 1 and len(list(back.glob("*.safetensors"))) == 3
    model, info = AutoModelForCausalLM.from_pretrained(pushed.repo_id, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(here)))
    hub.add("karpathy/math", FAMILY / "french")  # the branch moves; the manifest's commit stays
    assert reproduce(Original.open(pushed.repo_id), tmp_path / "again", {}).identical


def test_an_adapter_comes_back_and_peft_loads_it(hub: HubServer, tmp_path: Path) -> None:
    pushed = publishing.push(FAMILY / "code-lora", to("org/code-lora"))
    back = Path(snapshot_download(pushed.repo_id, local_dir=tmp_path / "back", ignore_patterns=".gitattributes"))
    shutil.rmtree(back / ".cache")
    assert contents(back) == contents(FAMILY / "code-lora")
    base = FAMILY / "stories260K"
    there = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), back)
    here = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), FAMILY / "code-lora")
    assert torch.equal(logits(there), logits(here))
    hub.add("karpathy/stories260K", base)
    merged = ctl_merge.open_merge(
        ctl_merge.parse_recipe("merge_method: passthrough\nmodels: [{model: karpathy/stories260K+org/code-lora}]")
    )
    weight = "model.layers.0.self_attn.q_proj.weight"
    expected = here.merge_and_unload().state_dict()[weight]
    assert torch.allclose(merged.read(weight), expected, atol=1e-6)
