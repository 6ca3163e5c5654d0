"""The models that ship: what they can, and what merging them gives."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import demo  # noqa: E402
import exact_match  # noqa: E402
import tasks  # noqa: E402

COUNT = 100


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> dict[str, dict[str, float]]:
    """Exact match by model and task, of the parents, the adapter, and a merge by every recipe."""
    output = tmp_path_factory.mktemp("demo")
    logger = logging.getLogger("ctl_merge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo.py", "--output", str(output), "--count", "5"])
        patch.setattr(logger, "level", logger.level)
        demo.main()
    parents = [QUICKSTART / name for name in ("base", "cycle", "shift", "cycle-lora")]
    merged = sorted(path for path in output.iterdir())
    assert [path.name for path in merged] == sorted(path.stem for path in QUICKSTART.glob("*.yaml"))
    rows = [exact_match.measure(folder, tasks.TASKS, COUNT) for folder in (*parents, *merged)]
    return {row["model"]: row["exact_match"] for row in rows}


def test_each_expert_solves_its_own_task_only(scores):
    assert scores["cycle"]["cycle"] >= 0.9 and scores["cycle"]["shift"] <= 0.1
    assert scores["shift"]["shift"] >= 0.9 and scores["shift"]["cycle"] <= 0.1
    assert scores["cycle-lora"]["cycle"] >= 0.9 and scores["cycle-lora"]["shift"] <= 0.1


def test_the_base_solves_neither(scores):
    assert max(scores["base"].values()) <= 0.1


@pytest.mark.parametrize(("merge", "least"), [("average", 0.6), ("task_arithmetic", 0.9), ("ties", 0.9)])
def test_merges_solve_both_far_better_than_the_parents_average(scores, merge, least):
    assert min(scores[merge].values()) >= least


def test_held_out_words_are_never_trained_on():
    train, held_out = (
        {
            example.prompt.split(": ")[1]
            for task in tasks.TASKS.values()
            for example in tasks.examples(task, split, 2000, 1)
        }
        for split in tasks.SPLITS
    )
    assert not train & held_out


def test_what_ships_is_small_and_names_no_machine():
    files = [path for path in QUICKSTART.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    texts = [path.read_text("utf-8") for path in files if path.suffix == ".json"]
    assert not any(word in text for text in texts for word in ("/home/", "/root/", "/tmp/"))
