"""A run of tests that is killed outright leaves nothing running."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import keeper

TESTS = Path(__file__).resolve().parents[1]
# A child, one that left the session and was orphaned, and one that was given another environment.
STARTS = """
import os, pathlib, subprocess, time

def test_starts():
    subprocess.Popen(["sleep", "331"])
    subprocess.run(["sh", "-c", "setsid sleep 331 >/dev/null 2>&1 &"])
    subprocess.Popen(["sh", "-c", "env -i sleep 331; true"])
    pathlib.Path("started").touch()
    time.sleep({seconds})
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="cl-"))  # short: Unix sockets lie below it
    yield made
    shutil.rmtree(made, ignore_errors=True)


def run_tests(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """pytest in a process of its own, with our conftest."""
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def eventually(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def below(folder: Path) -> dict[int, str]:
    """Processes that run in a folder, such as all that `run_tests` leads to; pid -> command."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def sleepers(folder: Path) -> list[int]:
    return [pid for pid, command in below(folder).items() if command == "sleep 331 "]


def started(folder: Path, seconds: int) -> subprocess.Popen[bytes]:
    (folder / "test_starts.py").write_text(STARTS.format(seconds=seconds))
    return run_tests(folder, "-p", "conftest", "test_starts.py")


def test_a_killed_run_leaves_nothing(folder: Path) -> None:
    run = started(folder, 300)
    eventually(lambda: (folder / "started").exists() and len(sleepers(folder)) == 3, "the test runs")
    run.send_signal(signal.SIGKILL)
    run.wait()
    eventually(lambda: not below(folder), "what it started ended", 10)


def test_a_run_that_ends_leaves_nothing(folder: Path) -> None:
    assert started(folder, 0).wait(60) == 0
    assert sleepers(folder) == []


def test_without_the_keeper_there_would_be_leftovers(folder: Path) -> None:
    """The tests above can fail."""
    (folder / "test_starts.py").write_text(STARTS.format(seconds=0))
    assert run_tests(folder, "test_starts.py").wait(60) == 0
    pids = sleepers(folder)
    assert len(pids) == 3
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_a_killed_run_leaves_no_service(folder: Path) -> None:
    """The README's example starts `cloister up`, which starts a gateway, launchers and enclaves."""
    name = "test_the_readme_example_runs_as_written"
    run = run_tests(folder, "-c", str(TESTS.parent / "pyproject.toml"), f"{TESTS}/docs/test_docs.py::{name}")
    eventually(lambda: len(below(folder)) >= 5, "the service starts")
    time.sleep(0.5)
    seen = below(folder)
    assert any(" up " in command for command in seen.values())
    run.send_signal(signal.SIGKILL)
    run.wait()
    eventually(lambda: not below(folder), "the service ended", 10)


def test_a_run_knows_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keeper.mark()
    child = subprocess.Popen(["sleep", "331"])
    try:
        eventually(lambda: child.pid in keeper.left(keeper.mark()), "it has the mark", 5)
        assert os.getpid() not in keeper.left(keeper.mark())
        assert keeper.left("") == {}
    finally:
        child.kill()
        child.wait()
