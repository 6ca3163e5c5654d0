"""What a merge has written is found out when it changes: `ctl-merge verify`, and the Hub's own hashes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from command import Ctl
from hub_server import HubServer
from pushes import SHARD_SIZE, write_recipe

from ctl_merge import hub
from ctl_merge.errors import HubError, OutputError
from ctl_merge.finished import inspect
from ctl_merge.header import TensorSpec
from ctl_merge.merging import Merge
from ctl_merge.writer import Shard, ShardWriter, check_shards

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("merge")
    recipe = write_recipe(place)
    (place / "a" / "tokenizer.json").write_text('{"version": "1.0"}')
    (place / "a" / "tokenizer_config.json").write_text("{}")
    return Merge(recipe, max_shard_size=SHARD_SIZE, num_workers=1).write(place / "merged").folder


@pytest.fixture
def finished(merge: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merge, tmp_path / "merged"))


def flip(folder: Path, name: str = SHARD, at: int = -1) -> None:
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 1
    (folder / name).write_bytes(data)


def other_dtype(folder: Path) -> None:
    """A header of the same length that covers the file, and lies."""
    data = (folder / SHARD).read_bytes()
    assert b'"F32","shape":[64,64]' in data
    (folder / SHARD).write_bytes(data.replace(b'"F32","shape":[64,64]', b'"I32","shape":[64,64]'))


def in_manifest(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "merge_manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return spoil


def unhashed(folder: Path) -> None:
    in_manifest(lambda m: [entry.update(sha256=None) for entry in m["output"]])(folder)


def lying_header_without_hashes(folder: Path) -> None:
    unhashed(folder)
    other_dtype(folder)


def lying_index(folder: Path) -> None:
    """The right files, in which other tensors are said to be."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted(index["weight_map"])
    index["weight_map"] = dict(zip(names, reversed([index["weight_map"][n] for n in names]), strict=True))
    path.write_text(json.dumps(index))


