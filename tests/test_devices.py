"""Device maps and memory limits, read as accelerate and transformers read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint

from ctl_merge import devices
from ctl_merge.devices import assign_devices, parse_max_memory
from ctl_merge.errors import DeviceError
from ctl_merge.estimate import memory_bound
from ctl_merge.header import TensorSpec
from ctl_merge.merging import Merge
from ctl_merge.recipe_file import parse_recipe

SPECS = {
    name: TensorSpec("F32", (size,))
    for name, size in {
        "embed.weight": 100, "layers.1.q": 30, "layers.10.q": 30, "layers.10.k": 30, "lm_head.weight": 90
    }.items()
}  # fmt: skip


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two accelerators, as far as anybody can tell without using them."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda limits: limits or {0: 80, 1: 80, "cpu": 100})


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", '{"": "cpu"}', '{"": "disk"}'])
def test_without_an_accelerator_all_is_the_cpus(device_map: str | None, no_card: None) -> None:
    assert assign_devices(SPECS, device_map) == dict.fromkeys(SPECS, "cpu")


@pytest.mark.parametrize("device", ["cuda:0", "cuda", "meta", '{"": 0}', '{"": "cuda:0"}'])
def test_a_device_that_is_not_there_is_refused(device: str, no_card: None) -> None:
    with pytest.raises(DeviceError, match=r"there is no device .* here; there are: cpu$"):
        assign_devices(SPECS, device)


@pytest.mark.parametrize(
    "device", ["gpu", "cuda:x", "", '{"": -1}', '{"": true}', '{"": null}', '{"": 1e99}', '{"": []}']
)
def test_what_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(DeviceError, match="is no device: use auto, cpu, cuda:0 or a JSON map"):
        assign_devices(SPECS, device)


def test_the_devices_that_are_there_are_listed(two_cards: None) -> None:
    with pytest.raises(DeviceError, match="no device 'cuda:2' here; there are: cpu, cuda:0, cuda:1"):
        assign_devices(SPECS, "cuda:2")
    assert set(assign_devices(SPECS, "cuda:1").values()) == {"cuda:1"}
    assert set(assign_devices(SPECS, "cuda").values()) == {"cuda:0"}


def test_the_longest_prefix_wins_and_ends_at_a_dot(two_cards: None) -> None:
    found = assign_devices(
        SPECS, '{"": "cpu", "layers": 0, "layers.10": 1, "layers.10.k": "disk", "lm_head.weight": 1}'
    )
    assert found == {
        "embed.weight": "cpu", "layers.1.q": "cuda:0", "layers.10.q": "cuda:1", "layers.10.k": "cpu",
        "lm_head.weight": "cuda:1",
    }  # fmt: skip


def test_a_prefix_is_whole_parts_of_the_name(two_cards: None) -> None:
    with pytest.raises(DeviceError, match=r'says nothing of layers\.10\.q.*"" for the rest'):
        assign_devices({"layers.10.q": SPECS["layers.10.q"]}, '{"layers.1": 0}')


@pytest.mark.parametrize("text", ['{"a": 0', '{"a" 0}', "{a: 0}"])
def test_a_map_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="--device-map is not valid JSON"):
        assign_devices(SPECS, text)


def test_auto_spreads_by_bytes_and_in_a_fixed_way(two_cards: None) -> None:
    found = assign_devices(SPECS, "auto")
    assert found == {
        "embed.weight": "cuda:0", "lm_head.weight": "cuda:1", "layers.1.q": "cuda:1", "layers.10.k": "cuda:0",
        "layers.10.q": "cuda:1",
    }  # fmt: skip


def test_spreading_balances_within_one_tensor() -> None:
    specs = {f"w{i}": TensorSpec("F32", (i % 7 + 1,)) for i in range(50)}
    found = devices._spread(specs, ["cuda:0", "cuda:1", "cuda:2"])
    loads = {d: sum(specs[n].nbytes for n in specs if found[n] == d) for d in set(found.values())}
    assert set(found) == set(specs) and len(loads) == 3
    assert max(loads.values()) - min(loads.values()) <= 4 * 7
    assert devices._spread(specs, []) == dict.fromkeys(specs, "cpu")


def test_memory_limits_choose_the_accelerators(two_cards: None) -> None:
    assert set(assign_devices(SPECS, "auto", "1=20GiB,cpu=8GiB").values()) == {"cuda:1"}
    assert set(assign_devices(SPECS, "auto", "cpu=8GiB").values()) == {"cpu"}
    with pytest.raises(DeviceError, match="no device 5 here"):
        assign_devices(SPECS, "auto", "5=20GiB")


def test_memory_limits_in_bytes() -> None:
    assert parse_max_memory("0=20GiB, cpu=60GB,cuda:1=5MB") == {0: 20 * 2**30, "cpu": 60 * 10**9, 1: 5 * 10**6}
    assert parse_max_memory(None) == parse_max_memory("") == {}


@pytest.mark.parametrize(
    "text", ["20GiB", "0=", "0=x", "0=-5GB", "cpu=0", "cpuu=5GB", "=5GB", "0=1GB,", "²=5GB", "0=5GB=5GB"]
)
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="is not device=size, such as 0=20GiB or cpu=60GiB"):
        parse_max_memory(text)


def test_little_memory_means_fewer_workers_and_too_little_is_refused(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", {"w": torch.ones(1000, 1000)})
    recipe = parse_recipe(recipe_text("linear", [(model, {"weight": 1.0})]))
    bound = {workers: memory_bound(Merge(recipe).merges, workers) for workers in (1, 2, 3, 4)}
    assert bound[1] < bound[2] < bound[3]
    assert Merge(recipe, num_workers=4).workers == 4
    assert Merge(recipe, num_workers=4, max_memory=f"cpu={bound[2]}").workers == 2
    assert Merge(recipe, num_workers=4, max_memory=f"cpu={bound[4]}").workers == 4
    assert Merge(recipe, num_workers=4, max_memory="0=1").workers == 4
    with pytest.raises(DeviceError, match=r"--max-memory: the merge takes .* with one worker"):
        Merge(recipe, num_workers=4, max_memory=f"cpu={bound[1] - 1}")
