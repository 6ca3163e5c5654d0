"""A real pretrained model and finetunes of it, where they lie beside the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from references import ulps
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ctl_merge

FAMILY = Path(__file__).parents[2] / "shared" / "models"
EXPERTS = ("math", "code")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FAMILY.is_dir(), reason="the real model family is not beside the project"),
]


def recipe(method: str, parameters: str = "{}", own: str = "{weight: 0.5}", extra: str = "") -> ctl_merge.Recipe:
    lines = [
        f"merge_method: {method}",
        "" if method == "linear" else f"base_model: {FAMILY / 'stories260K'}",
        "models:",
    ]
    lines += [f"  - {{model: {FAMILY / name}, parameters: {own}}}" for name in EXPERTS]
    return ctl_merge.parse_recipe("\n".join([*lines, f"parameters: {parameters}", extra]))


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(FAMILY / name / "model.safetensors") for name in ("stories260K", *EXPERTS)}


def average(base, experts):
    return sum(0.5 * expert for expert in experts)


def task_arithmetic(base, experts):
    return base + 0.8 * sum(0.5 * (expert - base) for expert in experts)


def ties(base, experts):
    """Density 0.3 of each tensor, equal weights: entries of the trimmed task vectors with the sign of their sum."""
    kept = []
    for delta in (expert - base for expert in experts):
        size = delta.abs().float()
        cut = size.flatten().sort(descending=True).values[max(1, int(0.3 * size.numel())) - 1]
        kept.append(torch.where(size >= cut, delta, 0.0))
    stack = torch.stack(kept)
    agree = torch.where(stack.sum(0) >= 0, stack > 0, stack < 0)
    return base + (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


CASES = {
    "linear": (average, {}),
    "task_arithmetic": (task_arithmetic, {"parameters": "{lambda: 0.8}"}),
    "ties": (ties, {"own": "{weight: 1, density: 0.3}"}),
}


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_element_is_the_definition_rounded_once(method, dtype, weights):
    definition, settings = CASES[method]
    merged = ctl_merge.open_merge(recipe(method, extra=f"dtype: {dtype}", **settings))
    same = total = 0
    for name in merged:
        operands = [weights[model][name] for model in ("stories260K", *EXPERTS)]
        base, *experts = (operand.double() for operand in operands)
        expected, got = definition(base, experts), merged.read(name)
        same += int((got == expected.to(got.dtype)).sum())
        total += got.numel()
        if dtype == "float32":
            assert ulps(got, expected.numpy(), operands).max() <= 2
    assert same >= 0.999 * total


def test_output_loads_whole_and_knows_both_texts(tmp_path):
    result = ctl_merge.merge(recipe("linear"), tmp_path / "merged")
    model, info = AutoModelForCausalLM.from_pretrained(result.folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        logits = model(torch.arange(1, 65).view(1, -1)).logits
    assert torch.isfinite(logits).all()
