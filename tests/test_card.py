"""What lies beside the merged weights: the card, the manifest, and the files of the first model."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import recipe_text, write_checkpoint
from hub_server import HubServer
from safetensors.torch import save_file

import ctl_merge
from ctl_merge.card import RECIPE
from ctl_merge.front_matter import stated_licence
from ctl_merge.merging import Merge, MergeResult

CONFIG = '{"model_type": "llama",   "num_hidden_layers": 2, "weird": "\\u00e9"}\n'  # as nobody would format it


def write_model(folder: Path, seed: int = 0, licence: str | None = None, **files: str) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"model.layers.{i}.mlp.w": torch.randn(4, 4, generator=generator) for i in range(2)}
    write_checkpoint(folder, tensors | {"steps": torch.tensor([3])})
    (folder / "config.json").write_text(CONFIG)
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A model\n")
    return folder


def write_recipe(folder: Path, models: list[Path], method: str = "linear", **keys: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(recipe_text(method, [(m, {"weight": i + 1.0}) for i, m in enumerate(models)], **keys))
    return path


def merged(recipe: Path, **options: Any) -> MergeResult:
    return Merge(recipe, **options).write(recipe.parent / "merged")


def metadata(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.fixture
def result(tmp_path: Path) -> MergeResult:
    """The average of two local models, `a` and `b`, in two shards."""
    models = [write_model(tmp_path / name, seed, "mit") for seed, name in enumerate("ab")]
    return merged(write_recipe(tmp_path, models, seed=5), max_shard_size="100B")


def card_of(result: MergeResult) -> str:
    return (result.folder / "README.md").read_text("utf-8")


# ---- the card


def test_the_metadata_names_hub_models_once_and_in_order(server: HubServer, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        server.add(f"org/{name}", write_model(tmp_path / name, seed, "apache-2.0"))
    server.add("org/one", write_model(tmp_path / "one", 7, "apache-2.0"), revision="v2")
    local = write_model(tmp_path / "local", 4, "apache-2.0")
    models = [Path("org/two"), Path("org/one"), Path("org/one@v2"), local]
    result = merged(write_recipe(tmp_path, models, "task_arithmetic", base=Path("org/base")))
    assert metadata(card_of(result)) == {
        "base_model": ["org/base", "org/two", "org/one"], "base_model_relation": "merge",
        "library_name": "transformers", "tags": ["merge", "ctl-merge", "task_arithmetic"], "license": "apache-2.0",
    }  # fmt: skip
    sources = section(card_of(result), "Models")
    commit = server.repos["org/base"].refs["main"]
    assert f"| [org/base](https://huggingface.co/org/base/tree/{commit}) at `{commit[:12]}` | base |  |" in sources
    assert "| `local` | merged | 4.0 |" in sources


def test_a_merge_of_folders_claims_no_base_model(result: MergeResult) -> None:
    assert metadata(card_of(result)) == {
        "library_name": "transformers", "tags": ["merge", "ctl-merge", "linear"], "license": "mit"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("licences", "stated", "told"),
    [
        (("mit", "mit"), "mit", ""),
        (("mit", "llama3"), None, "The sources' licences differ (llama3, mit, or none stated): see each model."),
        (("mit", None), None, "The sources' licences differ (mit, or none stated): see each model."),
        ((None, None), None, "The sources state no licence."),
    ],
)
def test_a_licence_is_stated_only_where_all_sources_agree(
    licences: tuple[str | None, str | None], stated: str | None, told: str, tmp_path: Path
) -> None:
    models = [write_model(tmp_path / name, licence=licence) for name, licence in zip("ab", licences, strict=True)]
    card = card_of(merged(write_recipe(tmp_path, models)))
    assert metadata(card).get("license") == stated
    assert told in card
    assert ("icence" in section(card, "Models")) == bool(told)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\ntext --- more", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlanguage: en\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\nlicense: !!bool mit\n---\n", None),
        ("---\nlicense: \x00\n---\n", None),
        ("# No metadata: license: mit", None),
        ("A text --- license: mit --- that goes on", None),
        ("", None),
    ],
)
def test_the_licence_of_a_card(text: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert stated_licence(tmp_path) == expected


def test_no_card_no_licence(tmp_path: Path) -> None:
    assert stated_licence(tmp_path) is None
    assert stated_licence(None) is None
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert stated_licence(tmp_path) is None


def test_the_recipe_is_there_verbatim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "a")
    text = "# Why: é 名\nmerge_method:   linear\nmodels: [{model: ./a, parameters: {weight: 1}}]\n# ```\n"
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    result = merged(tmp_path / "recipe.yaml")
    assert (result.folder / RECIPE).read_bytes() == text.encode()
    assert f"\n````yaml\n{text}````\n" in section(card_of(result), "Recipe")
    assert Merge(result.folder / RECIPE).plan.tensors.keys() == Merge(tmp_path / "recipe.yaml").plan.tensors.keys()


def test_the_card_says_how_it_was_made_and_how_to_make_it_again(result: MergeResult) -> None:
    made = section(card_of(result), "How it was made")
    for line in result.manifest["decisions"]:
        assert f"- {line}\n" in made
    assert (
        f"- seed 5; ctl_merge {ctl_merge.__version__}, torch {torch.__version__}, numpy {np.__version__}, python "
        in made
    )
    assert "$ ctl-merge reproduce .\n" in section(card_of(result), "Make it again")
    assert card_of(result).startswith("---\n") and "\n# merged\n" in card_of(result)


def test_the_table_shows_every_models_parameters(tmp_path: Path) -> None:
    models = [write_model(tmp_path / name, seed) for seed, name in enumerate("abc")]
    path = tmp_path / "recipe.yaml"
    weights = [{"weight": [0, 1]}, {"weight": 2, "density": 0.5}]
    path.write_text(recipe_text("ties", list(zip(models[1:], weights, strict=True)), models[0]))
    assert section(card_of(merged(path)), "Models").strip().splitlines()[:5] == [
        "| model | role | weight | density |", "|---|---|---|---|", "| `a` | base |  |  |",
        "| `b` | merged | 0 to 1 | 1.0 |", "| `c` | merged | 2.0 | 0.5 |",
    ]  # fmt: skip


def test_nothing_tells_where_the_models_lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "home" / "secret-project"
    models = [write_model(secret / name, seed) for seed, name in enumerate(("a", "b"))]
    (models[1] / "model.safetensors").unlink()
    extra = {f"model.layers.{i}.mlp.w": torch.ones(4, 4) for i in range(3)} | {"steps": torch.tensor([3])}
    save_file(extra, models[1] / "model.safetensors")  # so that decisions name the models
    monkeypatch.chdir(models[0])
    for written in ([Path("."), models[1]], [Path("../a"), Path("../../secret-project/b")]):
        path = write_recipe(models[0], written, missing="skip")
        result = Merge(path).write(tmp_path / "merged", overwrite=True)
        assert [source["model"] for source in result.manifest["sources"]] == ["a", "b"]
        assert any("b: left out" in line for line in result.manifest["decisions"])
        for file in ("README.md", "merge_manifest.json", RECIPE):
            text = (result.folder / file).read_text("utf-8")
            assert "secret-project" not in text and str(tmp_path) not in text


# ---- the manifest


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_manifest_of_folders(result: MergeResult) -> None:
    folder = result.folder
    manifest = json.loads((folder / "merge_manifest.json").read_text("utf-8"))
    assert manifest == result.manifest
    assert manifest["versions"] == {
        "ctl_merge": ctl_merge.__version__, "torch": torch.__version__, "numpy": np.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    assert (manifest["format"], manifest["method"], manifest["seed"]) == (1, "linear", 5)
    assert manifest["recipe_sha256"] == sha256(folder / RECIPE)
    assert manifest["sources"] == [
        {"model": name, "local": True, "files": [file_entry(folder.parent / name / "model.safetensors")]}
        for name in ("a", "b")
    ]
    assert manifest["output"] == [file_entry(path) for path in sorted(folder.glob("*.safetensors"))]
    assert len(manifest["output"]) == 2
    assert manifest["tensors"] == {"merged": 2, "copied": 1, "parameters": 33, "dtypes": {"F32": 2, "I64": 1}}
    assert manifest["devices"] == {"cpu": 3}
    assert manifest["decisions"] == [
        "written as F32 (each tensor's own in a)",
        "1 tensors that are not floating point are copied; all models must agree on them",
    ]


def file_entry(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def test_the_manifest_pins_hub_models(server: HubServer, tmp_path: Path) -> None:
    models = [write_model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    commits = [server.add("org/a", models[0]), server.add("org/b", models[1], revision="v1")]
    result = merged(write_recipe(tmp_path, [Path("org/a"), Path("org/b@v1")]))
    assert result.manifest["sources"] == [
        {"model": repo, "revision": revision, "commit": commit, "files": [file_entry(folder / "model.safetensors")]}
        for repo, revision, commit, folder in zip(
            ("org/a", "org/b"), ("main", "v1"), commits, models, strict=True
        )
    ]  # fmt: skip


def test_two_runs_leave_the_same_files(tmp_path: Path) -> None:
    models = [write_model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    recipe = write_recipe(tmp_path, models)
    folders = [tmp_path / str(i) / "merged" for i in range(2)]
    for folder, workers in zip(folders, (1, 3), strict=True):
        Merge(recipe, num_workers=workers).write(folder)
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert first == second


# ---- the files beside the weights

COPIED = {
    "tokenizer.json": "{}", "tokenizer_config.json": "{ }", "special_tokens_map.json": "{}", "tokenizer.model": "\0",
    "vocab.json": "{}", "merges.txt": "a b", "chat_template.jinja": "{{ x }}", "generation_config.json": "{}",
    "additional_chat_templates/tool.jinja": "{{ y }}", "preprocessor_config.json": "{}", "modeling_mine.py": "x = 1",
    "LICENSE": "text", "LICENSE.txt": "text", "NOTICE": "text", "USE_POLICY.md": "text",
}  # fmt: skip
STALE = {
    "README.md": "of the base", "merge_manifest.json": "{}", "ctl_merge_recipe.yaml": "old", "trainer_state.json": "{}",
    "training_args.bin": "x", "all_results.json": "{}", "adapter_config.json": "{}", "requirements.txt": "x",
    "pytorch_model.bin.index.json": "{}", "optimizer.pt": "x", ".gitattributes": "x", "checkpoint-5/config.json": "{}",
    "extra.safetensors": "x", "onnx/tokenizer.json": "{}",
}  # fmt: skip


def test_companions_of_the_first_model_are_copied_and_stale_files_are_not(tmp_path: Path) -> None:
    models = [write_model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for file, text in {**COPIED, **STALE}.items():
        (models[0] / file).parent.mkdir(exist_ok=True)
        (models[0] / file).write_text(text)
    (models[1] / "vocab.json").write_text("{}")
    (models[1] / "tokenizer.json").write_text("{}")
    (models[1] / "other.json").write_text("{}")
    folder = merged(write_recipe(tmp_path, models)).folder
    written = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    own = {"README.md", "config.json", "merge_manifest.json", "model.safetensors", RECIPE}
    assert set(written) == set(COPIED) | own
    for file, text in COPIED.items():
        assert written[file].read_bytes() == text.encode()
    assert "linear" in written[RECIPE].read_text()


def test_the_config_is_the_first_models_byte_for_byte(result: MergeResult) -> None:
    assert (result.folder / "config.json").read_bytes() == CONFIG.encode()


def test_the_config_states_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a")
    config = {"model_type": "llama", "dtype": "float32", "text_config": {"torch_dtype": "float32", "dtype": None}}
    (model / "config.json").write_text(json.dumps(config))
    result = merged(write_recipe(tmp_path, [model], dtype="bfloat16"))
    assert json.loads((result.folder / "config.json").read_text()) == {
        "model_type": "llama", "dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "dtype": None}
    }  # fmt: skip
