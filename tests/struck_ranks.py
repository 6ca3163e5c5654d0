"""A run of torchrun in which a signal strikes rank 1, in the midst of its work."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

PATIENCE = 3.0  # seconds
_PROGRAM = """
import importlib, os
from ctl_merge import cli, heartbeat

heartbeat.EVERY, heartbeat.PATIENCE, calls = 0.2, {patience}, 0
owner = importlib.import_module("{module}")
for name in "{place}".split(".")[:-1]:
    owner = getattr(owner, name)
real = getattr(owner, "{place}".split(".")[-1])

def counted(*arguments, **options):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 3:
        os.kill(os.getpid(), {number})
    return real(*arguments, **options)

setattr(owner, "{place}".split(".")[-1], counted)
cli.main()
"""


def struck(folder: Path, number: signal.Signals, place: str, arguments: list[str], count: int = 2) -> tuple[int, str]:
    """The exit code and the standard error of a run whose rank 1 is struck at the third call of `module:function`."""
    module, _, function = place.partition(":")
    program = folder / "struck.py"
    program.write_text(_PROGRAM.format(patience=PATIENCE, module=module, place=function, number=int(number)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), str(program), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if "no sign of life" in line:  # torchrun would give the stopped one half a minute to end
            for rank in psutil.Process(process.pid).children():
                if rank.status() == psutil.STATUS_STOPPED:
                    rank.kill()
    return process.wait(timeout=60), "".join(said)
