"""Files of a relying party: whole or not at all, durable, and closed to others where they hold secrets."""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cloister.core.secret import Secret

_MAX_SECRET_FILE: Final = 4096  # bytes


def create(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a file that isn't there yet; after a crash it is still there.

    Raises:
        OSError: FileExistsError where it is there; whatever else the system says.
    """
    _write(path, content, mode)
    try:
        _sync_folder(path.parent)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def replace(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a file so that a reader finds the old content or the new, also after a crash; raises OSError."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)  # a process of this number may have died here
    _write(fresh, content, mode)
    try:
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    _sync_folder(path.parent)


def read_start(path: Path, size: int) -> bytes:
    """The first ``size`` bytes of a file, or all where it has fewer; raises OSError."""
    with path.open("rb") as file:
        return file.read(size)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder meanwhile; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def create_secret(path: Path, label: str, secret: Secret) -> None:
    """Keep a secret in a new file of one line: its label and base64; makes the folder; raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    create(path, f"{label} {base64.b64encode(secret.reveal()).decode()}\n".encode())


def read_secret(path: Path, label: str, size: int) -> Secret | None:
    """The secret of ``size`` bytes that `create_secret` kept under a label; None where the file is another.

    Raises:
        OSError: it can't be read.
    """
    words = read_start(path, _MAX_SECRET_FILE).split()
    if len(words) != 2 or words[0] != label.encode():
        return None
    try:
        raw = base64.b64decode(words[1], validate=True)
    except binascii.Error:
        return None
    return Secret(raw) if len(raw) == size else None


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a new file, whole or not at all; raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