SPOILT: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a flipped byte": (flip, SHARD, "not as it was written"),
    "a flipped byte of the header": (lambda f: flip(f, at=9), SHARD, "header is corrupt|not as it was written"),
    "a cut file": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-7]), SHARD, "bytes where"),
    "an empty file": (lambda f: (f / SHARD).write_bytes(b""), SHARD, "0 bytes where"),
    "a lost shard": (lambda f: (f / SHARD).unlink(), SHARD, "is missing"),
    "one too many": (lambda f: shutil.copy(f / SHARD, f / "x.safetensors"), "x.safetensors", "not of this merge"),
    "a pickle too many": (lambda f: (f / "pytorch_model.bin").touch(), "pytorch_model.bin", "not of this merge"),
    "a tokenizer": (lambda f: flip(f, "tokenizer.json", 2), "tokenizer.json", "not as it was written"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json", "is missing"),
    "a config": (lambda f: (f / "config.json").write_text("{}"), "config.json", "bytes where"),
    "a recipe": (lambda f: flip(f, "ctl_merge_recipe.yaml", 3), "ctl_merge_recipe.yaml", "not as it was written"),
    "a lying header": (other_dtype, SHARD, "not as it was written"),
    "a lying header, no hashes": (lying_header_without_hashes, "merge_manifest.json", "other dtypes"),
    "a lying index": (lying_index, "model.safetensors.index.json", "does not say in which file"),
    "a link": (lambda f: (f / "notes").symlink_to("/etc/hostname"), "notes", "leads out"),
    "no manifest any more": (lambda f: flip(f, "merge_manifest.json", 0), "merge_manifest.json", "is no JSON"),
    "rubbish in the manifest": (in_manifest(lambda m: m.update(output=[3])), "merge_manifest.json", "no weight files"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_what_changed_is_found_and_named(what: str, finished: Path) -> None:
    import re

    spoil, file, problem = SPOILT[what]
    spoil(finished)
    found = [finding for finding in inspect(finished).findings if file in finding.file]
    assert found and re.search(problem, found[0].problem)


def test_everything_is_found_at_once(finished: Path, ctl: Ctl) -> None:
    for what in ("a flipped byte", "one too many", "a tokenizer", "a config"):
        SPOILT[what][0](finished)
    ran = ctl("verify", finished, "--json")
    found = json.loads(ran.out)
    assert ran.code == 3 and not found["whole"]
    expected = {SHARD, "x.safetensors", "tokenizer.json", "config.json"}
    assert {finding["file"] for finding in found["findings"]} == expected
    shown = ctl("verify", finished)
    assert shown.code == 3 and all(name in shown.out for name in expected)


def test_what_is_whole_is_called_whole(finished: Path, ctl: Ctl) -> None:
    (finished / "README.md").write_text("People edit cards.")
    (finished / "notes.txt").write_text("mine")
    ran = ctl("verify", finished)
    assert (ran.code, ran.err) == (0, "") and "whole: 8 files" in ran.out and "notes.txt is not of the merge" in ran.out
    found = json.loads(ctl("verify", finished, "--json").out)
    assert found["whole"] and len(found["hashed"]) == 8 and found["unlisted"] == ["notes.txt"]


def test_without_hashes_that_is_said(tmp_path: Path, ctl: Ctl) -> None:
    recipe = write_recipe(tmp_path)
    Merge(recipe, num_workers=1).write(tmp_path / "merged", hash_files=False)
    ran = ctl("verify", tmp_path / "merged")
    assert ran.code == 0 and "model.safetensors: size and header only" in ran.out
    flip(tmp_path / "merged", "model.safetensors")
    assert ctl("verify", tmp_path / "merged").code == 0  # so it is said
    with (tmp_path / "merged" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert ctl("verify", tmp_path / "merged").code == 3


def test_what_is_no_merge_is_an_error(tmp_path: Path, ctl: Ctl) -> None:
    write_checkpoint(tmp_path / "model", {"w": torch.ones(2)})
    for folder in (tmp_path / "model", tmp_path / "none", tmp_path / "merged.partial"):
        ran = ctl("verify", folder)
        assert ran.code == 2 and ran.err.startswith("error: ")


def test_before_a_merge_is_whole_its_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, real = write_recipe(tmp_path), ShardWriter.write

    def then_damaged(self: ShardWriter, *args: Any) -> int:
        count = real(self, *args)
        flip(self.folder, "model.safetensors", 20)
        return count

    monkeypatch.setattr(ShardWriter, "write", then_damaged)
    with pytest.raises(OutputError, match="is not as it was written .*--resume"):
        Merge(recipe).write(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(ShardWriter, "write", real)
    folder = Merge(recipe).write(tmp_path / "merged", resume=True).folder
    assert not inspect(folder).findings


def test_a_shard_that_is_not_the_planned_one_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"w": torch.ones(2)})
    check_shards(tmp_path, [Shard("model.safetensors", {"w": TensorSpec("F32", (2,))})])
    with pytest.raises(OutputError, match="not the one that was planned"):
        check_shards(tmp_path, [Shard("model.safetensors", {"v": TensorSpec("F32", (2,))})])


# ---- what comes from the Hub


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", {"w": torch.ones(2000)})


def test_bytes_of_the_right_length_that_are_not_the_published_ones(server: HubServer, weights: Path) -> None:
    server.add("org/name", weights)
    snapshot = hub.resolve("org/name")
    right = (weights / "model.safetensors").read_bytes()
    server.fault("/model.safetensors", body=right[:-1] + b"\1")
    published = snapshot.file("model.safetensors").sha256
    with pytest.raises(HubError, match=rf"model.safetensors: .* the sha256 [0-9a-f]{{64}}, where .* {published}. Del"):
        hub.download(snapshot, ["model.safetensors"])
    with pytest.raises(HubError, match="published"):  # what is wrong stays wrong
        hub.download(snapshot, ["model.safetensors"])


def test_a_content_is_hashed_once_until_it_changes(
    server: HubServer, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctl_merge import hub_content

    read, real = [], hub_content.sha256_of
    monkeypatch.setattr(hub_content, "sha256_of", lambda path: read.append(path.name) or real(path))
    server.add("org/name", weights)
    snapshot = hub.resolve("org/name")
    for _ in range(2):
        folder = hub.download(snapshot, ["model.safetensors"])
    assert read == ["model.safetensors"]
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
    with pytest.raises(HubError, match="published"):
        hub.download(snapshot, ["model.safetensors"])


def test_an_adapter_is_verified_too(tmp_path: Path, ctl: Ctl) -> None:
    quickstart = Path(__file__).parents[1] / "recipes" / "quickstart"
    folder = Path(shutil.copytree(quickstart / "cycle-lora", tmp_path / "adapter"))
    assert ctl("verify", folder).code == 0
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-1])
    assert ctl("verify", folder).code == 3


def test_a_tampered_merge_is_not_pushed_and_all_is_said(finished: Path, hub: HubServer) -> None:
    from pushes import to

    from ctl_merge import publishing

    SPOILT["a tokenizer"][0](finished)
    SPOILT["one too many"][0](finished)
    with pytest.raises(OutputError, match=r"(?s)x.safetensors is not of this merge.*tokenizer.json is not as it was"):
        publishing.push(finished, to())
    assert not hub.requests


def test_the_manifest_lists_every_file_but_itself_and_the_card(merge: Path) -> None:
    listed = {entry["file"] for entry in json.loads((merge / "merge_manifest.json").read_text())["files"]}
    assert listed == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "ctl_merge_recipe.yaml",
        "model.safetensors.index.json",
    }  # fmt: skip


