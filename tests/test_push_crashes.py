"""A push that is killed, wherever that may be, has put all of it on the Hub or nothing, and the next one finishes.

It is killed right before each request, right after each answer, before file operations, and at random instants. The
suite takes a slice; `make long` all of them.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from crashes import kill_at, kill_at_instants, killed_before, operations
from hub_server import HubServer
from huggingface_hub.utils import close_session
from pushes import REPO, SHARD_SIZE, contents, remote, to, write_recipe

from ctl_merge import publishing
from ctl_merge.finished import inspect
from ctl_merge.merging import Merge
from ctl_merge.publishing import Upload

SLICE = 7  # every so many operations are tried in the suite
Contents = dict[str, bytes]


class Pushing:
    """A push as it is started, and started again: of a folder that is whole, into a repository with or without an
    earlier merge.
    """

    def __init__(self, hub: HubServer, place: Path, earlier: bool) -> None:
        self.hub, self.place, self.earlier = hub, place, None  # type: HubServer, Path, Contents | None
        self.recipe = write_recipe(place)
        self.expected = contents(Merge(self.recipe, max_shard_size=SHARD_SIZE).write(place / "whole" / "merged").folder)
        self.folder = place / "out" / "merged"
        if earlier:
            self.other = Merge(write_recipe(place / "other", 3.0), num_workers=1).write(place / "other" / "one").folder
            self.earlier = contents(self.other)

    @property
    def remote(self) -> Contents | None:
        return (remote(self.hub) or None) if REPO in self.hub.repos else None

    @property
    def commits(self) -> int:
        return len(self.hub.repos[REPO].log) if REPO in self.hub.repos else 0

    def prepare(self) -> None:
        close_session()  # else the next process has this one's connections
        self.hub.repos.clear()
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        if self.earlier:
            publishing.push(self.other, to())
            close_session()
        self.prepare_folder()

    def prepare_folder(self) -> None:
        shutil.copytree(self.place / "whole", self.folder.parent)

    def run(self) -> None:
        publishing.push(self.folder, to())

    def check_aftermath(self) -> None:
        assert self.remote in (self.expected, self.earlier)
        self.check_folder()

    def check_folder(self) -> None:
        assert contents(self.folder) == self.expected and not inspect(self.folder).findings

    def go_on(self) -> None:
        before = self.commits
        done = self.remote == self.expected
        self.run()
        assert self.remote == self.expected
        assert self.commits == (before if done else max(before, 1) + 1)  # one commit, after the repository's first
        self.check_folder()
        assert [path.name for path in self.folder.parent.iterdir()] == [self.folder.name]


class Streaming(Pushing):
    """A merge whose shards leave as they are made."""

    def prepare_folder(self) -> None:
        pass

    def run(self, resume: bool = False) -> None:
        upload = Upload(to(), streamed=True)
        merge = Merge(self.recipe, max_shard_size=SHARD_SIZE, num_workers=1)
        upload.finish(merge.write(self.folder, resume=resume, stream=upload.stream).folder)

    def check_folder(self) -> None:
        if self.folder.exists():  # all but the weights, and only once the Hub has it all
            small = {name: data for name, data in self.expected.items() if not name.startswith("model-")}
            assert contents(self.folder) == small and self.remote == self.expected

    def go_on(self) -> None:
        if not self.folder.exists():
            self.run(resume=True)
        assert self.remote == self.expected and self.commits == (3 if self.earlier else 2)
        self.check_folder()
        assert [path.name for path in self.folder.parent.iterdir()] == [self.folder.name]


KINDS: dict[str, Callable[[HubServer, Path], Pushing]] = {
    "a first push": lambda hub, place: Pushing(hub, place, False),
    "a push over an earlier one": lambda hub, place: Pushing(hub, place, True),
    "shards that leave as they are made": lambda hub, place: Streaming(hub, place, False),
    "such shards over an earlier push": lambda hub, place: Streaming(hub, place, True),
}


@pytest.fixture(params=KINDS)
def pushing(request: pytest.FixtureRequest, hub: HubServer, tmp_path: Path) -> Pushing:
    return KINDS[request.param](hub, tmp_path)


def test_killed_before_a_request_or_after_its_answer(pushing: Pushing) -> None:
    assert kill_at(pushing, "requests", lambda operation: operation % SLICE == 3) >= 2


def test_killed_around_the_commit(pushing: Pushing) -> None:
    """The request, which is the last: before it nothing may be seen, after it everything."""
    pushing.prepare()
    last = operations(pushing.run, "requests") - 1
    for operation, seen in ((last - 1, pushing.earlier), (last, pushing.expected)):
        pushing.prepare()
        assert killed_before(pushing.run, "requests", operation)
        assert pushing.remote == seen
        pushing.check_folder()
        pushing.go_on()


def test_killed_at_random_instants(hub: HubServer, tmp_path: Path) -> None:
    assert kill_at_instants(KINDS["a push over an earlier one"](hub, tmp_path), random.Random(0), 4) >= 1


@pytest.mark.long
def test_killed_before_every_request_and_after_every_answer(pushing: Pushing) -> None:
    print(f"\n{kill_at(pushing, 'requests', lambda operation: True)} kills")


@pytest.mark.long
def test_shards_that_leave_are_killed_before_every_file_operation(hub: HubServer, tmp_path: Path) -> None:
    pushing = KINDS["such shards over an earlier push"](hub, tmp_path)
    print(f"\n{kill_at(pushing, pushing.folder.parent, lambda operation: True)} kills")


@pytest.mark.long
def test_killed_at_many_random_instants(pushing: Pushing) -> None:
    print(f"\n{kill_at_instants(pushing, random.Random(1), 40)} kills")
