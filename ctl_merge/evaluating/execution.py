"""Programs that a model wrote, run under limits.

No security boundary: a determined program may do what the user may. It is meant for code that is wrong, not hostile.
Each program runs in a process and folder of its own, with limits on time, memory, files and processes, an empty
environment, and where the kernel lets an ordinary user have namespaces (`unshare`) without network and in a process
namespace that ends with it.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

_MB = 1 << 20
_FILE_MB, _PROCESSES, _OUTPUT = 16, 64, 4096
# The child limits itself, then runs the program. What it prints at the end, a program that leaves early cannot: a call
# of exit(0) before the tests is not a pass.
_CHILD = """
import os, resource, sys
seconds, memory, files, processes = map(int, sys.argv[1:5])
said = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for stream in (1, 2):
    os.dup2(null, stream)
token, source = sys.stdin.read().split("\\n", 1)
os.dup2(null, 0)
limits = {"CPU": seconds + 1, "AS": memory, "FSIZE": files, "NPROC": processes, "NOFILE": 64, "CORE": 0}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
try:
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})
except BaseException as error:
    os.write(said, f"{type(error).__name__}: {error}".encode(errors="replace")[:500])
    os._exit(1)
os.write(said, token.encode())
os._exit(0)
"""


def run_all(programs: Sequence[str], timeout: float, memory: int, workers: int) -> list[str]:
    """Why each program failed; an empty text where it ran to its end. `timeout` in seconds, `memory` in MB."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(lambda source: run(source, timeout, memory), programs))


def run(source: str, timeout: float = 5.0, memory: int = 1024) -> str:
    """Run one program: why it failed, or an empty text."""
    token = secrets.token_hex(16)
    limits = [max(1, round(timeout)), memory * _MB, _FILE_MB * _MB, _PROCESSES]
    with tempfile.TemporaryDirectory(prefix="ctl-merge-program-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [*_isolation(), sys.executable, "-I", "-c", _CHILD, *map(str, limits)], cwd=folder, text=True,
            errors="replace", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8"}, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(f"{token}\n{source}", timeout)
        except subprocess.TimeoutExpired:
            return f"took more than {timeout:g} s"
        finally:
            _end(process)
    if said == token:
        return ""
    return said[:_OUTPUT] or f"ended early (exit code {process.returncode})"


def _end(process: subprocess.Popen) -> None:
    """End the program and all of its group, also where it has ended and left others behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


@functools.cache
def _isolation() -> tuple[str, ...]:
    """The command that gives a program namespaces of its own, where that is possible."""
    tool = shutil.which("unshare")
    command = (tool or "", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--")
    try:
        done = tool and subprocess.run([*command, "true"], capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        done = False
    return command if done else ()


def isolated() -> bool:
    """Whether programs run without network."""
    return bool(_isolation())
