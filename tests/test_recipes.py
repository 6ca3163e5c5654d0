"""Every recipe that ships is read and planned; those over real models against stand-ins for these, from a Hub."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint
from hub_server import HubServer, hub_environment, use_hub
from safetensors.torch import load_file
from stand_ins import (
    GB,
    LLAMA_2_13B,
    LLAMA_3_1_8B,
    LLAMA_3_1_70B,
    QWEN2_5_7B,
    Config,
    Tensors,
    llama_tensors,
    qwen2_tensors,
    write_llama_3_tokenizer,
    write_model,
    write_sentencepiece,
    write_stand_in,
)

from ctl_merge.errors import MismatchError
from ctl_merge.merging import Merge
from ctl_merge.recipe_file import load_recipe, parse_recipe
from ctl_merge.reference import ModelRef
from ctl_merge.sizes import format_size

RECIPES = Path(__file__).parent.parent / "recipes"
ALL = sorted(RECIPES.rglob("*.yaml"))
REAL = sorted(RECIPES.glob("*.yaml"))
WORKERS = 8  # for which the recipes' headers state the memory
FIRST_READ = 1 << 17  # bytes asked for at the beginning of a file, where its header lies


@dataclass(frozen=True)
class Expected:
    """What a recipe's plan is to say; bytes and counts."""

    method: str
    merged: int
    parameters: int
    dtype: str
    download: int  # weights of all files, headers included
    read: int
    shards: int  # of 5 GB
    decisions: tuple[str, ...]  # parts of lines


EXPECTED = {
    "llama_math_code": Expected(
        "task_arithmetic", merged=363, parameters=13_015_864_320, dtype="F16", download=104_127_105_936,
        read=104_126_955_520, shards=6,
        decisions=(
            "vanillaOVO/WizardMath-13B-V1.0@refs/pr/1: 40 stored buffers that the model computes are left out",
            "vocabulary of meta-llama/Llama-2-13b-hf: 32,000 rows",
            "vanillaOVO/WizardMath-13B-V1.0@refs/pr/1: 32,000 rows kept, 1 of its own left out",
            "written as F16",
        ),
    ),
    "llama_instruct_math": Expected(
        "ties", merged=291, parameters=8_030_261_248, dtype="BF16", download=48_181_800_200,
        read=4 * 48_181_698_560, shards=4,
        decisions=(
            "vocabulary of meta-llama/Llama-3.1-8B: 128,256 tokens, 128,256 rows",
            "allenai/Llama-3.1-Tulu-3-8B-SFT: 128,256 rows kept, 8 of its own left out",
            "written as BF16",
        ),
    ),
    "qwen_instruct_thinking": Expected(
        "linear", merged=398, parameters=4_022_468_096, dtype="BF16", download=16_089_964_000,
        read=2 * 8_044_936_192, shards=2,
        decisions=("written as BF16",),
    ),
}  # fmt: skip


