"""The network is pulled: under a header, a download, an upload. The error comes soon, and the next run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import recipe_text
from hub_server import HubServer, use_hub
from huggingface_hub.utils import close_session
from pushes import REPO, SHARD_SIZE, contents, remote, to, write_model, write_recipe

from ctl_merge import hub as reading
from ctl_merge import hub_client, publishing
from ctl_merge.errors import HubError
from ctl_merge.finished import inspect
from ctl_merge.merging import Merge
from ctl_merge.publishing import Upload

WEIGHTS = "model.safetensors"
SOON = 20.0  # seconds, for all tries; the time limits are shortened here, and the waits between tries left out
Pull = Callable[[HubServer, str, str, int], None]


def drop(hub: HubServer, part: str, method: str, after: int) -> None:
    """The connection breaks after some bytes, whenever it is tried."""
    if method == "POST":
        hub.fault(part, method=method, lost=True)
    else:
        hub.fault(part, method=method, cut=after)


def silence(hub: HubServer, part: str, method: str, after: int) -> None:
    """Nothing moves after some bytes, and the connection stays."""
    hub.fault(part, method=method, stall=after)


def shut_down(hub: HubServer, part: str, method: str, after: int) -> None:
    """The Hub is gone when it is asked."""
    hub.fault(part, method=method, action=hub.stop, cut=after, times=1)


PULLS: dict[str, Pull] = {"drops": drop, "falls silent": silence, "is gone": shut_down}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setattr(hub_client, "SILENCE", 0.3)
    yield
    close_session()  # the client of these time limits


@contextmanager
def soon() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SOON


@contextmanager
def back(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The network, and with it the Hub as it was."""
    hub.stop()
    with HubServer() as again:
        again.repos, again.user = hub.repos, hub.user
        use_hub(monkeypatch, again, tmp_path)
        monkeypatch.setenv("HF_TOKEN", "hf_loopbackToken")
        yield again


@pytest.fixture(params=PULLS)
def pull(request: pytest.FixtureRequest) -> Pull:
    return PULLS[request.param]


# ---- reading


@pytest.fixture
def recipe(hub: HubServer, tmp_path: Path) -> Path:
    """A merge of two models on the Hub."""
    for seed, name in enumerate("ab"):
        hub.add(f"org/{name}", write_model(tmp_path / name, seed))
    path = tmp_path / "hub.yaml"
    path.write_text(recipe_text("linear", [(f"org/{name}", {"weight": 0.5}) for name in "ab"]))
    return path


@pytest.fixture
def whole(tmp_path: Path, recipe: Path) -> bytes:
    """What that merge writes where the network holds."""
    text = recipe.read_text().replace("org/", f"{tmp_path}/")
    local = recipe.with_name("local.yaml")
    local.write_text(text)
    return (Merge(local).write(tmp_path / "local").folder / WEIGHTS).read_bytes()


def test_under_a_header(
    hub: HubServer, recipe: Path, whole: bytes, pull: Pull, tmp_path: Path, monkeypatch: Any
) -> None:
    """Headers are all that a plan reads."""
    pull(hub, f"org/b/resolve/{hub.repos['org/b'].refs['main']}/{WEIGHTS}", "GET", 5)
    with soon(), pytest.raises(HubError, match=r"org/b@main, model.safetensors: .*([Rr]un|start) again"):
        Merge(recipe)
    with back(hub, monkeypatch, tmp_path):
        assert (Merge(recipe).write(tmp_path / "merged").folder / WEIGHTS).read_bytes() == whole


def test_under_a_download(
    hub: HubServer, recipe: Path, whole: bytes, pull: Pull, tmp_path: Path, monkeypatch: Any
) -> None:
    merge = Merge(recipe)
    pull(hub, f"org/b/resolve/{hub.repos['org/b'].refs['main']}/{WEIGHTS}", "GET", 20_000)
    with soon(), pytest.raises(HubError, match=r"org/b@main, model.safetensors.*: .*[Rr]un again"):
        merge.write(tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))
    first = reading.resolve("org/a", hub.repos["org/a"].refs["main"])
    assert reading.cached(first, [WEIGHTS]) == {WEIGHTS}  # what came whole stays
    assert not list((tmp_path / "huggingface").rglob("*.incomplete"))
    with back(hub, monkeypatch, tmp_path) as again:
        assert (Merge(recipe).write(tmp_path / "merged").folder / WEIGHTS).read_bytes() == whole
        assert not again.sent(f"org/a/resolve/{first.commit}/{WEIGHTS}")  # and is not fetched again


# ---- writing

STEPS = {
    "who": ("GET", "/api/whoami"), "create": ("POST", "/api/repos/create"), "rights": ("POST", "/preupload/"),
    "batch": ("POST", "/lfs/objects/batch"), "upload": ("PUT", "/upload/"), "verify": ("POST", "/lfs/verify"),
    "commit": ("POST", "/commit/"),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_under_a_push(hub: HubServer, tmp_path: Path, pull: Pull, step: str, monkeypatch: Any) -> None:
    folder = Merge(write_recipe(tmp_path), max_shard_size=SHARD_SIZE).write(tmp_path / "merged").folder
    before = contents(folder)
    method, part = STEPS[step]
    pull(hub, part, method, 7_000 if step == "upload" else 0)
    committed = step == "commit" and pull is not shut_down  # the work was done, and only its answer is lost
    with soon():
        if committed:
            publishing.push(folder, to())  # looks at the branch, and finds it there
        elif step == "create" and pull is not shut_down:
            publishing.push(folder, to())  # likewise
        else:
            with pytest.raises(HubError, match=r"[Cc]heck it and run again|the next push"):
                publishing.push(folder, to())
            assert REPO not in hub.repos or remote(hub) in ({}, before if step == "commit" else {})
    assert contents(folder) == before and not inspect(folder).findings
    with back(hub, monkeypatch, tmp_path) as again:
        publishing.push(folder, to())
        assert remote(again) == before and len(again.repos[REPO].log) == 2


def test_under_shards_that_leave_as_they_are_made(hub: HubServer, tmp_path: Path, pull: Pull, monkeypatch: Any) -> None:
    recipe = write_recipe(tmp_path)
    expected = contents(Merge(recipe, max_shard_size=SHARD_SIZE).write(tmp_path / "whole" / "merged").folder)

    def stream(resume: bool = False) -> None:
        upload = Upload(to(), streamed=True)
        merge = Merge(recipe, max_shard_size=SHARD_SIZE, num_workers=1)
        merge.write(tmp_path / "merged", resume=resume, stream=upload.stream)

    hub.fault("/upload/", method="PUT", times=1)  # the first goes well
    pull(hub, "/upload/", "PUT", 7_000)
    with soon(), pytest.raises(HubError, match=r"[Cc]heck it and run again"):
        stream()
    assert remote(hub) == {} and not (tmp_path / "merged").exists()
    with back(hub, monkeypatch, tmp_path) as again:
        stream(resume=True)
        assert remote(again) == expected
        assert sum(r.method == "PUT" for r in again.requests) == 2  # of three: the first is not sent again
