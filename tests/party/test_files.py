"""Files of a relying party: durable, closed to others, and read no further than they may be long."""

from __future__ import annotations

import os
import stat
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cloister.cli.infer import _write
from cloister.errors import UsageError
from cloister.owner.desk import Desk
from cloister.party import files
from cloister.party.memory import Memory


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was made durable: the content of a file, or what a folder listed then."""
    found: list[object] = []
    sync = os.fsync

    def record(descriptor: int) -> None:
        sync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        found.append({each.name: each.read_bytes() for each in path.iterdir()} if is_folder else "file")

    monkeypatch.setattr(os, "fsync", record)
    return found


def test_a_new_file_lasts_with_its_name(tmp_path: Path, synced: list[object]) -> None:
    files.create(tmp_path / "key", b"new")
    assert synced == ["file", {"key": b"new"}]


def test_a_replaced_file_lasts_with_its_name(tmp_path: Path, synced: list[object]) -> None:
    (tmp_path / "key").write_bytes(b"old")
    files.replace(tmp_path / "key", b"new")
    assert synced == ["file", {"key": b"new"}]


def test_what_may_not_last_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "no disk")

    monkeypatch.setattr(os, "fsync", fail)
    for write in (files.create, files.replace):
        with pytest.raises(OSError, match="no disk"):
            write(tmp_path / "key", b"new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reader", ["secret", "memory", "model"])
def test_a_file_of_any_length_is_read_to_its_limit(tmp_path: Path, reader: str) -> None:
    desk = Desk.create(tmp_path / "desk")
    path = {
        "secret": tmp_path / "secret",
        "memory": tmp_path / "memory",
        "model": desk._path("digits"),
    }[reader]
    with path.open("wb") as file:
        file.truncate(256 << 20)
    tracemalloc.start()
    try:
        if reader == "secret":
            assert files.read_secret(path, "label", 32) is None
        else:
            with pytest.raises(UsageError):
                Memory.load(path) if reader == "memory" else desk.model("digits")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


@pytest.mark.parametrize("there", [False, True])
def test_nobody_else_reads_outputs(tmp_path: Path, there: bool) -> None:
    """Nor whoever opened a file of that name before."""
    path = tmp_path / "outputs.npz"
    if there:
        path.write_bytes(b"old")
        path.chmod(0o644)
    with (path if there else Path(os.devnull)).open("rb") as before:
        _write(path, {"y": np.arange(3)})
        assert before.read() == (b"old" if there else b"")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(np.load(path)["y"]) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_outputs_may_go_into_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        _write(tmp_path / "pipe", {"y": np.arange(3)})
        assert os.read(reader, 4).startswith(b"PK")
    finally:
        os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_outputs_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        _write(tmp_path / "none" / "outputs.npz", {"y": np.arange(3)})
    assert caught.value.code == "file.write"
