"""Whatever a test run starts ends with the run, also where the run is killed outright.

`start` marks this process's environment, which everything inherits that is started from now on, and starts a
keeper beside it. The keeper waits for this process's end, then kills what has the mark, and its descendants.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

MARK = "CLOISTER_TEST_RUN"
_ROUNDS = 200  # of killing; what is being started meanwhile is found by the next one
_PAUSE = 0.02  # seconds


def start() -> subprocess.Popen[bytes]:
    """Start a keeper of this process; whoever calls this ends it (`stop`), or lets it do its work."""
    mark = uuid.uuid4().hex
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # else what kills a process group or presses Ctrl-C ends the keeper, too
        cwd="/",
    )
    assert keeper.stdout is not None
    ready = keeper.stdout.readline()
    keeper.stdout.close()
    assert ready == b"ready\n", "the keeper did not start"
    os.environ[MARK] = f"{os.environ.get(MARK, '')}/{mark}"  # a run inside another has both marks
    return keeper


def stop(keeper: subprocess.Popen[bytes]) -> None:
    """End what is left, and the keeper."""
    outer, _, mark = os.environ[MARK].rpartition("/")
    sweep(mark)
    os.environ[MARK] = outer
    keeper.terminate()
    keeper.wait(10)


def mark() -> str:
    """This run's."""
    return os.environ.get(MARK, "").rpartition("/")[2]


def left(mark: str) -> dict[int, str]:
    """Processes that have the mark, and their descendants: pid -> command."""
    processes = {int(entry.name): entry for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found = {pid for pid, path in processes.items() if mark in _marks(path)}
    children: dict[int, set[int]] = {}
    for pid, path in processes.items():
        fields = _read(path / "stat").rpartition(b")")[2].split()
        if fields and fields[0] != b"Z":
            children.setdefault(int(fields[1]), set()).add(pid)
    pending = list(found)
    while pending:
        more = children.get(pending.pop(), set()) - found
        found |= more
        pending += more
    found.discard(os.getpid())
    return {
        pid: _read(processes[pid] / "cmdline").replace(b"\0", b" ").decode(errors="replace") for pid in found
    }


def sweep(mark: str) -> None:
    """Kill what has the mark, until nothing has it."""
    for _ in range(_ROUNDS):
        found = left(mark)
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE)


def _marks(process: Path) -> list[str]:
    for entry in _read(process / "environ").split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == MARK.encode():
            return value.decode(errors="replace").split("/")[1:]
    return []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended, or is another user's
        return b""


def _keep(pid: int, mark: str) -> None:
    run = os.pidfd_open(pid)
    if os.getppid() != pid:  # the run was over before we looked: that is another process's number now
        return
    sys.stdout.write("ready\n")
    sys.stdout.close()
    select.select([run], [], [])
    sweep(mark)


if __name__ == "__main__":
    _keep(int(sys.argv[1]), sys.argv[2])
