"""Rubbish in every file that is read: an error that says so, no traceback, no hang, nothing written.

The suite takes a fixed slice of the cases; `make long` takes over 100,000 new ones and prints how many.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import write_checkpoint
from fuzzing import cut_up, damaged, within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ctl_merge.errors import CtlMergeError
from ctl_merge.finished import inspect
from ctl_merge.front_matter import stated_bases, stated_licence
from ctl_merge.merging import Merge
from ctl_merge.original import Original
from ctl_merge.probing import archive
from ctl_merge.probing.rows import DataSpec, read_rows
from ctl_merge.recipe_file import parse_recipe
from ctl_merge.reference import ModelRef

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
SECONDS = 5  # of computing that any one case may take
RECIPE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": 0.5, "density": [0.2, 0.8]}},
        {"model": "b+adapter", "parameters": {"weight": [{"filter": "mlp", "value": 0.3}, {"value": 1.0}]}},
    ],
    "parameters": {"lambda": 1.0, "normalize": True},
    "dtype": "bfloat16",
    "tokenizer": {"source": "union", "tokens": {"<bos>": {"source": "a"}}, "pad_to_multiple_of": 8},
    "chat_template": "auto",
    "probe": {"data": ["wiki=a.txt"], "sequences": 4, "length": 16},
}
SLICES: dict[str, Any] = {
    "name": "one",
    "merge_method": "slerp",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 1]}, {"model": "base", "layer_range": [0, 1]}],
         "parameters": {"t": [0, 1]}},
    ],
    "base_model": "base",
    "out_dtype": "float16",
    "missing": "base",
    "seed": 3,
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "base",
    "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 8}, "use_rslora": False, "fan_in_fan_out": False,
    "bias": "none", "task_type": "CAUSAL_LM", "modules_to_save": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tiny models `base`, `a`, `b`, and an adapter, in the working directory."""
    folder, before = tmp_path_factory.mktemp("models"), Path.cwd()
    torch.manual_seed(0)
    config = json.loads((QUICKSTART / "base" / "config.json").read_text())
    config |= {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": True}
    layer = "model.layers.0."
    shapes = {"model.embed_tokens": (config["vocab_size"], 8), "model.norm": (8,)}
    shapes |= {f"{layer}self_attn.{name}_proj": (8, 8) for name in "qkvo"}
    shapes |= {f"{layer}mlp.gate_proj": (16, 8), f"{layer}mlp.up_proj": (16, 8), f"{layer}mlp.down_proj": (8, 16)}
    shapes |= {f"{layer}input_layernorm": (8,), f"{layer}post_attention_layernorm": (8,)}
    for name in ("base", "a", "b"):
        tensors = {f"{key}.weight": torch.randn(shape) for key, shape in shapes.items()}
        write_checkpoint(folder / name, tensors, config, shards=2)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (folder / name / file).write_bytes((QUICKSTART / "base" / file).read_bytes())
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text(json.dumps(config))
    (folder / "pickled" / "pytorch_model.bin").touch()
    (folder / "adapter").mkdir()
    prefix = f"base_model.model.{layer}self_attn.q_proj."
    factors = {f"{prefix}lora_A.weight": torch.randn(2, 8), f"{prefix}lora_B.weight": torch.randn(8, 2)}
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    write_checkpoint(folder / "merged", {"w": torch.ones(4)})
    (folder / "merged" / "ctl_merge_recipe.yaml").write_text("models: []\n")
    for name in ("merged/merge_manifest.json", "merged/model.safetensors.index.json", "a/README.md", "statistics.npz",
                 "rows.jsonl"):  # fmt: skip
        (folder / name).touch()
    (folder / "merged" / "merge_manifest.json").write_text(json.dumps(manifest()))
    os.chdir(folder)
    for valid in (RECIPE, SLICES, simple("b+adapter")):  # what is damaged is right before, and all is imported
        plan(valid)
    yield folder
    os.chdir(before)


def plan(recipe: Any) -> None:
    Merge(parse_recipe(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))).summary()


def simple(model: str) -> dict[str, Any]:
    return {"merge_method": "linear", "tokenizer_source": "base", "base_model": "base",
            "models": [{"model": m, "parameters": {"weight": 1}} for m in ("base", model)]}  # fmt: skip


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def in_file(name: str, then: Callable[[], Any]) -> Callable[[Path, Any], None]:
    """A reader of the file's content, as JSON unless it is bytes already."""

    def read(folder: Path, content: Any) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass")
        with replaced(folder / name, raw):
            then()

    return read


def of_file(name: str) -> Any:
    """The content of a file of the quickstart's base, as JSON."""
    return json.loads((QUICKSTART / "base" / name).read_text())


def both(valid: Any) -> st.SearchStrategy[Any]:
    """The document with rubbish in it, or its text cut up."""
    return damaged(valid) | cut_up(json.dumps(valid).encode())


def weight_map() -> Any:
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    return {"metadata": {"total_size": 1}, "weight_map": {f"model.layers.{i}.w": files[i % 2] for i in range(4)}}


def header() -> bytes:
    return (QUICKSTART / "cycle-lora" / "adapter_model.safetensors").read_bytes()[:1200]


