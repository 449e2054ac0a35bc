"""Nothing that a test run started outlives it."""

from __future__ import annotations

import os

import pytest

from support import keeper

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime opens a file of its own at its import

_KEEPER = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEEPER] = keeper.start()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for pid, command in keeper.left(keeper.mark()).items():
        if not command:
            continue  # it ended while it was looked at
        terminalreporter.write_line(f"a test left process {pid} behind: {command[:200]}", yellow=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    started = config.stash.get(_KEEPER, None)
    if started is not None:
        keeper.stop(started)
