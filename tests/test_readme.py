"""What the README says is true: its generated parts, its commands, its recipe and its code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import readme
from transformers import AutoModelForCausalLM

import ctl_merge
from ctl_merge.document import Document
from ctl_merge.recipe_schema import RecipeSchema

TEXT = readme.README.read_text("utf-8")
COMMANDS = re.findall(r"^\$ (.+)$", TEXT, re.MULTILINE)
MAKE = {"make demo", "make test"}  # run by people and CI; the parts of `make demo` are tested in test_quickstart.py


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_generated_parts_are_up_to_date():
    assert readme.generated() == TEXT, "run `python tests/readme.py`"


def test_every_file_of_the_package_stands_in_the_tree():
    package = readme.ROOT / "ctl_merge"
    names = {path.name for path in package.rglob("*.py")} - {"__main__.py", "__init__.py"}
    tree = readme.tree()
    assert all(f" {name} " in tree for name in names)


def test_make_targets_exist():
    rules = (readme.ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command.split()[1]}:", rules, re.MULTILINE) for command in set(COMMANDS) & MAKE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("ctl-merge")])
def test_commands_run(command, tmp_path):
    arguments = [str(tmp_path / a) if a in ("merged", "report") else a for a in command.split()[1:]]
    done = subprocess.run(
        [sys.executable, "-m", "ctl_merge", *arguments], cwd=readme.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if "report" in command:
        assert (tmp_path / "report" / "report.html").is_file()
    elif "-o" in arguments:
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_benchmarks_named_here_exist():
    named = re.findall(r"python (benchmarks/\S+\.py)", TEXT)
    assert named and all((readme.ROOT / path).is_file() for path in named)


def test_the_recipe_shown_is_one():
    for shown in blocks("yaml"):
        RecipeSchema.model_validate(Document.parse(shown)[0].data)
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