def manifest() -> Any:
    """What stands in the folder `merged`, as far as readers look at it."""
    entry = {"bytes": 1, "sha256": "0" * 64}
    return {
        "format": 1, "recipe_sha256": hashlib.sha256(b"models: []\n").hexdigest(),
        "sources": [{"model": "org/a", "revision": "main", "commit": "0" * 40, "files": [{"file": "x", **entry}]},
                    {"model": "b", "local": True, "files": [{"file": "x", **entry}]}],
        "tensors": {"merged": 1, "copied": 0, "parameters": 4, "dtypes": {"F32": 1}},
        "output": [{"file": "model.safetensors", **entry}], "files": [{"file": "config.json", **entry}],
        "versions": {"ctl_merge": "0"}, "devices": {"cpu": 1}, "max_shard_bytes": 1000, "method": "linear",
    }  # fmt: skip


CARD = "---\nlicense: mit\nbase_model: [org/a, org/b]\nmodel-index: [{name: x}]\n---\n# A model\n"
ROWS = b'{"text": "a b c", "answer": ["d", 1]}\n{"text": "\xc3\xa9", "answer": null}\n'
STATISTICS: dict[str, Any] = {
    "format": 1, "ctl_merge": "0", "base": "base", "parents": ["a", "b"], "merges": ["m"], "patches": {},
    "settings": {}, "warnings": [], "tensors": ["w"], "sets": {}, "scaled": {},
}  # fmt: skip


def archived(head: Any) -> bytes:
    """A probe's statistics with this header."""
    file = io.BytesIO()
    text = np.array(json.dumps(head).encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
    np.savez_compressed(file, header=text, **{"weights/grams": np.eye(4)[None]})
    return file.getvalue()


Reader = Callable[[Path, Any], None]
# What is fuzzed: the cases, and what reads them.
TARGETS: dict[str, tuple[st.SearchStrategy[Any], Reader]] = {
    "recipe": (damaged(RECIPE), lambda _, data: plan(data)),
    "slices": (damaged(SLICES), lambda _, data: plan(data)),
    "recipe as text": (cut_up(yaml.safe_dump(RECIPE).encode()), lambda _, raw: plan(raw.decode("utf-8", "replace"))),
    "index": (both(weight_map()), in_file("a/model.safetensors.index.json", lambda: plan(simple("a")))),
    "config": (both(of_file("config.json")), in_file("a/config.json", lambda: plan(simple("a")))),
    "tokenizer": (both(of_file("tokenizer.json")), in_file("a/tokenizer.json", lambda: plan(RECIPE))),
    "tokenizer config": (
        both(of_file("tokenizer_config.json")), in_file("a/tokenizer_config.json", lambda: plan(RECIPE)),
    ),
    "adapter config": (both(ADAPTER), in_file("adapter/adapter_config.json", lambda: plan(simple("b+adapter")))),
    "header": (
        cut_up(header()), in_file("b/model-00001-of-00002.safetensors", lambda: plan(simple("b"))),
    ),
    "pickle": (
        st.binary(max_size=64).map(lambda tail: b"PK\x03\x04" + tail) | st.binary(max_size=64).map(b"\x80\x02".__add__),
        lambda folder, raw: pickled(folder, raw),
    ),
    "reference": (st.text(max_size=40), lambda _, text: ModelRef.parse(text)),
    "manifest, verified": (both(manifest()), in_file("merged/merge_manifest.json", lambda: inspect(Path("merged")))),
    "manifest, reproduced": (
        both(manifest()), in_file("merged/merge_manifest.json", lambda: Original.open("merged")),
    ),
    "index, verified": (
        both(weight_map()), in_file("merged/model.safetensors.index.json", lambda: inspect(Path("merged"))),
    ),
    "header, verified": (cut_up(header()), in_file("merged/model.safetensors", lambda: inspect(Path("merged")))),
    "adapter weights": (
        cut_up(header()), in_file("adapter/adapter_model.safetensors", lambda: plan(simple("b+adapter"))),
    ),
    "card": (
        st.text(max_size=60).map(lambda text: f"---\n{text}\n---\n".encode()) | cut_up(CARD.encode()),
        in_file("a/README.md", lambda: (stated_licence(Path("a")), stated_bases(Path("a")))),
    ),
    "statistics": (
        damaged(STATISTICS).map(archived) | cut_up(archived(STATISTICS)),
        in_file("statistics.npz", lambda: archive.load(Path("statistics.npz"))),
    ),
    "rows": (cut_up(ROWS), in_file("rows.jsonl", lambda: list(islice(read_rows(DataSpec.parse("rows.jsonl")), 3)))),
}  # fmt: skip
CASES = 6_000  # of each in the long run
FEWER = {"rows": 500}  # of what is slow: this opens a library's data set each time


def pickled(folder: Path, raw: bytes) -> None:
    with replaced(folder / "pickled" / "pytorch_model.bin", raw):
        plan(simple("pickled"))


def fuzz(target: str, models: Path, cases: int, fixed: bool) -> int:
    """Read so many cases; how many were read without an error. Anything but a CtlMergeError ends it."""
    strategy, read = TARGETS[target]
    fine = 0

    @settings(
        max_examples=cases, derandomize=fixed, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def case(value: Any) -> None:
        nonlocal fine
        with suppress(CtlMergeError), within(SECONDS):
            read(models, value)
            fine += 1

    before = set(models.parent.rglob("*"))
    case()
    assert set(models.parent.rglob("*")) == before  # nothing is written by reading
    return fine


@pytest.mark.parametrize("target", TARGETS)
def test_only_errors_with_words_come_out_of_rubbish(target: str, models: Path) -> None:
    fuzz(target, models, 40, fixed=True)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_only_errors_with_words_come_out_of_a_lot_of_rubbish(target: str, models: Path) -> None:
    cases = FEWER.get(target, CASES)
    print(f"\n{target}: {cases:,} cases, {fuzz(target, models, cases, fixed=False):,} of them read")
