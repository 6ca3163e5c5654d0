"""From --device-map and --max-memory to where each module's weights stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_architectures import build
from torch import Tensor
from typer.testing import CliRunner

import ctl_merge
from ctl_merge.checkpoint import Checkpoint
from ctl_merge.cli import app
from ctl_merge.dispatch import Placement, held_bytes
from ctl_merge.errors import DeviceError
from ctl_merge.model import open_model
from ctl_merge.probing import placement
from ctl_merge.probing.placement import place
from ctl_merge.reference import ModelRef
from ctl_merge.stacks import every_block, find_blocks
from ctl_merge.stored import open_checkpoint

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
RECIPE = QUICKSTART / "task_arithmetic.yaml"
SITES = [f"model.layers.{i}" for i in range(3)]
DEEP = 12


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(name: str) -> Checkpoint:
        deeper = {"n_layer": DEEP} if name == "gpt2" else {"num_hidden_layers": DEEP}
        build(name, **(deeper if name in ("gpt2", "llama", "gemma2") else {})).save_pretrained(folder / name)
        return open_checkpoint(ModelRef.parse(str(folder / name)))

    return make


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two accelerators, as far as anybody can tell without using them."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda limits: limits or {0: 1 << 30, 1: 1 << 30, "cpu": 1})


def bytes_of(checkpoint: Checkpoint, where: Placement) -> tuple[dict[str, int], dict[str, int]]:
    model, _ = open_model(checkpoint)
    return held_bytes(model, where, every_block(find_blocks(model)))


def size(checkpoint: Checkpoint) -> int:
    model, _ = open_model(checkpoint)
    model.tie_weights()
    return sum(4 * p.numel() for p in model.parameters())


# ---- names


def test_one_device_is_the_whole_models(stored: Callable[[str], Checkpoint], two_cards: None) -> None:
    for device in ("cpu", "cuda:1"):
        assert place(stored("llama"), device) == Placement(device, {"": device})
    assert place(stored("llama"), "disk") == Placement("cuda:0", {"": "disk"})
    assert place(stored("llama"), "auto") == Placement("cuda:0", {"": "cuda:0"})


def test_without_an_accelerator_all_is_the_cpus(stored: Callable[[str], Checkpoint]) -> None:
    assert place(stored("llama"), "disk") == Placement("cpu", {"": "disk"})
    assert place(stored("llama"), "auto") == Placement("cpu", {"": "cpu"})
    with pytest.raises(DeviceError, match=r"there is no device 'cuda:0' here; there are: cpu$"):
        place(stored("llama"), "cuda:0")


def test_auto_takes_half_the_main_memory(stored: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = size(stored("llama"))
    monkeypatch.setattr(placement, "physical_memory", lambda: 2 * 3 * whole)
    assert not place(stored("llama"), "auto", models=3, holding=3).streamed
    assert place(stored("llama"), "auto", models=4, holding=4).streamed
    assert not place(stored("llama"), "auto", models=40, holding=3).streamed  # those that share weights need none


# ---- limits


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "t5"])
def test_as_much_stays_in_memory_as_is_allowed(name: str, share: float, stored: Callable[[str], Checkpoint]) -> None:
    """Weights never take more than the limit, the block that is read included; the rest is on disk."""
    checkpoint, models = stored(name), 3
    limit = max(1, int(models * share * size(checkpoint)))
    where = place(checkpoint, "auto", f"cpu={limit}", models=models, holding=models)
    staying, brought = bytes_of(checkpoint, where)
    assert where.streamed == (share < 1)
    if staying:
        assert models * (staying["cpu"] + brought.get("cpu", 0)) <= limit
    deep = name in ("llama", "gemma2", "gpt2")
    assert not deep or share < 0.6 or staying["cpu"] > 0.3 * size(checkpoint)


def test_accelerators_come_first_then_main_memory_then_disk(
    stored: Callable[[str], Checkpoint], two_cards: None
) -> None:
    checkpoint = stored("llama")
    block = sum(4 * p.numel() for p in build("llama").model.layers[0].parameters())
    table = 4 * 128 * 64  # bytes of the embedding, and of the head
    limits = f"0={table + 4 * block},1={3 * block},cpu={3 * block}"
    where = place(checkpoint, "auto", limits)
    stays = [where.stay(f"model.layers.{i}") for i in range(DEEP)]
    assert stays == sorted(stays, key=["cuda:0", "cuda:1", "cpu", "disk"].index)
    assert set(stays) == {"cuda:0", "cuda:1", "cpu", "disk"}
    staying, brought = bytes_of(checkpoint, where)
    assert brought.keys() == {"cuda:0"} == {where.device}  # what does not stay on an accelerator computes on the first
    assert staying["cuda:0"] + brought["cuda:0"] <= table + 4 * block
    assert staying["cuda:1"] <= 3 * block and staying["cpu"] <= 3 * block
    assert where.stay("model.embed_tokens") == "cuda:0"


def test_only_devices_that_are_named_are_used(stored: Callable[[str], Checkpoint], two_cards: None) -> None:
    assert place(stored("llama"), "auto", "1=1GB") == Placement("cuda:1", {"": "cuda:1"})
    assert place(stored("llama"), "auto", "cpu=1GB") == Placement("cpu", {"": "cpu"})
    little = place(stored("llama"), "auto", f"1={size(stored('llama')) // 2}")
    assert little.device == "cuda:1" and set(little.stays.values()) == {"cuda:1", "disk"}
    with pytest.raises(DeviceError, match="there is no device 5 here"):
        place(stored("llama"), "auto", "5=1GB")


def test_the_limit_of_one_device_sends_the_rest_to_disk(stored: Callable[[str], Checkpoint]) -> None:
    where = place(stored("llama"), "cpu", f"cpu={size(stored('llama')) // 2}")
    assert set(where.stays.values()) == {"cpu", "disk"}


# ---- JSON


def test_a_map_is_taken_as_it_is(stored: Callable[[str], Checkpoint], two_cards: None) -> None:
    table = {"": 1, "model.layers": "cpu", "model.layers.3": "disk", "lm_head": "cuda:0"}
    where = place(stored("llama"), json.dumps(table))
    assert where == Placement("cuda:1", {**table, "": "cuda:1"})


@pytest.mark.parametrize(
    "table, message",
    [
        ({"": "cpu", "model.layer.0": "disk"}, "no module 'model.layer.0': did you mean 'model.layers.0'"),
        ({"": "cpu", "xyzzy": "disk"}, "no module 'xyzzy': it begins with model, lm_head"),
        ({"": "cpu", "model.layers.0.mlp": "disk"}, r"'model.layers.0.mlp' is a part of the block 'model.layers.0'"),
        ({"": "cpu", "lm_head.weight": "disk"}, "no module 'lm_head.weight': did you mean 'lm_head'"),
        ({"model": "cpu"}, "says nothing of lm_head.weight"),
        ({"": "cuda:0"}, "there is no device 'cuda:0' here"),
        ({"": "gpu"}, "'gpu' is no device"),
    ],
    ids=["typo", "unknown", "part", "tensor", "uncovered", "absent", "no_device"],
)
def test_a_map_that_does_not_fit_is_refused(
    table: dict[str, Any], message: str, stored: Callable[[str], Checkpoint]
) -> None:
    with pytest.raises(DeviceError, match=message):
        place(stored("llama"), json.dumps(table))


def test_a_map_that_exceeds_the_limits_is_refused(stored: Callable[[str], Checkpoint]) -> None:
    table = json.dumps({"": "cpu", "model.layers.0": "disk"})
    whole, models = size(stored("llama")), 3
    assert place(stored("llama"), table, f"cpu={models * whole}", models=models, holding=models).streamed
    with pytest.raises(DeviceError, match=r"--max-memory: the weights of 3 models .* on cpu take .*, more than the"):
        place(stored("llama"), table, f"cpu={models * whole - 1}", models=models, holding=models)


# ---- the whole way


def rows(report: ctl_merge.ProbeReport) -> list[dict[str, Any]]:
    return json.loads(report.to_json())["sets"]["cycle"]["blocks"]


def test_a_probe_reads_a_map_and_tells_where_it_ran() -> None:
    table = json.dumps({"": "cpu", "model.layers.1": "disk", "model.layers.4": "disk"})
    how: dict[str, Any] = {"sequences": 2, "length": 16, "patch": True}
    plain, spread = (ctl_merge.probe(RECIPE, device_map=m, **how) for m in ("cpu", table))
    assert rows(plain) == rows(spread)
    one, other = plain.data["settings"], spread.data["settings"]
    base = open_checkpoint(ModelRef.parse(str(QUICKSTART / "base")))
    block = sum(s.numel * 4 for n, s in base.tensors.items() if n.startswith("model.layers.1."))
    patched, whole = 6, size(base)
    assert one["weight_bytes_in_memory"] == 4 * whole  # the patched merges run with the merge's weights
    assert other["weight_bytes_in_memory"] == 4 * (whole - 2 * block) + (4 + patched) * block
    assert (one["device"], one["streamed"], other["streamed"]) == ("cpu", False, True)
    assert one["feature_bytes_in_memory"] == other["feature_bytes_in_memory"] > 0
    assert one["logit_bytes_in_memory"] == (4 + patched) * 2 * 16 * base.config["vocab_size"] * 4


def test_a_merge_is_a_model_spread_over_memory_and_disk() -> None:
    ids = torch.arange(3, 27).view(1, -1)
    table = json.dumps({"": "cpu", "model.layers.1": "disk"})
    wanted: Tensor = ctl_merge.load_model(RECIPE)(ids).logits
    for found in (ctl_merge.load_model(RECIPE, table), ctl_merge.load_model(RECIPE, "auto", max_memory="cpu=2MB")):
        assert any(p.is_meta for p in found.parameters()) and any(not p.is_meta for p in found.parameters())
        assert torch.equal(found(ids).logits, wanted)


def test_the_command_line_takes_a_map() -> None:
    arguments = ["probe", str(RECIPE), "--sequences", "2", "--length", "16", "--json", "--device-map"]
    done = CliRunner().invoke(app, [*arguments, '{"": "cpu", "model.layers": "disk"}'])
    assert done.exit_code == 0 and json.loads(done.stdout)["settings"]["streamed"]
    with pytest.raises(DeviceError, match="--device-map: the model has no module 'model.blocks'"):
        CliRunner().invoke(app, [*arguments, '{"": "cpu", "model.blocks": "disk"}'], catch_exceptions=False)


def test_a_device_that_is_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr("ctl_merge.probing.lockstep.Lockstep.run", full)
    with pytest.raises(DeviceError, match="^CUDA out of memory: lower --batch or --length, or let less stay"):
        ctl_merge.probe(RECIPE, sequences=1, length=8)
