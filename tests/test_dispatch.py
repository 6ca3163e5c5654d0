"""Weights over devices, memory and disk: the values are the same, and memory is what is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from probe_references import (  # noqa: F401 (a fixture for all)
    Family,
    inputs_of,
    load,
    one_thread_a_model,
    open_merge,
    random_tokens,
    subject_of,
    write_family,
)
from tiny_architectures import VOCABULARY
from torch import Tensor, nn

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.dispatch import Placement, held_bytes, twin
from ctl_merge.model import load_weights, open_model
from ctl_merge.probing.run import Rider, Running, observe
from ctl_merge.reference import ModelRef
from ctl_merge.stacks import every_block, find_blocks
from ctl_merge.stored import open_checkpoint

SOME = ("llama", "gemma2", "gpt2", "mixtral", "t5", "mamba", "deepseek_v3")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda name: write_family(folder / name, name))


def stored(family: Family) -> Checkpoint:
    return open_checkpoint(ModelRef.parse(str(family.base)))


def blocks_of(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    return every_block(find_blocks(open_model(checkpoint)[0]))


def alternating(checkpoint: Checkpoint, rest: str) -> Placement:
    """Every other block on disk."""
    stays = {site: ("disk", "cpu")[i % 2] for i, site in enumerate(blocks_of(checkpoint))}
    return Placement("cpu", {"": rest, **stays})


PLACEMENTS: Mapping[str, Callable[[Checkpoint], Placement]] = {
    "whole": lambda checkpoint: Placement(),
    "disk": lambda checkpoint: Placement(stays={"": "disk"}),
    "blocks": lambda checkpoint: alternating(checkpoint, "cpu"),
    "some": lambda checkpoint: alternating(checkpoint, "disk"),
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, VOCABULARY - 30, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(**inputs_of(model, ids), use_cache=False).logits


def test_the_nearest_path_above_a_module_counts() -> None:
    placement = Placement("cuda:1", {"": "cpu", "a": "cuda:0", "a.b": "disk", "a.bc": "cuda:2"})
    assert [placement.stay(path) for path in ("", "x", "a", "a.b", "a.b.c", "a.bc", "a.bcd")] == [
        "cpu", "cpu", "cuda:0", "disk", "disk", "cuda:2", "cuda:0",
    ]  # fmt: skip
    assert [placement.computes(path) for path in ("x", "a", "a.b.c", "a.bc")] == [
        "cuda:1",
        "cuda:0",
        "cuda:1",
        "cuda:2",
    ]
    assert placement.devices == ["cuda:1", "cuda:0", "cuda:2"]
    assert placement.streamed and not placement.whole and Placement("cuda:0", {"": "cuda:0"}).whole
    assert not Placement("cuda:0", {"": "cpu"}).whole


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", SOME)
def test_a_model_is_the_same_wherever_its_weights_stay(
    name: str, placement: str, family: Callable[[str], Family]
) -> None:
    checkpoint = stored(family(name))
    found = load_weights(checkpoint, PLACEMENTS[placement](checkpoint))
    assert torch.equal(logits(found), logits(load(name, family(name).base)))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", SOME)
def test_the_weights_in_memory_are_those_that_are_said(
    name: str, placement: str, family: Callable[[str], Family]
) -> None:
    """Looked at while every module runs; a tied weight counts once, as it is one piece of memory."""
    checkpoint = stored(family(name))
    where = PLACEMENTS[placement](checkpoint)
    model = load_weights(checkpoint, where)
    at_rest = in_memory(model)
    seen: list[int] = []
    for module in model.modules():
        if not list(module.children()):
            watch(module, lambda: seen.append(in_memory(model)))
    logits(model)
    staying, brought = held_bytes(open_model(checkpoint)[0], where, blocks_of(checkpoint))
    assert at_rest == in_memory(model) == sum(staying.values())
    assert max(seen) == sum(staying.values()) + sum(brought.values())


def watch(module: nn.Module, look: Callable[[], object]) -> None:
    """Look whenever the module computes, its weights there."""
    attribute = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    own = getattr(module, attribute)
    setattr(module, attribute, lambda *args, **kwargs: (look(), own(*args, **kwargs))[1])


def in_memory(model: nn.Module) -> int:
    held = {p.data_ptr(): 4 * p.numel() for p in model.parameters() if not p.is_meta}
    return sum(held.values())


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_a_tied_head_on_disk_is_the_embedding_in_memory(name: str, family: Callable[[str], Family]) -> None:
    checkpoint = stored(family(name))
    model = load_weights(checkpoint, Placement("cpu", {"": "cpu", "lm_head": "disk"}))
    used: list[int] = []
    watch(model.lm_head, lambda: used.append(model.lm_head.weight.data_ptr()))
    assert torch.equal(logits(model), logits(load(name, family(name).base)))
    assert used == [model.get_input_embeddings().weight.data_ptr()]
    assert held_bytes(open_model(checkpoint)[0], Placement("cpu", {"": "cpu", "lm_head": "disk"}), {})[1] == {}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_twin_shares_weights_and_runs_by_itself(placement: str, family: Callable[[str], Family]) -> None:
    checkpoint = stored(family("gemma2"))
    model = load_weights(checkpoint, PLACEMENTS[placement](checkpoint))
    other = twin(model)
    own, twins = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, other))
    assert [n for n, p in own.items() if not p.is_meta] == [n for n in own if twins[n] is own[n] and not own[n].is_meta]
    ran: list[nn.Module] = []
    for module in other.modules():
        module.register_forward_hook(lambda module, *_: ran.append(module))
    wanted = logits(model)
    assert not ran
    assert torch.equal(logits(other), wanted) and ran
    assert not {id(m) for m in ran} & {id(m) for m in model.modules()}


def test_a_probe_is_the_same_bit_for_bit_wherever_weights_stay(family: Callable[[str], Family]) -> None:
    own = family("gemma2")
    merge = open_merge(own, (0.6, 0.3))
    subject = subject_of({"merged": merge}, own)
    sites = list(blocks_of(subject.base))
    patches = [Rider(f"merged/patch@{s}", merge.merged, ghost=False, patch=s, weights_of=0) for s in sites]
    found = []
    for make in PLACEMENTS.values():
        running = Running(make(subject.base), batch=2)
        observed = observe(subject, [Rider("merged", merge.merged), *patches], [random_tokens(3, 12)], running)[
            "random"
        ]
        found.append(observed)
    first = found[0]
    for other in found[1:]:
        assert other.losses == first.losses
        for site, grams in first.grams.sites.items():
            assert torch.equal(torch.stack(other.grams.sites[site].gram), torch.stack(grams.gram))
    models, hidden = 4 + len(sites), 4 * 2 * 12 * 64  # float32, two sequences of 12 tokens, 64 wide
    assert first.feature_bytes == 3 * hidden * (models + 1)  # block, attention, MLP; one merge runs its blocks twice
    assert first.logit_bytes == models * 4 * 2 * 12 * VOCABULARY


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import software_device, torch
from pathlib import Path
from probe_references import inputs_of, load
from ctl_merge.dispatch import Placement
from ctl_merge.model import load_weights, open_model
from ctl_merge.reference import ModelRef
from ctl_merge.stacks import every_block, find_blocks
from ctl_merge.stored import open_checkpoint

torch.set_num_threads(1)
for name, folder in {models!r}.items():
    checkpoint = open_checkpoint(ModelRef.parse(folder))
    sites = list(every_block(find_blocks(open_model(checkpoint)[0])))
    places = ("soft:0", "disk", "soft:1", "cpu")
    stays = {{site: places[i % 4] for i, site in enumerate(sites)}}
    model = load_weights(checkpoint, Placement("soft:0", {{"": "soft:1", **stays}}))
    plain = load(name, Path(folder))
    ran = {{}}
    for site, block in every_block(find_blocks(model)).items():
        block.register_forward_hook(
            lambda m, a, o, s=site: ran.update({{s: str(getattr(o, "device", None) or o[0].device)}})
        )
    for each in (model, plain):
        each.set_attn_implementation("eager")
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        for _ in range(2):  # what was brought for the first is gone at the second
            found = model(**inputs_of(model, ids.to("soft:0")), use_cache=False).logits
        assert str(found.device) == "soft:0", found.device
        assert torch.equal(found.cpu(), plain(**inputs_of(plain, ids), use_cache=False).logits), name
    wanted = {{site: place if place.startswith("soft") else "soft:0" for site, place in stays.items()}}
    assert ran == wanted, (name, ran, wanted)
    held = {{str(p.device) for p in model.parameters()}}
    assert held == {{"soft:0", "soft:1", "meta"}}, held
"""


