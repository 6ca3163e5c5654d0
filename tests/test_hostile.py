"""What strangers upload: refused with words, in bounded time and memory, and nothing of this machine is taken along."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint
from command import Ctl

import ctl_merge
from ctl_merge.errors import CheckpointError, CtlMergeError, DataError, RecipeError
from ctl_merge.merging import Merge
from ctl_merge.probing.turns import templated
from ctl_merge.recipe_file import parse_recipe
from ctl_merge.shown import shown
from ctl_merge.time_limit import interrupted_after

W = "model.layers.0.w"
QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_checkpoint(tmp_path / name, {W: torch.full((4, 4), float(i))}) for i, name in enumerate("ab", 1)]


def opened(models: list[Path]) -> Merge:
    return Merge(parse_recipe(recipe_text("linear", [(model, {"weight": 1.0}) for model in models])))


# ---- files


class Writes:
    """What a pickle can do where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_would_write_a_file_writes_none(models: list[Path], tmp_path: Path, zipped: bool) -> None:
    (models[0] / "model.safetensors").unlink()
    target, file = tmp_path / "written", models[0] / "pytorch_model.bin"
    if zipped:
        torch.save({W: Writes(target)}, file)
    else:
        file.write_bytes(pickle.dumps({W: Writes(target)}))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
        opened(models).write(tmp_path / "merged")
    assert not target.exists()
    pickle.loads(pickle.dumps(Writes(target)))
    assert target.exists()  # so it would have been


def test_weights_that_are_another_file_of_this_machine(models: list[Path]) -> None:
    (models[0] / "model.safetensors").unlink()
    (models[0] / "model.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        opened(models)


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer_config.json", "LICENSE", "modeling.py", "config.json"])
def test_a_file_beside_the_weights_that_leads_out_is_not_taken_along(
    models: list[Path], tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"model_type": "llama", "token": "hf_mine"}')
    (models[0] / name).unlink(missing_ok=True)
    (models[0] / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{name} is a link that leads out of the model's folder: put the file"):
        opened(models).write(tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.partial").exists()


def test_links_within_the_folder_and_into_a_hub_cache_are_followed(models: list[Path], tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "models--org--a" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "1234").write_text("merges")
    (models[0] / "merges.txt").symlink_to(blobs / "1234")
    (models[0] / "more").mkdir()
    (models[0] / "more" / "vocab").write_text("vocab")
    (models[0] / "vocab.txt").symlink_to("more/vocab")
    folder = opened(models).write(tmp_path / "merged").folder
    assert (folder / "merges.txt").read_text() == "merges" and (folder / "vocab.txt").read_text() == "vocab"
    assert not (folder / "merges.txt").is_symlink()


@pytest.mark.parametrize("file", ["../b/model.safetensors", "/etc/passwd", "..", "a\\b", ".hidden", "x/../y", ""])
def test_an_index_that_leads_out(models: list[Path], file: str) -> None:
    (models[0] / "model.safetensors").rename(models[0] / "other.safetensors")
    (models[0] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {W: file}}))
    with pytest.raises(CheckpointError, match="out of the model's folder|is missing"):
        opened(models)


@pytest.mark.parametrize("name", ["w\x1b[2J", "w\nx", "w\x9b31m", "w\u2028"])
def test_a_tensor_whose_name_a_terminal_would_obey(tmp_path: Path, name: str) -> None:
    model = write_checkpoint(tmp_path / "a", {name: torch.ones(2)})
    with pytest.raises(CheckpointError, match="control characters") as caught:
        opened([model])
    assert name not in str(caught.value)


# ---- absurd values

CONFIGS: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": -1}, {"num_hidden_layers": "many"}, {"num_hidden_layers": None},
    {"vocab_size": 10**12}, {"vocab_size": -5}, {"vocab_size": 1e400}, {"hidden_size": -1}, {"hidden_size": 10**15},
    {"hidden_size": 0, "num_attention_heads": 0}, {"num_attention_heads": 10**12}, {"model_type": "x" * 10**6},
    {"model_type": ["llama"]}, {"architectures": "LlamaForCausalLM" * 10**4}, {"text_config": {"text_config": {}}},
    {"torch_dtype": 10**400}, {"tie_word_embeddings": {"a": 1}}, {"quantization_config": "yes"},
]  # fmt: skip


