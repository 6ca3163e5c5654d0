"""A prediction of time: what it counts, what it leaves out, and that it leaves nothing behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint
from typer.testing import CliRunner

from ctl_merge import calibrate, rates
from ctl_merge.cli import app
from ctl_merge.errors import OutputError
from ctl_merge.merging import Merge
from ctl_merge.recipe_file import parse_recipe


def opened(folder: Path, method: str = "task_arithmetic", size: int = 64, workers: int = 2, **parameters: Any) -> Merge:
    models = []
    for name in ("base", "a", "b"):
        tensors = {f"model.layers.{i}.q.weight": torch.randn(size, size) for i in range(4)}
        models.append(write_checkpoint(folder / name, tensors, {"num_hidden_layers": 4}))
    own = {} if method in ("metagpt", "tsv", "sce") else {"weight": 0.5}
    text = recipe_text(method, [(path, own) for path in models[1:]], models[0], parameters)
    return Merge(parse_recipe(text), num_workers=workers)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {}), ("ties", {"density": 0.5}), ("ties", {"density": 0.5, "trim": "model"}),
        ("dare_ties", {"density": 0.5}), ("della", {"density": 0.5}), ("tsv", {}), ("metagpt", {}),
    ],
)  # fmt: skip
def test_a_prediction_counts_what_a_merge_does(method: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    merge = opened(tmp_path, method, **parameters)
    before = sorted(tmp_path.iterdir())
    found = calibrate.predict(merge, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before
    parts = found["parts"]
    assert found["seconds"] == pytest.approx(sum(parts.values()), abs=0.05)
    assert parts["start"] > 0 and (parts["measure"] == 0 or merge.merged.measures.passes > 0)
    assert all(value >= 0 for value in parts.values()) and found["notes"] == []
    assert 0 <= found["cached"] <= 1 and found["bytes_per_second"]["write"] > 0


def test_arithmetic_is_predicted_within_a_factor(tmp_path: Path) -> None:
    """Loose, as tests run beside other work; benchmarks/plan_against_run.py is exact."""
    merge = opened(tmp_path, "ties", size=1024, density=0.5)
    with calibrate.pool(2) as mapped:
        predicted = calibrate._arithmetic(merge, mapped)[2]
        start = time.perf_counter()
        for _ in mapped(merge.merged.read, list(merge.merged.tensors)):
            pass
    assert 0.2 < predicted / (time.perf_counter() - start) < 5


def test_twice_the_tensors_take_twice_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample of a known cost: 1 ms a tensor and 1 µs an entry."""
    merge = opened(tmp_path, size=512)

    clock = [0.0]

    def read(sample: Any, name: str) -> None:
        clock[0] += 1e-3 + 1e-6 * sample.tensors[name].numel

    monkeypatch.setattr(calibrate, "_read_whole", read)
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: clock[0])
    _, measuring, merging = calibrate._arithmetic(merge, map)
    assert measuring == 0
    assert merging == pytest.approx(4 * 1e-3 + 1e-6 * 4 * 512 * 512)


def test_what_is_not_predicted_is_said(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    models = [write_checkpoint(tmp_path / n, {"model.layers.0.q.weight": torch.ones(4, 4)}) for n in ("a", "b")]
    recipe = parse_recipe(recipe_text("regmean", [(m, {}) for m in models], data={"texts": str(text)}))
    found = calibrate.predict(Merge(recipe), tmp_path / "merged")
    assert found["notes"] == ["running the models on text, and the arithmetic that needs its statistics"]


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    merge = opened(tmp_path)
    monkeypatch.setattr(rates.os, "pwrite", full)
    with pytest.raises(OutputError, match="no space left"):
        calibrate.predict(merge, tmp_path / "merged")


def test_the_command_line_tells_the_time_and_changes_nothing(tmp_path: Path) -> None:
    merge = opened(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(merge.recipe.text)
    arguments = [str(recipe), "-o", str(tmp_path / "merged"), "--calibrate"]
    done = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert done.exit_code == 0 and "in one process (start" in done.output
    assert not list(tmp_path.glob("merged*"))
    assert CliRunner().invoke(app, arguments).exit_code == 2
