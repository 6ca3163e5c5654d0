"""What the README says is true: its generated parts, its commands, its recipe and its code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import readme
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM
from typer.main import get_command

import ctl_merge
from ctl_merge.cli import app
from ctl_merge.document import Document
from ctl_merge.moe_schema import MixtureSchema
from ctl_merge.recipe_schema import RecipeSchema

TEXT = readme.README.read_text("utf-8")
COMMANDS = re.findall(r"^\$ (.+)$", TEXT, re.MULTILINE)
MAKE = {"make demo", "make test"}  # run by people and CI; the parts of `make demo` are tested in test_quickstart.py


ON_HUB = "org/merged"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_generated_parts_are_up_to_date():
    assert readme.generated() == TEXT, "run `python tests/readme.py`"


def test_every_file_of_the_package_stands_in_the_tree():
    package = readme.ROOT / "ctl_merge"
    names = [path.name for path in package.rglob("[!_]*.py")]
    listed = [line.split()[0] for line in readme.tree().splitlines()[2:-1]]
    assert sorted(names) == sorted(name for name in listed if not name.endswith("/"))


@pytest.mark.parametrize("folder", ["", "probing", "evaluating", "tuning", "cli"])
def test_every_module_has_its_place_in_the_tree(folder):
    """Enter a new one in tests/readme.py, where the weights come by."""
    assert sorted(readme.WITHIN[folder]) == readme.modules(folder)


def test_a_file_of_the_tree_has_at_most_ten_words():
    lines = readme.tree().splitlines()[2:-1]
    assert [line for line in lines if len(line.split()) > 11] == []


def test_make_targets_exist():
    rules = (readme.ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command.split()[1]}:", rules, re.MULTILINE) for command in set(COMMANDS) & MAKE)


def arguments_of(command, tmp_path):
    written = ("merged", "report", "recipe.yaml", "adapter")
    return [str(tmp_path / a) if a in written else a for a in command.split()[1:]]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("ctl-merge") and ON_HUB not in c])
def test_commands_run(command, tmp_path, ctl, monkeypatch):
    monkeypatch.chdir(readme.ROOT)
    before = ["ctl-merge recipes/quickstart/task_arithmetic.yaml -o merged"] if "verify" in command else []
    for each in (*before, command):
        arguments = arguments_of(each, tmp_path)
        done = ctl(*arguments)
        assert done.code == 0, done.err
    if "report" in command:
        assert (tmp_path / "report" / "report.html").is_file()
    elif "init" in command:
        assert ctl_merge.load_recipe(tmp_path / "recipe.yaml").base
    elif "extract-lora" in command:
        assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    elif "-o" in arguments:
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_commands_on_the_hub_run(tmp_path, hub, ctl, monkeypatch):
    monkeypatch.chdir(readme.ROOT)
    said = []
    for command in (command for command in COMMANDS if ON_HUB in command):
        done = ctl(*arguments_of(command, tmp_path))
        assert done.code == 0, done.err
        said.append(done.out)
    assert len(hub.repos[ON_HUB].log) == 2  # its beginning and one commit
    assert said[-1].startswith("byte-identical")


def test_benchmarks_named_here_exist():
    named = re.findall(r"python (benchmarks/\S+\.py)", TEXT)
    assert named and all((readme.ROOT / path).is_file() for path in named)


def test_the_table_of_keys_has_every_key_of_a_recipe():
    table = TEXT.partition("| key | meaning |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(RecipeSchema.model_fields)


def test_options_named_here_exist():
    group = get_command(app)
    parameters = [own for verb in group.commands.values() for own in verb.params]
    known = {option for own in parameters for option in (*own.opts, *own.secondary_opts)}
    scripts = [(readme.ROOT / path).read_text() for path in re.findall(r"python (benchmarks/\S+\.py)", TEXT)]
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}  # torchrun's
    known |= {option for script in scripts for option in re.findall(r'add_argument\("(--[a-z-]+)"', script)}
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT))
    assert shown - known == set()


def test_the_recipe_shown_is_one():
    for shown in blocks("yaml"):
        for document in Document.parse(shown):
            schema = MixtureSchema if "experts" in document.data else RecipeSchema
            schema.model_validate(document.data)
        ctl_merge.parse_recipe(shown)


def test_the_method_shown_works(tmp_path, monkeypatch):
    shown = next(block for block in blocks("python") if "merge_method" in block)
    from ctl_merge.methods import registry

    monkeypatch.setattr(sys.modules["ctl_merge.methods.registry"], "_REGISTRY", dict(registry()))
    module = tmp_path / "shown.py"
    module.write_text(shown)
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("shown")
    quickstart = Path("recipes/quickstart")
    recipe = ctl_merge.parse_recipe(
        f"merge_method: largest\nbase_model: {readme.ROOT / quickstart / 'base'}\n"
        f"models: [{{model: {readme.ROOT / quickstart / 'cycle'}}}, {{model: {readme.ROOT / quickstart / 'shift'}}}]"
    )
    merged = ctl_merge.open_merge(recipe)
    assert merged.read("model.norm.weight").shape == (96,)


def test_public_names_resolve():
    for name in ctl_merge.__all__:
        assert getattr(ctl_merge, name) is not None