@pytest.mark.parametrize("absurd", CONFIGS, ids=lambda c: str(c)[:40])
def test_an_absurd_config_costs_neither_time_nor_memory(absurd: dict[str, Any], tmp_path: Path) -> None:
    models = []
    for name in ("cycle", "shift"):
        models.append(tmp_path / name)
        models[-1].mkdir()
        for file in (QUICKSTART / name).iterdir():
            (models[-1] / file.name).write_bytes(file.read_bytes())
    config = json.loads((models[0] / "config.json").read_text())
    (models[0] / "config.json").write_text(json.dumps({**config, **absurd}))
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        opened(models).summary()
    except CtlMergeError as error:
        assert len(shown(str(error))) < 5000
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


@pytest.mark.parametrize("raw", ["[" * 200_000, '{"a":' * 100_000, "{" * 10, "", "\x00", '{"a": NaN, "a": 1' + "}" * 9])
def test_a_config_that_is_deep_or_broken(models: list[Path], raw: str) -> None:
    (models[0] / "config.json").write_text(raw)
    with pytest.raises(CheckpointError, match="config.json"):
        opened(models)


@pytest.mark.parametrize("rank", [10**12, -1, 0, 1.5, "8", None, 1e400])
def test_an_adapter_of_absurd_rank(tmp_path: Path, rank: Any) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (QUICKSTART / "cycle-lora").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": rank}))
    start = time.process_time()
    with pytest.raises(CtlMergeError):
        Merge(parse_recipe(recipe_text("linear", [(f"{QUICKSTART / 'base'}+{folder}", {"weight": 1.0})]))).summary()
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["org/../x", "org/a\x1b[2J", "../../etc", "org/a@../b", "a" * 5000, "org/a\n", "-o/x"])
def test_names_of_models(name: str, ctl: Ctl, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text("linear", [(Path(name), {"weight": 1.0})]).replace(str(Path(name)), "NAME"))
    path.write_text(path.read_text().replace("NAME", json.dumps(name)))
    ran = ctl(path, "--dry-run")
    assert ran.code == 2 and ran.err.startswith("error:") and "\x1b" not in ran.err + ran.out


@pytest.mark.parametrize("number", [2**31, 10**12, -1, 1.5, None, "x"])
def test_an_absurd_id_of_a_token(number: Any, tmp_path: Path) -> None:
    """A table with as many rows would not fit into memory."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (QUICKSTART / "cycle").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["absurd"] = number
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = recipe_text("linear", [(p, {"weight": 1.0}) for p in (folder, QUICKSTART / "shift")])
    with pytest.raises(CheckpointError, match="a token has the id"):
        Merge(parse_recipe(recipe + "tokenizer_source: union\n"))


def test_an_absurd_padding() -> None:
    with pytest.raises(RecipeError, match="pad_to_multiple_of"):
        parse_recipe(
            "merge_method: linear\nmodels: [{model: org/a}]\ntokenizer: {source: base, pad_to_multiple_of: 2147483648}"
        )


# ---- YAML


def test_a_recipe_of_very_many_values_is_refused_at_once() -> None:
    text = "a: [" + "1, " * 200_000 + "1]"
    start = time.process_time()
    with pytest.raises(RecipeError, match="more than 100,000 values"):
        parse_recipe(text)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("text", ["[" * 50_000, "- " * 50_000, "a: " * 3000, "{a: " * 20_000, "? " * 30_000])
def test_a_recipe_that_is_deep_is_refused_at_once(text: str) -> None:
    start = time.process_time()
    with pytest.raises(RecipeError):
        parse_recipe(text)
    assert time.process_time() - start < 3


def test_a_recipe_of_aliases_that_explode() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    start = time.process_time()
    with pytest.raises(RecipeError, match="values, with aliases written out"):
        parse_recipe("\n".join(lines))
    assert time.process_time() - start < 5


# ---- chat templates


class Tokenizer:
    """As transformers renders: in its sandbox."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template([messages], chat_template=self.chat_template)
        return rendered[0]


