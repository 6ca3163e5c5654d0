"""No token, home directory or local path in what is written, logged or said, at the most talkative setting."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer, hub_environment

import ctl_merge

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
SECRET = TOKEN.removeprefix("Bearer ")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory, in which the models lie."""
    home = tmp_path / "home" / "somebody"
    shutil.copytree(QUICKSTART, home / "models", ignore=shutil.ignore_patterns("*.py"))
    return home


def run(server: HubServer, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = hub_environment(server, home.parent) | {
        "HOME": str(home), "HF_TOKEN": SECRET, "PYTHONPATH": str(Path(ctl_merge.__file__).parents[1]),
        "HF_HOME": str(home / "cache"), "HF_HUB_CACHE": str(home / "cache" / "hub"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "ctl_merge", *map(str, arguments)], env=environment, capture_output=True, text=True,
        timeout=300, cwd=home / "models",
    )  # fmt: skip


def test_merge_probe_and_push_keep_secrets(home: Path, tmp_path: Path) -> None:
    models = home / "models"
    recipe = models / "recipe.yaml"
    recipe.write_text((models / "task_arithmetic.yaml").read_text().replace("./", f"{models}/"))
    for name in ("base", "cycle", "shift"):
        recipe.write_text(recipe.read_text().replace(f": {name}\n", f": {models / name}\n"))
    with HubServer() as server:
        ran = [
            run(server, home, recipe, "-o", tmp_path / "out", "-v"),
            run(server, home, "push", tmp_path / "out", "org/merged", "-v"),
            run(server, home, "probe", recipe, "-o", tmp_path / "report", "--sequences", 2, "--length", 16),
            run(server, home, models / "none" / "x.yaml", "-v"),
            run(server, home, "push", home / "models" / "base", "org/x", "-v"),
            run(server, home, "verify", home / "models" / "cycle"),
        ]
        pushed = b"".join(bytes(file.data) for file in server.repos["org/merged"].head().values())
    assert [r.returncode for r in ran] == [0, 0, 0, 2, 2, 2], [r.stderr[-500:] for r in ran]
    for found in ran:
        assert SECRET not in found.stdout + found.stderr
        assert str(home) not in found.stderr
    for path in [*(tmp_path / "out").rglob("*"), *(tmp_path / "report").rglob("*")]:
        if path.is_file():
            content = path.read_bytes()
            assert SECRET.encode() not in content and str(home).encode() not in content, path
            assert str(tmp_path).encode() not in content, path
    assert SECRET.encode() not in pushed and str(tmp_path).encode() not in pushed


def test_the_grep_would_find_it(home: Path) -> None:
    """A token that is said is caught by the filter, not by luck."""
    from ctl_merge.shown import shown

    os.environ["HF_TOKEN"], before = SECRET, os.environ.get("HF_TOKEN")
    try:
        assert SECRET not in shown(f"error: {SECRET}")
    finally:
        if before is None:
            del os.environ["HF_TOKEN"]
        else:
            os.environ["HF_TOKEN"] = before