# ---- outputs that are no plain merge

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
LORA = """
    merge_method: task_arithmetic
    base_model: {0}/base
    output: lora
    models: [{{model: {0}/base+{0}/cycle-lora, parameters: {{weight: 0.5}}}}]
"""
EXPERTS = """
    base_model: {0}/base
    gate_mode: random
    architecture: mixtral
    experts: [{{source_model: {0}/cycle, positive_prompts: [a]}}, {{source_model: {0}/shift, positive_prompts: [b]}}]
"""


def _written(recipe: str, place: Path) -> Path:
    from ctl_merge.recipe_file import parse_recipe

    return Merge(parse_recipe(recipe.format(QUICKSTART)), num_workers=1, max_shard_size="300KB").write(place).folder


def _extracted(place: Path) -> Path:
    from ctl_merge.extraction import extract_lora

    return extract_lora(QUICKSTART / "cycle", QUICKSTART / "base", place, rank=2, num_workers=1).folder


OUTPUTS: dict[str, tuple[Callable[[Path], Path], set[str]]] = {
    "output: lora": (
        lambda place: _written(LORA, place),
        {"adapter_config.json", "adapter_model.safetensors", "ctl_merge_recipe.yaml"},
    ),
    "extract-lora": (_extracted, {"adapter_config.json", "adapter_model.safetensors"}),
    "experts": (
        lambda place: _written(EXPERTS, place),
        {
            "config.json", "ctl_merge_recipe.yaml", "generation_config.json", "model.safetensors.index.json",
            "tokenizer.json", "tokenizer_config.json",
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=OUTPUTS)
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    write, files = OUTPUTS[request.param]
    return write(tmp_path_factory.mktemp("output") / "written"), files


def test_a_flipped_byte_or_a_missing_file_of_any_output_is_found(output: tuple[Path, set[str]]) -> None:
    """Of every file that is checked, one at a time: it alone is named."""
    folder, files = output
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert set(inspect(folder).digests) == files | shards and not inspect(folder).findings
    for name in files | shards:
        whole = (folder / name).read_bytes()
        for at in (0, len(whole) // 2, -1):
            flip(folder, name, at)
            assert {finding.file for finding in inspect(folder).findings} == {name}, at
            (folder / name).write_bytes(whole)
        (folder / name).unlink()
        found = [finding for finding in inspect(folder).findings if finding.file == name]
        assert found and "missing" in found[0].problem
        (folder / name).write_bytes(whole)
    assert not inspect(folder).findings


def test_what_would_be_loaded_beside_an_adapter_or_experts_is_found(output: tuple[Path, set[str]]) -> None:
    folder, files = output
    other = "pytorch_model.bin" if "config.json" in files else "model.safetensors"
    (folder / other).write_bytes(b"x")
    assert [finding.file for finding in inspect(folder).findings] == [other]
    (folder / other).unlink()


def test_the_report_of_a_probe_is_called_by_its_name(tmp_path: Path, ctl: Ctl) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "probe.json").write_text("{}")
    ran = ctl("verify", tmp_path / "report")
    assert ran.code == 2 and "is the report of a probe, which states no hashes: `ctl-merge probe -o`" in ran.err


def test_a_report_within_a_merge_is_checked_with_it(finished: Path, ctl: Ctl) -> None:
    (finished / "probe").mkdir()
    (finished / "probe" / "probe.json").write_text("{}")
    (finished / "probe" / "more.json").write_text("{}")
    in_manifest(lambda m: m["files"].append({"file": "probe/probe.json", "bytes": 2, "sha256": "0" * 64}))(finished)
    assert [finding.file for finding in inspect(finished).findings] == ["probe/probe.json"]
    assert inspect(finished).unlisted == ("probe/more.json",)
    ran = ctl("verify", finished / "probe")
    assert ran.code == 2 and "is a part of the merge merged: name that folder" in ran.err


def test_of_an_adapter_from_elsewhere_it_is_said_what_was_not_looked_at(ctl: Ctl) -> None:
    ran = ctl("verify", QUICKSTART / "cycle-lora")
    assert (
        ran.code == 0
        and "as far as a header tells" in ran.out
        and "no merge_manifest.json" in " ".join(ran.out.split())
    )
