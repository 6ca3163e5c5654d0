"""The command line: what it prints where, its exit codes, and what it refuses, here and from the Hub."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint
from command import Ctl, Ran
from hub_server import HubServer, use_hub
from safetensors.torch import load_file
from torch import Tensor

import ctl_merge
from ctl_merge import cli
from ctl_merge.merging import Merge
from ctl_merge.methods import registry

WEIGHTS = "model.safetensors"


def tensors(seed: int, width: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(32, width, generator=generator),
        **{f"model.layers.{i}.mlp.up_proj.weight": torch.randn(width, width, generator=generator) for i in range(2)},
    }


CONFIG = {"num_hidden_layers": 2, "vocab_size": 32}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_checkpoint(tmp_path / name, tensors(i), CONFIG) for i, name in enumerate(("first", "second"))]


def write_recipe(models: list[Path], **keys: Any) -> Path:
    """The average of the models, as a file beside them."""
    path = models[0].parent / "recipe.yaml"
    path.write_text(recipe_text("linear", [(model, {"weight": 0.5}) for model in models], **keys))
    return path


@pytest.fixture
def recipe(models: list[Path]) -> Path:
    return write_recipe(models)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- the frame


def test_help_and_version_are_quick_as_they_import_no_torch() -> None:
    code = (
        "import sys\nfrom ctl_merge import cli\nsys.argv = ['ctl-merge', {!r}]\n"
        "try:\n    cli.main()\nfinally:\n    print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))\n"
    )
    for option, expected in (("--help", "ctl-merge RECIPE"), ("--version", f"ctl-merge {ctl_merge.__version__}")):
        found = subprocess.run([sys.executable, "-c", code.format(option)], capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (0, "")
        assert expected in found.stdout
        assert found.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["merge", "--help"], ["methods", "-h"], ["schema", "-h"], []]
)
def test_help_is_on_standard_output(ctl: Ctl, arguments: list[str]) -> None:
    found = ctl(*arguments)
    assert "Usage: " in found.out + found.err
    assert found.code == (0 if arguments else 2)


def test_every_option_has_a_line_of_help(ctl: Ctl) -> None:
    import typer

    for command in typer.main.get_command(cli.app).commands.values():  # type: ignore[attr-defined]
        assert command.help
        assert all(getattr(option, "help", None) for option in command.params), command.name


def test_a_recipe_alone_is_the_command_merge(
    ctl: Ctl, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert ctl(recipe).code == 0
    assert ctl("merge", recipe, "-o", "other").code == 0
    assert ctl("-q", recipe, "--output", "third").code == 0
    written = [load_file(Path(name) / WEIGHTS) for name in ("recipe", "other", "third")]
    for name, expected in written[0].items():
        assert all(torch.equal(expected, other[name]) for other in written)
    assert torch.allclose(
        written[0]["model.embed_tokens.weight"], sum(tensors(i)["model.embed_tokens.weight"] for i in (0, 1)) / 2
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "x"], "No such option: --recipe"),
        (["RECIPE", "--dryrun"], "--dry-run"),
        (["RECIPE", "--num-workers", "0"], "--num-workers"),
        (["RECIPE", "--num-workers", "many"], "--num-workers"),
        (["RECIPE", "another"], "unexpected extra argument"),
        (["RECIPE", "--device", "cpu", "--device-map", "auto"], "give one of them"),
        (["RECIPE", "--device", "gpu"], "error: 'gpu' is no device"),
        (["RECIPE", "--max-memory", "8GB"], "error: --max-memory: '8GB' is not device=size"),
        (["RECIPE", "--max-shard-size", "huge"], "error: --max-shard-size: 'huge' is not a size"),
        (["absent.yaml"], "there is no file 'absent.yaml'"),
        (["mehtods"], "there is no file 'mehtods' (did you mean the command `methods`?)"),
        (["shema"], "(did you mean the command `schema`?)"),
        (["chek", "recipe.yaml"], "(did you mean the command `check`?)"),
        ([".."], "'..' is a folder: name a recipe, which is a YAML file"),
        (["FOLDER"], "is a model, not a recipe: `ctl-merge init` writes a recipe for models"),
        (["check", "RECIPES"], "there is no file"),
        (["check", "RECIPES"], "(did you mean"),
        (["methods", "tise"], "there is no method 'tise' (did you mean 'ties'?)"),
        (["methods", "--jsno"], "No such option"),
    ],
)
def test_what_the_user_can_fix_is_exit_code_2(ctl: Ctl, recipe: Path, arguments: list[str], expected: str) -> None:
    places = {"RECIPE": recipe, "FOLDER": recipe.parent / "first", "RECIPES": recipe.with_name("recipes.yaml")}
    found = ctl(*(places.get(argument, argument) for argument in arguments))
    assert found.code == 2
    assert expected in " ".join(found.err.replace("│", " ").split())
    assert found.out == "" and "Traceback" not in found.err


def test_a_bug_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Merge, "summary", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["ctl-merge", str(recipe), "--dry-run"])
    with pytest.raises(ZeroDivisionError):  # which ends the interpreter with a traceback and exit code 1
        cli.main()


def test_the_folder_of_a_merge_is_answered_with_the_recipe_in_it(ctl: Ctl, recipe: Path, output: Path) -> None:
    assert ctl(recipe, "-o", output, "-q").code == 0
    found = ctl("compare", output)
    assert found.code == 2
    said = "".join(found.err.replace("│", " ").split())
    assert "isafolder:therecipeofthemergeinitis" in said and "merged/ctl_merge_recipe.yaml" in said


def test_tabs_are_told_from_spaces(ctl: Ctl, recipe: Path) -> None:
    recipe.write_text("merge_method: linear\nmodels:\n\t- model: a\n")
    told = ctl(recipe).err
    assert told.startswith(f"error: {recipe}, line 3: not a YAML recipe: found character ")
    assert told.endswith("that cannot start any token: indent with spaces, not with tabs\n")


def test_single_methods_are_listed(ctl: Ctl) -> None:
    found = ctl("methods", "ties", "linear", "--json")
    assert [row["name"] for row in json.loads(found.out)] == ["linear", "ties"]
    assert ctl("methods", "slerp").out.rstrip().endswith("1 method. * one value per model; (default)")


def test_a_wrong_recipe_lists_its_problems(ctl: Ctl, recipe: Path) -> None:
    recipe.write_text("merge_method: linaer\nmodels: []\nsede: 1\n")
    found = ctl(recipe)
    assert found.code == 2
    assert found.err == (
        f"error: {recipe}: 3 problem(s) in the recipe\n"
        "  line 1: no merge method 'linaer' (did you mean 'linear'?); there are: "
        f"{', '.join(sorted(registry()))}\n"
        "  line 2: `models` is empty\n"
        "  line 3: unknown key 'sede' (did you mean 'seed'?)\n"
    )


# ---- a dry run


def test_a_dry_run_writes_nothing_and_fits_the_terminal(
    ctl: Ctl, models: list[Path], tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = models[1].rename(tmp_path / ("a-very-long-name-" * 8 + "[bold]"))
    recipe = write_recipe([models[0], long])
    before = snapshot(tmp_path)
    for columns in (60, 100, 250):
        monkeypatch.setenv("COLUMNS", str(columns))
        found = ctl(recipe, "--dry-run", "-o", output)
        assert (found.code, found.err) == (0, "")
        lines = found.out.splitlines()
        assert max(map(len, lines)) <= min(columns, 100)
        assert "linear: what goes in" in lines[0]
        folded = "".join(line.strip("│ ").partition("│")[0].strip() for line in lines)
        assert str(long) in folded
        text = " ".join(found.out.split())
        assert "3 merged, 0 copied; 384 parameters" in text
        assert "download 0 B" in text and "write 1.54 kB (model.safetensors)" in text
    assert snapshot(tmp_path) == before


def test_a_dry_run_as_json_is_nothing_but_json(ctl: Ctl, recipe: Path) -> None:
    found = ctl(recipe, "--dry-run", "--json", "--max-shard-size", "1KB", "-v")
    plan = json.loads(found.out)
    assert plan["method"] == "linear"
    assert plan["tensors"] == {"merged": 3, "copied": 0, "parameters": 384, "dtypes": {"F32": 3}}
    assert plan["bytes"]["read"] == 2 * plan["bytes"]["write"] == 2 * 1536
    assert [shard["file"] for shard in plan["shards"]] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert plan["parameters"]["weight"] == [0.5, 0.5]
    assert [model["role"] for model in plan["models"]] == ["model", "model"]
    assert not Path("recipe").exists()


# ---- a merge


def test_a_merge_says_what_it_did(ctl: Ctl, recipe: Path, output: Path) -> None:
    found = ctl(recipe, "-o", output)
    assert (found.code, found.err) == (0, "")
    assert found.out.splitlines()[0] == "linear: 3 tensors merged, 0 copied"
    assert found.out.splitlines()[-1] == f"→ {output}"


def test_the_result_as_json_is_the_manifest_and_nothing_else(ctl: Ctl, recipe: Path, output: Path) -> None:
    found = ctl(recipe, "-o", output, "--json")
    manifest = json.loads((output / "merge_manifest.json").read_text("utf-8"))
    assert json.loads(found.out) == {"output": str(output), **manifest}
    assert found.err == ""


def test_quiet_says_nothing(ctl: Ctl, models: list[Path], output: Path) -> None:
    recipe = write_recipe([*models, models[0]])
    assert ctl(recipe, "-q", "-o", output) == Ran(0, "", "")
    loud = ctl(recipe, "-o", output, "--overwrite")
    assert loud.err == "WARNING: a model is listed more than once: it counts as often as it is listed\n"


def test_quiet_still_says_errors(ctl: Ctl, recipe: Path, output: Path) -> None:
    output.mkdir()
    found = ctl(recipe, "-q", "-o", output)
    assert (found.code, found.out) == (2, "")
    assert found.err == f"error: {output} exists: choose another output, or --overwrite to replace it\n"


def test_a_bar_is_drawn_on_a_terminal(recipe: Path, output: Path) -> None:
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    command = [sys.executable, "-m", "ctl_merge", str(recipe), "-o", str(output)]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, text=True)
    os.close(end)
    drawn = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert found.returncode == 0
    assert "merging: 100%" in drawn and "1.54k/1.54k" in drawn
    assert "%" not in found.stdout


def test_hashing_can_be_left_out(ctl: Ctl, recipe: Path, output: Path) -> None:
    assert ctl(recipe, "-o", output, "--no-hash").code == 0
    manifest = json.loads((output / "merge_manifest.json").read_text("utf-8"))
    assert {file["sha256"] for file in (*manifest["output"], *manifest["sources"][0]["files"])} == {None}


def test_machine_options_do_not_change_the_weights(ctl: Ctl, recipe: Path, tmp_path: Path) -> None:
    options = {
        "plain": [],
        "one": ["--num-workers", "1", "--device", "cpu"],
        "map": ["--num-workers", "5", "--device-map", '{"": "cpu"}', "--max-memory", "cpu=2GiB"],
    }
    for name, given in options.items():
        assert ctl(recipe, "-o", tmp_path / name, *given).code == 0
    assert len({(tmp_path / name / WEIGHTS).read_bytes() for name in options}) == 1


# ---- bad models


def refused(ctl: Ctl, recipe: Path, output: Path) -> str:
    """The message of a merge that is refused, without a trace of output."""
    found = ctl(recipe, "-o", output)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: ") and "Traceback" not in found.err
    assert not output.exists()
    return found.err


def test_a_missing_folder(ctl: Ctl, models: list[Path], tmp_path: Path, output: Path) -> None:
    message = refused(ctl, write_recipe([models[0], tmp_path / "absent"]), output)
    assert f"line 6: '{tmp_path}/absent' is neither a folder that exists nor a Hub repository" in message


def test_a_folder_without_weights(ctl: Ctl, models: list[Path], output: Path) -> None:
    recipe = write_recipe(models)
    (models[1] / WEIGHTS).unlink()
    assert "second has no model.safetensors, pytorch_model.bin, or index of either" in refused(ctl, recipe, output)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file(ctl: Ctl, models: list[Path], output: Path, length: int) -> None:
    path = models[1] / WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    message = refused(ctl, write_recipe(models), output)
    assert str(path) in message and "Download" in message


@pytest.mark.parametrize("config", [None, "", "[]", "{", "\x00"])
def test_a_broken_config(ctl: Ctl, models: list[Path], output: Path, config: str | None) -> None:
    (models[0] / "config.json").unlink()
    if config is not None:
        (models[0] / "config.json").write_text(config)
    message = refused(ctl, write_recipe(models), output)
    assert "first" in message and "config.json" in message


def test_shapes_that_differ(ctl: Ctl, models: list[Path], output: Path) -> None:
    odd = tensors(1) | {"model.layers.1.mlp.up_proj.weight": torch.zeros(8, 9)}
    write_checkpoint(models[1], odd, CONFIG)
    message = refused(ctl, write_recipe(models), output)
    assert "model.layers.1.mlp.up_proj.weight has shape [8, 8] in" in message and "[8, 9] in" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_none_is_named_with_model_tensor_and_element(
    ctl: Ctl, models: list[Path], output: Path, value: float, dtype: torch.dtype
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for i, model in enumerate(models):
        changed = {n: t.to(dtype) for n, t in tensors(i).items()}
        if i == 1:
            changed[name][2, 3] = value
        write_checkpoint(model, changed, CONFIG)
    message = refused(ctl, write_recipe(models), output)
    assert f"{models[1]}: {name} holds {value} at element 19. " in message
    assert "`nonfinite: allow`" in message
    assert ctl(write_recipe(models, nonfinite="allow"), "-o", output, "--overwrite").code == 0
    merged = load_file(output / WEIGHTS)[name]
    assert torch.isfinite(merged).logical_not().nonzero().tolist() == [[2, 3]]


def test_values_beyond_float16_are_refused_with_their_range(ctl: Ctl, models: list[Path], output: Path) -> None:
    for model in models:
        write_checkpoint(
            model, tensors(0) | {"model.layers.0.mlp.up_proj.weight": torch.full((8, 8), 70_000.0)}, CONFIG
        )
    message = refused(ctl, write_recipe(models, dtype="float16"), output)
    assert "model.layers.0.mlp.up_proj.weight: the merged values reach from 70000 to 70000, and float16 ends" in message
    assert ctl(write_recipe(models, dtype="bfloat16"), "-o", output, "--overwrite").code == 0


# ---- lists


def test_methods_are_listed(ctl: Ctl) -> None:
    found = ctl("methods")
    assert found.code == 0 and all(name in found.out for name in registry())
    rows = json.loads(ctl("methods", "--json").out)
    assert [row["name"] for row in rows] == sorted(registry())
    assert all(row["summary"] for row in rows)


def test_the_schema_is_printed(ctl: Ctl) -> None:
    assert json.loads(ctl("schema").out)["title"] == "ctl-merge recipe"


# ---- from the Hub


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path)
        yield server


LARGE = 512  # 1 MiB a layer: more than a header request brings


def publish(server: HubServer, tmp_path: Path, name: str, seed: int, **options: Any) -> str:
    folder = write_checkpoint(tmp_path / f"source-{name}-{seed}", tensors(seed, LARGE), CONFIG)
    (folder / "tokenizer_config.json").write_text("{}")
    return server.add(f"org/{name}", folder, **options)


@pytest.fixture
def hub_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "hub.yaml"
    path.write_text(recipe_text("linear", [(Path("org/a"), {"weight": 1.0}), (Path("org/b@v1"), {"weight": 3.0})]))
    return path


def test_a_merge_from_the_hub_is_pinned_and_downloads_each_weight_once(
    ctl: Ctl, server: HubServer, hub_recipe: Path, tmp_path: Path, output: Path
) -> None:
    commits = [publish(server, tmp_path, "a", 0), publish(server, tmp_path, "b", 1, revision="v1")]
    publish(server, tmp_path, "b", 2)  # main moves on: nobody asked for it
    size = (tmp_path / "source-a-0" / WEIGHTS).stat().st_size
    plan = json.loads(ctl(hub_recipe, "--dry-run", "--json").out)
    assert [model["commit"] for model in plan["models"]] == commits
    assert plan["bytes"]["download"] == 2 * size
    assert server.sent(WEIGHTS) < size / 4
    assert ctl(hub_recipe, "-o", output).code == 0
    assert 2 * size <= server.sent(WEIGHTS) < 2.5 * size
    merged = load_file(output / WEIGHTS)
    for name, tensor in tensors(0, LARGE).items():
        expected = 0.25 * tensor.double() + 0.75 * tensors(1, LARGE)[name].double()
        assert torch.equal(merged[name], expected.float())
    assert (output / "tokenizer_config.json").read_text() == "{}"
    manifest = json.loads((output / "merge_manifest.json").read_text("utf-8"))
    assert [(s["model"], s["revision"], s["commit"]) for s in manifest["sources"]] == [
        ("org/a", "main", commits[0]), ("org/b", "v1", commits[1])
    ]  # fmt: skip
    before = server.sent(WEIGHTS)
    assert ctl(hub_recipe, "-o", output, "--overwrite").code == 0
    assert server.sent(WEIGHTS) == before
    server.stop()
    again = ctl(hub_recipe, "-o", output, "--overwrite")
    assert again.code == 0
    assert f"the Hub is out of reach; the local cache has commit {commits[0]}" in again.err


def test_a_recipe_that_cannot_work_downloads_no_weight(
    ctl: Ctl, server: HubServer, hub_recipe: Path, tmp_path: Path, output: Path
) -> None:
    publish(server, tmp_path, "a", 0)
    odd = tensors(1, LARGE) | {"model.layers.1.mlp.up_proj.weight": torch.zeros(LARGE, LARGE + 1)}
    server.add("org/b", write_checkpoint(tmp_path / "odd", odd, CONFIG), revision="v1")
    assert "has shape [512, 512] in org/a and [512, 513] in org/b@v1" in refused(ctl, hub_recipe, output)
    assert server.sent(WEIGHTS) <= 2 * 131_072  # two headers, and what came with them
    assert not list((tmp_path / "huggingface").rglob(WEIGHTS))


def test_a_recipe_with_a_typo_asks_the_hub_nothing(ctl: Ctl, server: HubServer, hub_recipe: Path, output: Path) -> None:
    hub_recipe.write_text(hub_recipe.read_text().replace("linear", "linaer"))
    refused(ctl, hub_recipe, output)
    assert server.requests == []


def test_an_output_that_exists_is_refused_before_any_weight_is_downloaded(
    ctl: Ctl, server: HubServer, hub_recipe: Path, tmp_path: Path, output: Path
) -> None:
    publish(server, tmp_path, "a", 0)
    publish(server, tmp_path, "b", 1, revision="v1")
    output.mkdir()
    assert "exists" in ctl(hub_recipe, "-o", output).err
    assert server.sent(WEIGHTS) <= 2 * 131_072


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, "org/b@v1: no such repository, or a private one"),
        ({"private": True, "revision": "v1"}, "org/b@v1: no such repository, or a private one"),
        ({"gated": True, "revision": "v1"}, "the repository is gated. Request access at https://huggingface.co/org/b"),
        ({"revision": "v2"}, "org/b@v1: no such branch, tag or commit"),
    ],
    ids=["missing", "private", "gated", "no such revision"],
)
def test_what_the_hub_refuses_is_explained(
    ctl: Ctl, server: HubServer, hub_recipe: Path, tmp_path: Path, output: Path, options: Any, expected: str
) -> None:
    publish(server, tmp_path, "a", 0)
    if options is not None:
        publish(server, tmp_path, "b", 1, **options)
    assert expected in refused(ctl, hub_recipe, output)


def test_without_network_and_cache_the_message_says_so(
    ctl: Ctl, server: HubServer, hub_recipe: Path, output: Path
) -> None:
    server.stop()
    assert "org/a@main: no connection to the Hub" in refused(ctl, hub_recipe, output)


def test_a_transfer_that_breaks_can_be_run_again(
    ctl: Ctl, server: HubServer, hub_recipe: Path, tmp_path: Path, output: Path
) -> None:
    publish(server, tmp_path, "a", 0)
    publish(server, tmp_path, "b", 1, revision="v1")
    assert ctl(hub_recipe, "--dry-run").code == 0
    server.fault(f"{WEIGHTS}", status=500)
    message = refused(ctl, hub_recipe, output)
    assert "the Hub itself fails (HTTP 500)" in message
    server.faults.clear()
    assert ctl(hub_recipe, "-o", output).code == 0