ROW = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
HARM = {
    "{% for x in range(10**9) %}x{% endfor %}": "refuses a row|does not end",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "refuses a row",
    "{{ cycler.__init__.__globals__.os.system('touch harm') }}": "refuses a row",
    "{% for x in range(9999) %}{% for y in range(9999) %}{% endfor %}{% endfor %}": "does not end",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "refuses a row",
    "{{ 1 // 0 }}": "refuses a row",
    "{{ messages[7].content }}": "refuses a row",
    "{{ 'x' * 10000000 }}": "makes 10,000,000 characters",
    "{% include '/etc/passwd' %}": "refuses a row",
}


@pytest.mark.parametrize("template", HARM)
def test_a_template_that_would_do_harm(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ctl_merge.probing.turns._SECONDS", 0.5)
    with pytest.raises(DataError, match=HARM[template]):
        templated(ROW, Tokenizer(template), "org/model")
    assert not list(tmp_path.iterdir())


def test_what_takes_too_long_is_interrupted_in_any_thread_and_only_then() -> None:
    found: list[Any] = []

    def run() -> None:
        try:
            with interrupted_after(0.1):
                while True:
                    pass
        except TimeoutError:
            found.append("stopped")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert found == ["stopped"]
    with interrupted_after(0.05):
        pass
    end = time.monotonic() + 0.15
    while time.monotonic() < end:
        pass


def test_a_limit_that_was_not_reached_leaves_profilers_alone() -> None:
    """To withdraw an interruption that was never sent made Python 3.11 spin for ever under cProfile, or a debugger."""
    code = (
        "import cProfile; from ctl_merge.time_limit import interrupted_after\n"
        "def work():\n    with interrupted_after(5):\n        pass\n    return sum(map(abs, range(9)))\n"
        "cProfile.run('work()')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


# ---- what is said


def test_what_is_shown_has_no_control_characters_token_or_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("HOME", "/home/someone")
    text = "x\x1b[31m /home/someone/m.yaml /home/someone2 '/home/someone' hf_abcdefghij\r\n\tend"
    assert shown(text) == "x\\x1b[31m ~/m.yaml /home/someone2 '~' $HF_TOKEN\\r\n\tend"


def test_a_zip_of_zeros_is_no_checkpoint(models: list[Path]) -> None:
    (models[0] / "model.safetensors").unlink()
    with zipfile.ZipFile(models[0] / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(50_000_000))
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        opened(models)


def test_a_header_that_claims_a_hundred_megabytes_in_little_memory(models: list[Path]) -> None:
    """In a process that may not have much: the file is sparse, and its header one long name."""
    with (models[0] / "model.safetensors").open("wb") as file:
        file.write((99_000_000).to_bytes(8, "little") + b'{"')
        file.truncate(8 + 99_000_000)
    code = (
        "import resource, sys, torch, ctl_merge\nfrom ctl_merge.header import local_header\n"
        "from pathlib import Path\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000,) * 2)\n"
        "try: local_header(Path(sys.argv[1]))\nexcept ctl_merge.CtlMergeError as e: print('refused', e)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(models[0] / "model.safetensors")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(ctl_merge.__file__).parents[1])}, timeout=60,
    )  # fmt: skip
    assert ran.stdout.startswith("refused"), ran.stderr


@pytest.mark.parametrize("broken", [
    {"added_tokens": [{"id": 0, "content": {}}]}, {"added_tokens": [{"id": 0, "content": ["<pad>"]}]},
    {"added_tokens": 7}, {"model": {"type": "WordLevel", "vocab": [[["a"], 0]]}},
], ids=str)  # fmt: skip
def test_a_tokenizer_of_the_wrong_shape(broken: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (QUICKSTART / "cycle").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | broken))
    recipe = recipe_text("linear", [(p, {"weight": 1.0}) for p in (folder, QUICKSTART / "shift")])
    with pytest.raises(CheckpointError, match="tokenizer files cannot be read"):
        Merge(parse_recipe(recipe + "tokenizer_source: union\n")).summary()


# ---- small files that are not small

BOUNDED = """
import resource, sys, time
from contextlib import nullcontext
from pathlib import Path
import ctl_merge
from ctl_merge.merging import Merge
from ctl_merge.recipe_file import parse_recipe
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    Merge(parse_recipe(sys.stdin.read())).summary()
    print('read')
except ctl_merge.CtlMergeError as error:
    print('refused', error)
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def bounded(recipe: str) -> tuple[str, float, float]:
    """What becomes of a recipe in a process of its own, CPU seconds, and bytes of memory beyond those before."""
    ran = subprocess.run(
        [sys.executable, "-c", BOUNDED], input=recipe, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(ctl_merge.__file__).parents[1])},
    )  # fmt: skip
    assert not ran.stderr, ran.stderr
    *said, figures = ran.stdout.splitlines()
    seconds, kilobytes = map(float, figures.split())
    return "\n".join(said), seconds, 1024 * kilobytes


def huge(file: str, size: int, tmp_path: Path) -> str:
    """A recipe with one model, one of whose files is valid JSON of that size."""
    folder = tmp_path / "model"
    shutil.copytree(QUICKSTART / "cycle", folder)
    data = json.loads((folder / file).read_text())
    if file == "tokenizer.json":
        for entry in range(size // 40):
            data["model"]["vocab"][f"<absurd token {entry:012}>"] = 1000 + entry
    else:
        data["absurd"] = ["x" * 37] * (size // 41)
    (folder / file).write_text(json.dumps(data))
    return recipe_text("linear", [(p, {"weight": 1.0}) for p in (folder, QUICKSTART / "shift")]) + (
        "tokenizer_source: union\n" if file == "tokenizer.json" else ""
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_file_beyond_its_bound_is_refused_unread(file: str, tmp_path: Path) -> None:
    recipe, path = huge(file, 1000, tmp_path), tmp_path / "model" / file
    with path.open("ab") as grown:
        grown.truncate(1 << 38)  # sparse: 256 GiB
    said, seconds, memory = bounded(recipe)
    assert said.startswith("refused") and f"{file}" in said and "which no such file needs: refused" in said
    assert seconds < 10 and memory < 600e6


def test_what_is_read_takes_time_and_memory_in_proportion(tmp_path: Path) -> None:
    """A stand-in of 8 MB for the largest tokenizer that is read, of 128 MiB, which takes sixteen times as much."""
    said, seconds, memory = bounded(huge("tokenizer.json", 8_000_000, tmp_path))
    assert said and seconds < 15 and memory < 400e6, (said, seconds, memory)


@pytest.mark.long
@pytest.mark.parametrize(("file", "size"), [("tokenizer.json", 100_000_000), ("config.json", 50_000_000)])
def test_absurd_sizes(file: str, size: int, tmp_path: Path) -> None:
    said, seconds, memory = bounded(huge(file, size, tmp_path))
    print(f"\n{file} of {size:,} bytes: {said[:70]}; {seconds:.1f} s of CPU, {memory / 1e6:,.0f} MB")
    assert seconds < 120 and memory < 6e9


@pytest.mark.parametrize("levels", [70, 900, 100_000])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_files_of_any_depth(file: str, levels: int, tmp_path: Path) -> None:
    """Whatever reads them: refused in words, or of no consequence."""
    from ctl_merge.probing.data import load_tokenizer

    folder = tmp_path / "model"
    shutil.copytree(QUICKSTART / "cycle", folder)
    text = (folder / file).read_text().rstrip().removesuffix("}")
    (folder / file).write_text(text + ', "absurd_config": ' + '{"absurd_config": ' * levels + "1" + "}" * levels + "}")
    recipe = recipe_text("linear", [(p, {"weight": 1.0}) for p in (folder, QUICKSTART / "shift")], dtype="float16")
    start = time.process_time()
    if file == "config.json":
        with pytest.raises(CheckpointError, match=r"config.json is not valid JSON \(it is nested .*: refused"):
            Merge(parse_recipe(recipe)).write(tmp_path / "out")
    elif file == "generation_config.json":
        Merge(parse_recipe(recipe)).write(tmp_path / "out")
    else:
        with pytest.raises(DataError, match="it is nested .*: refused"):
            load_tokenizer(folder, "cycle")
        with (
            pytest.raises(CheckpointError, match="it is nested .*: refused")
            if file == "tokenizer.json"
            else nullcontext()
        ):
            Merge(parse_recipe(recipe + "tokenizer_source: union\n")).summary()
    assert time.process_time() - start < 20
