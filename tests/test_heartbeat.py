"""Ranks that vanish without a word are missed; those that work long are not."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from struck_ranks import struck
from test_ranks import alone, contents, family, text, torchrun
from torch.distributed import TCPStore

from ctl_merge import heartbeat
from ctl_merge.errors import DeviceError
from ctl_merge.heartbeat import Heartbeat


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """Where ranks met; a rank is missed after 0.4 seconds."""
    monkeypatch.setattr(heartbeat, "EVERY", 0.02)
    monkeypatch.setattr(heartbeat, "_TURN", 0.1)
    monkeypatch.setattr(heartbeat, "PATIENCE", 0.4)
    monkeypatch.setattr(heartbeat.atexit, "register", lambda end: None)  # it would end this process
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


@pytest.fixture
def ranks(store: TCPStore) -> Iterator[list[Heartbeat]]:
    ranks = [Heartbeat(index, ["here", "there", "elsewhere"]) for index in range(3)]
    yield ranks
    for rank in ranks:
        rank.stop()


def never() -> None:
    threading.Event().wait()


def test_a_rank_that_works_for_long_is_waited_for(ranks: list[Heartbeat]) -> None:
    def after_a_while() -> str:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:  # holds the interpreter as a rank's work does
            pass
        return "done"

    assert ranks[0].during(after_a_while) == "done"
    assert not ranks[0].lost


def test_a_rank_without_signs_of_life_is_named_with_its_machine(ranks: list[Heartbeat]) -> None:
    ranks[1].stop()
    for rank in (ranks[0], ranks[2]):
        with pytest.raises(DeviceError, match="no sign of life for 0.00667 minutes from rank 1 on there:.*--resume"):
            rank.during(never)
        assert rank.lost


def test_all_that_vanished_are_named(ranks: list[Heartbeat]) -> None:
    ranks[1].stop()
    ranks[2].stop()
    time.sleep(0.1)  # so that both have given their last sign
    with pytest.raises(DeviceError, match="from rank 1 on there and rank 2 on elsewhere"):
        ranks[0].during(never)


def test_where_the_store_is_silent_its_machine_is_named(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        monkeypatch.setenv("MASTER_PORT", str(silent.getsockname()[1]))
        lonely = Heartbeat(1, ["here", "there"])
        with pytest.raises(DeviceError, match=r"from the machine that the ranks met on \(127.0.0.1\)"):
            lonely.during(never)


def test_what_the_collective_raises_is_raised(ranks: list[Heartbeat]) -> None:
    with pytest.raises(ZeroDivisionError):
        ranks[0].during(lambda: 1 / 0)


@pytest.mark.launchers
def test_a_rank_that_vanishes_ends_a_merge_and_another_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text("ties", family(tmp_path), density=0.4, trim="model"))
    output = tmp_path / "many" / "merged"
    expected = alone(path.read_text(), tmp_path / "one" / "merged")
    arguments = torchrun(2, path, output)[7:]
    code, said = struck(tmp_path, signal.SIGSTOP, "ctl_merge.writer:ShardWriter._write_tensor", arguments)
    assert code != 0 and "error: no sign of life" in said and f"rank 1 on {socket.gethostname()}" in said
    assert not output.exists()
    again = subprocess.run(torchrun(2, path, output, "--resume", "--json"), check=True, capture_output=True, text=True)
    assert json.loads(again.stdout)["method"] == "ties"
    assert contents(output) == expected