def test_blocks_compute_on_the_devices_that_they_are_given(family: Callable[[str], Family]) -> None:
    """On two accelerators made of software, which refuse to mix tensors as GPUs do, with main memory and disk."""
    tests = str(Path(__file__).parent)
    names = ("llama", "gpt2", "mixtral", "t5", "mamba", "qwen3_next")
    script = SCRIPT.format(tests=tests, models={name: str(family(name).base) for name in names})
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


PROBE = """
import json, sys
sys.path.insert(0, {tests!r})
import software_device, torch
import ctl_merge

torch.set_num_threads(1)
table = {{"": 1, "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": "disk"}}
found = []
for device_map in ("cpu", json.dumps(table)):
    report = ctl_merge.probe({recipe!r}, device_map=device_map, sequences=2, length=16, patch=True)
    found.append(json.loads(report.to_json()))
print(json.dumps(found))
"""


def test_a_probe_over_devices_finds_what_it_finds_on_one() -> None:
    """Features of a site meet on its device, patched ones go on from there; attention is another kernel's."""
    recipe = Path(__file__).parents[1] / "recipes" / "quickstart" / "task_arithmetic.yaml"
    script = PROBE.format(tests=str(Path(__file__).parent), recipe=str(recipe))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, spread = json.loads(done.stdout)
    assert spread["settings"]["device"] == "soft:1, soft:0"
    assert spread["settings"]["weight_bytes_by_device"].keys() == {"soft:0", "soft:1", "cpu"}
    for own, other in zip(plain["sets"]["cycle"]["blocks"], spread["sets"]["cycle"]["blocks"], strict=True):
        for name in ("nonlinearity", "cos", "coef", "local", "propagated"):
            assert other[name] == (own[name] and pytest.approx(own[name], rel=1e-3, abs=1e-5)), (own["block"], name)
    one, two = (report["sets"]["cycle"]["losses"]["merges"]["merged"]["patch"] for report in (plain, spread))
    assert {site: gain["value"] for site, gain in two.items()} == pytest.approx(
        {site: gain["value"] for site, gain in one.items()}, abs=1e-4
    )
