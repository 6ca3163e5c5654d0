"""The examples in docstrings run, from the repository's root."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

MODULES = ["ctl_merge", "ctl_merge.probing.api", "ctl_merge.probing.loaded"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = doctest.testmod(import_module(name))
    assert found.attempted > 0 and found.failed == 0
