"""Fixtures of several files. The suite computes on tiny tensors: a second torch thread only makes it wait."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import pytest
import torch
from checkpoints import recipe_text
from command import Ctl, Ran
from crashes import kills
from definitions_evidence import MADE_UP, MadeUp
from hub_server import TOKEN, HubServer, use_hub
from huggingface_hub.utils import enable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from transformers.initialization import TORCH_INIT_FUNCTIONS

import ctl_merge
from ctl_merge import cli
from ctl_merge.merging import MergeResult

torch.set_num_threads(1)


def _unless_on_meta(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Thousands of models are made without values here: drawing these was half of it."""
    return lambda tensor, *how, **more: tensor if tensor.is_meta else draw(tensor, *how, **more)


TORCH_INIT_FUNCTIONS.update({name: _unless_on_meta(draw) for name, draw in TORCH_INIT_FUNCTIONS.items()})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if kills:
        counts = ", ".join(f"{count} in {Path(file).name}" for file, count in sorted(kills.items()) if count)
        terminalreporter.write_line(f"{kills.total()} processes were killed with SIGKILL: {counts}")


@pytest.fixture(autouse=True)
def made_up_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes whose text is MADE_UP get made-up statistics: their models cannot run."""
    from ctl_merge import merging

    real = merging.TextEvidence

    def make(kind: Any, texts: Any, checkpoints: Any) -> Any:
        if all(spec.source != MADE_UP for specs in texts.specs.values() for spec in specs):
            return real(kind, texts, checkpoints)
        return MadeUp(kind, {name: spec.shape for c in checkpoints.values() for name, spec in c.tensors.items()})

    monkeypatch.setattr(merging, "TextEvidence", make)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path)
        yield server


@pytest.fixture
def hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub, with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., MergeResult]:
    """Merge the experts with half of each one's task vector; the keywords are further keys of the recipe."""

    def run(base: Path, *experts: Path, output: str = "merged", machine: Any = None, **keys: Any) -> MergeResult:
        recipe = recipe_text("task_arithmetic", [(path, {"weight": 0.5}) for path in experts], base, **keys)
        return ctl_merge.merge(ctl_merge.parse_recipe(recipe), tmp_path / output, **(machine or {}))

    return run


@pytest.fixture
def ctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Ctl]:
    """`ctl-merge` in this process, without a terminal."""
    logger, root = logging.getLogger("ctl_merge"), logging.getLogger()
    before = logger.handlers[:], logger.level, logger.propagate
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_VERBOSITY"):  # set by the command line, for its own process
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    hub_logging.set_verbosity_error()

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["ctl-merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        logger.handlers = before[0][:]
        return Ran(int(exit.value.code or 0), *capsys.readouterr())

    yield run
    logger.handlers, logger.level, logger.propagate = before
    hub_logging.set_verbosity_warning()
    enable_progress_bars()
