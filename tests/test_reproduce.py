"""A merge made again: the same bytes, or where they differ."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint
from hub_server import TOKEN, HubServer
from safetensors.torch import load_file, save_file

from ctl_merge import publishing
from ctl_merge.card import RECIPE
from ctl_merge.destination import Destination
from ctl_merge.errors import CtlMergeError
from ctl_merge.merging import Merge
from ctl_merge.original import Original
from ctl_merge.reproduce import Reproduction, reproduce

ROOT = Path(publishing.__file__).parent.parent


def write_model(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"model.layers.{i}.mlp.w": torch.randn(8, 8, generator=generator) for i in range(3)}
    write_checkpoint(folder, tensors)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write(place: Path, models: list[Path | str], method: str = "dare_linear", **keys: Any) -> Path:
    """A merge of the models, with random masks, in three shards."""
    base, *others = models
    own = {"weight": 0.5, "density": 0.5}
    place.mkdir(exist_ok=True)
    recipe = place / "recipe.yaml"
    recipe.write_text(recipe_text(method, [(Path(model), own) for model in others], Path(base), seed=3, **keys))
    return Merge(recipe, max_shard_size="300B").write(place / "merged").folder


def again(merge: Path | str, tmp_path: Path, **given: Path) -> Reproduction:
    return reproduce(Original.open(str(merge)), tmp_path / "again", given, overwrite=True)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / "models" / name, seed) for seed, name in enumerate(("base", "one", "two"))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_from_the_hub_with_branches_that_moved(
    server: HubServer, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for model in models:
        server.add(f"org/{model.name}", model)
    merge = write(tmp_path / "work", ["org/base", "org/one", "org/two@main"])
    commit = publishing.push(merge, Destination("org/merged")).commit
    for seed, model in enumerate(models):
        server.add(f"org/{model.name}", write_model(tmp_path / "moved" / model.name, 10 + seed))
    before = contents(merge)
    shutil.rmtree(merge)
    found = again(f"org/merged@{commit}", tmp_path)
    assert found.identical and found.same == len(before) - 2 and not found.versions
    now = contents(found.folder)
    assert {name for name in before if now[name] != before[name]} == {"README.md"}  # the title: the folder's name
    assert server.sent("org/merged/resolve") < 20_000  # no weights


def test_from_a_folder_with_local_models_elsewhere(models: list[Path], tmp_path: Path) -> None:
    merge = write(tmp_path / "work", models)
    assert str(tmp_path) not in (merge / RECIPE).read_text()
    with pytest.raises(
        CtlMergeError, match="made of a local folder 'base', which lies neither .* --source 'base=FOLDER'"
    ):
        again(merge, tmp_path)
    # Under other names, and in one place beside the merge: the masks go by the names of the recipe.
    given = {model.name: model.rename(model.with_name(f"{model.name}-v2")) for model in models[:2]}
    shutil.move(models[2], merge.parent / "two")
    found = again(merge, tmp_path, **given)
    assert found.identical and not found.tensors


def test_folders_of_the_same_name(models: list[Path], tmp_path: Path) -> None:
    same = [Path(shutil.copytree(model, tmp_path / "same" / model.name / "final")) for model in models]
    merge = write(tmp_path / "work", same)
    given = {"final": same[0], "2/final": same[1], "3/final": same[2]}
    assert [source["model"] for source in Original.open(str(merge)).manifest["sources"]] == list(given)
    assert again(merge, tmp_path, **given).identical


def test_it_says_where_it_differs(models: list[Path], tmp_path: Path) -> None:
    merge = write(tmp_path / "work", models)
    file = sorted(merge.glob("*.safetensors"))[1]
    tensors = load_file(file)
    ((name, tensor),) = tensors.items()
    tensor[0, :2] += 0.25
    save_file({name: tensor}, file, metadata={"format": "pt"})
    (merge / "tokenizer.json").write_text("{ }")
    manifest = json.loads((merge / "merge_manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    (merge / "merge_manifest.json").write_text(json.dumps(manifest))
    found = again(merge, tmp_path, **{model.name: model for model in models})
    assert dict(found.files) == {file.name: "differs", "tokenizer.json": "differs"}
    [far] = found.tensors
    assert (far["tensor"], far["entries"], far["of"]) == (name, 2, 64)
    assert far["largest_difference"] == pytest.approx(0.25, rel=1e-6)
    assert found.versions == {"torch": ("1.0", torch.__version__)}


def other_weights(models: list[Path], merge: Path) -> None:
    write_model(models[1], 99)


def without_weights(models: list[Path], merge: Path) -> None:
    (models[1] / "model.safetensors").unlink()


def other_recipe(models: list[Path], merge: Path) -> None:
    (merge / RECIPE).write_text((merge / RECIPE).read_text() + "# more\n")


def manifest_with(key: str, value: Any) -> Any:
    def change(models: list[Path], merge: Path) -> None:
        path = merge / "merge_manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (other_weights, "is not the file of 'one' that was merged: its size or sha256 differs"),
        (without_weights, "model.safetensors is missing, so it is not the 'one' that was merged"),
        (other_recipe, "ctl_merge_recipe.yaml was changed after the merge"),
        (lambda models, merge: (merge / RECIPE).unlink(), "has no ctl_merge_recipe.yaml: nothing says how"),
        (lambda models, merge: (merge / "merge_manifest.json").write_text("{}"), "is damaged"),
        (manifest_with("format", 2), "has format 2: a newer ctl-merge made it"),
        (manifest_with("sources", [{"model": "../../evil", "local": True, "files": []}]), "is damaged"),
        (manifest_with("output", [{"file": "/etc/passwd"}]), "is damaged"),
    ],
)
def test_what_cannot_be_made_again_is_refused(models: list[Path], tmp_path: Path, spoil: Any, text: str) -> None:
    merge = write(tmp_path / "work", models)
    spoil(models, merge)
    with pytest.raises(CtlMergeError, match=text):
        again(merge, tmp_path, **{model.name: model for model in models})
    assert not (tmp_path / "again").exists()


def run(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ctl_merge", *map(str, words)], env=environment, cwd=cwd, text=True, capture_output=True
    )


def test_the_command(models: list[Path], tmp_path: Path) -> None:
    merge = write(tmp_path / "work", models)
    given = [word for model in models for word in ("--source", f"{model.name}={model}")]
    done = run("reproduce", merge, *given)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "byte-identical: all 7 files but the card and the manifest, which are written anew\n"
    (merge / "tokenizer.json").write_text("{ }")
    done = run("reproduce", merge, "-o", tmp_path / "out", "--json", *given)
    data = json.loads(done.stdout)
    assert done.returncode == 3 and data["files"] == {"tokenizer.json": "differs"} and not data["identical"]
    assert (tmp_path / "out" / "config.json").exists()
    done = run("reproduce", merge, "--source", "none")
    assert done.returncode == 2 and "NAME=FOLDER" in done.stderr
