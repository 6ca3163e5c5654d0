"""Rubbish in every file that is read: an error that says so, no traceback, no hang, nothing written.

The suite takes a fixed slice of the cases; `make long` takes over 100,000 new ones and prints how many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz_seeds import RECIPE, SLICES, STATISTICS, archived, simple, write_models
from fuzzing import cut_up, damaged, within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctl_merge.errors import CtlMergeError, OutputError
from ctl_merge.finished import inspect
from ctl_merge.front_matter import stated_bases, stated_licence
from ctl_merge.merging import Merge
from ctl_merge.original import Original
from ctl_merge.probing import archive
from ctl_merge.probing.rows import DataSpec, read_rows
from ctl_merge.recipe_file import parse_recipe
from ctl_merge.reference import ModelRef

SECONDS = 5  # of computing that any one case may take


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the models, as the working directory."""
    folder, before = tmp_path_factory.mktemp("models"), Path.cwd()
    write_models(folder)
    os.chdir(folder)
    Merge(parse_recipe(yaml.safe_dump(simple("a"))), max_shard_size="2KB").write("merged")
    yield folder
    os.chdir(before)


def plan(recipe: Any) -> None:
    Merge(parse_recipe(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))).summary()


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def both(valid: Any) -> st.SearchStrategy[Any]:
    """The document with rubbish in it, or its text cut up."""
    return damaged(valid) | cut_up(json.dumps(valid).encode())


def head_cut_up(raw: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file of which the header, and the length before it, is cut up."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return cut_up(raw[:end]).map(lambda head: head + raw[end:])


@dataclass(frozen=True)
class Target:
    """A reader: something right that it reads, how that is damaged, and the reading."""

    valid: Callable[[], Any]
    damage: Callable[[Any], st.SearchStrategy[Any]]
    read: Callable[[Any], Any]


def of_file(name: str, read: Callable[[], Any], damage: Callable[[Any], st.SearchStrategy[Any]] = both) -> Target:
    """A file of the models' folder, taken as JSON where `both` damages it, and what reads it."""

    def replacing(content: Any) -> None:
        text = "" if isinstance(content, bytes) else json.dumps(content, indent=2) + "\n"  # as files of ours are
        raw = content if isinstance(content, bytes) else text.encode("utf-8", "surrogatepass")
        with replaced(Path(name), raw):
            read()

    def valid() -> Any:
        raw = Path(name).read_bytes()
        return json.loads(raw) if damage is both else raw

    return Target(valid, damage, replacing)


def planned(model: str) -> Callable[[], None]:
    return lambda: plan(simple(model))


def verify() -> None:
    if findings := inspect(Path("merged")).findings:
        raise OutputError(str(findings))


PICKLES = st.tuples(st.sampled_from([b"PK\x03\x04", b"\x80\x02"]), st.binary(max_size=64)).map(b"".join)
CARDS = st.text(max_size=60).map(lambda text: f"---\n{text}\n---\n".encode())
TARGETS: dict[str, Target] = {
    "recipe": Target(lambda: RECIPE, damaged, plan),
    "slices": Target(lambda: SLICES, damaged, plan),
    "recipe as text": Target(
        lambda: yaml.safe_dump(RECIPE).encode(), cut_up, lambda raw: plan(raw.decode("utf-8", "replace"))
    ),
    "index": of_file("a/model.safetensors.index.json", planned("a")),
    "config": of_file("a/config.json", planned("a")),
    "tokenizer": of_file("a/tokenizer.json", lambda: plan(RECIPE)),
    "tokenizer config": of_file("a/tokenizer_config.json", lambda: plan(RECIPE)),
    "adapter config": of_file("adapter/adapter_config.json", planned("b+adapter")),
    "adapter weights": of_file("adapter/adapter_model.safetensors", planned("b+adapter"), head_cut_up),
    "header": of_file("b/model-00001-of-00002.safetensors", planned("b"), head_cut_up),
    "pickle": of_file("pickled/pytorch_model.bin", planned("pickled"), lambda _: PICKLES),
    "reference": Target(lambda: "org/a@main+org/b", lambda _: st.text(max_size=40), ModelRef.parse),
    "manifest, verified": of_file("merged/merge_manifest.json", verify),
    "manifest, reproduced": of_file("merged/merge_manifest.json", lambda: Original.open("merged")),
    "index, verified": of_file("merged/model.safetensors.index.json", verify),
    "header, verified": of_file("merged/model-00001-of-00003.safetensors", verify, head_cut_up),
    "card": of_file(
        "a/README.md", lambda: (stated_licence(Path("a")), stated_bases(Path("a"))), lambda raw: CARDS | cut_up(raw)
    ),
    "statistics": of_file(
        "statistics.npz", lambda: archive.load(Path("statistics.npz")),
        lambda raw: damaged(STATISTICS).map(archived) | cut_up(raw),
    ),
    "rows": of_file("rows.jsonl", lambda: list(islice(read_rows(DataSpec.parse("rows.jsonl")), 3)), cut_up),
}  # fmt: skip
CASES = 6_000  # of each in the long run
FEWER = {"rows": 500}  # of what is slow: this opens a library's data set each time


def fuzz(target: str, models: Path, cases: int, fixed: bool) -> int:
    """Read so many cases; how many were read without an error. Anything but a CtlMergeError ends it."""
    own, fine = TARGETS[target], 0

    @settings(
        max_examples=cases, derandomize=fixed, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(own.damage(own.valid()))
    def case(value: Any) -> None:
        nonlocal fine
        with suppress(CtlMergeError), within(SECONDS):
            own.read(value)
            fine += 1

    before = set(models.parent.rglob("*"))
    case()
    assert set(models.parent.rglob("*")) == before  # nothing is written by reading
    return fine


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "pickle"])
def test_what_is_damaged_is_read_while_it_is_whole(target: str, models: Path) -> None:
    TARGETS[target].read(TARGETS[target].valid())


@pytest.mark.parametrize("target", TARGETS)
def test_only_errors_with_words_come_out_of_rubbish(target: str, models: Path) -> None:
    fuzz(target, models, 40, fixed=True)


@pytest.fixture(scope="module")
def done() -> list[int]:
    """How many cases each reader had in this run."""
    return []


def test_the_long_run_has_as_many_cases_as_the_readme_says() -> None:
    assert sum(FEWER.get(target, CASES) for target in TARGETS) >= 100_000


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_only_errors_with_words_come_out_of_a_lot_of_rubbish(target: str, models: Path, done: list[int]) -> None:
    cases = FEWER.get(target, CASES)
    read = fuzz(target, models, cases, fixed=False)
    done.append(cases)
    print(f"\n{target}: {cases:,} cases, {read:,} of them read; {sum(done):,} cases in total")