def name(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with a stand-in for every model that a recipe names."""
    with HubServer() as hub:
        for ref in {ref for path in REAL for ref in load_recipe(path).refs}:
            folder = write_model(ref.text, tmp_path_factory.mktemp("model"))
            hub.add(str(ref.repo_id), folder, ref.revision or "main")
        yield hub


@pytest.fixture
def hub(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    """The same, for this process, with an empty cache and no requests yet."""
    use_hub(monkeypatch, server, tmp_path)
    server.requests.clear()
    return server


@pytest.mark.parametrize("path", ALL, ids=name)
def test_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).warnings == ()


def test_every_real_recipe_has_its_figures() -> None:
    assert {name(path) for path in REAL} == EXPECTED.keys()


def stated_figures(path: Path) -> dict[str, str]:
    """The figures in the comment that a recipe opens with: `# writes  26.03 GB  …` -> {"writes": "26.03 GB"}."""
    return dict(re.findall(r"^# (downloads|reads|writes|memory) +([\d.]+ [kMGT]?B)\b", path.read_text(), re.MULTILINE))


def planned_figures(summary: Mapping[str, Any]) -> dict[str, str]:
    """The same figures as the plan has them."""
    fields = {"downloads": "download", "reads": "read", "writes": "write", "memory": "memory"}
    return {label: format_size(summary["bytes"][field]) for label, field in fields.items()}


@pytest.mark.parametrize("path", REAL, ids=name)
def test_plan_from_headers_alone(path: Path, hub: HubServer, tmp_path: Path) -> None:
    summary, expected = Merge(path, num_workers=WORKERS).summary(), EXPECTED[name(path)]

    assert summary["method"] == expected.method
    assert summary["tensors"] == {
        "merged": expected.merged, "copied": 0, "parameters": expected.parameters,
        "dtypes": {expected.dtype: expected.merged},
    }  # fmt: skip
    assert summary["bytes"]["write"] == 2 * expected.parameters
    assert (summary["bytes"]["download"], summary["bytes"]["read"]) == (expected.download, expected.read)
    assert len(summary["shards"]) == expected.shards
    assert max(shard["bytes"] for shard in summary["shards"]) <= 5 * GB
    assert all(any(part in line for line in summary["decisions"]) for part in expected.decisions)
    assert summary["warnings"] == []

    files = [request for request in hub.requests if request.path.endswith(".safetensors")]
    assert len(files) == sum(len(weight_files(hub, ref)) for ref in load_recipe(path).refs)
    assert all(request.status == 206 and request.sent <= FIRST_READ for request in files)
    assert not list(tmp_path.rglob("*.safetensors"))

    text = path.read_text()
    assert stated_figures(path) == planned_figures(summary)
    room = math.ceil((summary["bytes"]["download"] + summary["bytes"]["write"]) / GB)
    assert f"{room} GB together" in re.sub(r"\n# ", " ", text)
    assert f"ctl-merge recipes/{path.name} -o merged" in text


def weight_files(hub: HubServer, ref: ModelRef) -> set[str]:
    """The weight files of a model on the Hub."""
    repo = hub.repos[str(ref.repo_id)]
    files = repo.commits[repo.refs[ref.revision or "main"]]
    return {file for file in files if file.endswith(".safetensors")}


def test_dry_run_on_the_command_line(server: HubServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ctl_merge", "recipes/llama_math_code.yaml", "--dry-run", "--json"]
    done = subprocess.run(
        command, cwd=RECIPES.parent, env=hub_environment(server, tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    summary, expected = json.loads(done.stdout), EXPECTED["llama_math_code"]
    assert summary["bytes"]["write"] == 2 * expected.parameters
    assert summary["bytes"]["download"] == expected.download
    assert not list(tmp_path.rglob("*.safetensors"))


def test_differing_vocabularies_need_the_named_policy(hub: HubServer) -> None:
    text = (RECIPES / "llama_math_code.yaml").read_text().replace("\ntokenizer_source: base\n", "\n")
    with pytest.raises(MismatchError, match=r"32000 rows in .*, 32001 in .*Set `tokenizer_source: base`"):
        Merge(parse_recipe(text))


def test_pickles_on_the_hub_are_merged(hub: HubServer, tmp_path: Path) -> None:
    """As for the recipes whose experts have pickles on their main branch."""
    weights = torch.arange(6.0)
    hub.add("org/base", write_checkpoint(tmp_path / "base", {"w": weights}))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"w": weights + 1}, pickled / "pytorch_model.bin")
    commit = hub.add("org/pickled", pickled)

    recipe = """
        merge_method: linear
        models: [{model: org/base}, {model: org/pickled}]
        parameters: {weight: 0.5}
    """
    result = Merge(parse_recipe(recipe)).write(tmp_path / "merged")
    assert torch.equal(load_file(result.folder / "model.safetensors")["w"], weights + 0.5)
    assert [source["commit"] for source in result.manifest["sources"]][1] == commit


def test_tokens_without_a_row_are_no_conflict(tmp_path: Path) -> None:
    """Llama 2 tokenizers name a padding token past the model's 32000 rows, each its own."""
    tiny = LLAMA_2_13B | {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                          "num_key_value_heads": 2}  # fmt: skip
    for folder, pad in (("base", "<pad>"), ("expert", "[PAD]")):
        write_stand_in(tmp_path / folder, tiny, llama_tensors(tiny))
        write_sentencepiece(tmp_path / folder, {pad: 32000})
    recipe = parse_recipe(recipe_text("task_arithmetic", [(tmp_path / "expert", {"weight": 1.0})], tmp_path / "base"))
    assert Merge(recipe).summary()["tensors"]["merged"] == 12


def test_seventy_billion_parameters_are_planned_in_seconds(tmp_path: Path) -> None:
    folders = [tmp_path / part for part in ("base", "one", "two", "three", "four")]
    for folder in folders:
        write_stand_in(folder, LLAMA_3_1_70B, llama_tensors(LLAMA_3_1_70B))
        write_llama_3_tokenizer(folder)
    base, *experts = folders
    models = [(expert, {"weight": 1.0, "density": 0.2}) for expert in experts]
    recipe = parse_recipe(recipe_text("ties", models, base, {"trim": "model"}))

    start = time.perf_counter()
    summary = Merge(recipe).summary()
    assert time.perf_counter() - start < 20
    assert summary["tensors"]["merged"] == 723
    assert summary["bytes"]["write"] == 141_107_412_992
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.safetensors")) < 10_000_000  # holes


# What the Hub states for the originals.
SIZES = {
    "meta-llama/Llama-3.1-8B": (4_976_698_672, 4_999_802_720, 4_915_916_176, 1_168_138_808),
    "Qwen/Qwen3-4B-Instruct-2507": (3_957_900_840, 3_987_450_520, 99_630_640),
}
LLAMA_2_7B = LLAMA_2_13B | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32,
}  # fmt: skip
TOTALS: list[tuple[Config, Tensors, int, int]] = [
    (LLAMA_2_7B, llama_tensors(LLAMA_2_7B, rotary=True), 323, 13_476_835_328),
    (LLAMA_3_1_8B, llama_tensors(LLAMA_3_1_8B), 291, 16_060_522_496),
    (QWEN2_5_7B, qwen2_tensors(QWEN2_5_7B), 339, 15_231_233_024),
]


@pytest.mark.parametrize("model", SIZES)
def test_stand_in_has_the_true_files(model: str, tmp_path: Path) -> None:
    folder = write_model(model, tmp_path)
    assert tuple(path.stat().st_size for path in sorted(folder.glob("*.safetensors"))) == SIZES[model]


@pytest.mark.parametrize(("config", "tensors", "count", "size"), TOTALS, ids=["Llama 2", "Llama 3.1", "Qwen2.5"])
def test_stand_in_has_the_true_tensors(config: Config, tensors: Tensors, count: int, size: int, tmp_path: Path) -> None:
    folder = write_stand_in(tmp_path, config, tensors)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert (len(index["weight_map"]), index["metadata"]["total_size"]) == (count, size)
