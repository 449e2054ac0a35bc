"""The collateral folder on a host's disk: what enclaves read, each file whole or not at all."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.errors import UsageError

FOLDERS: Final = ("sgx", "tdx", "snp")
FILE_MODE: Final = 0o644  # nothing in it is secret, and enclaves may run as another user
FOLDER_MODE: Final = 0o755


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file: its name relative to the folder, mode, size in bytes, and age in seconds."""

    name: str
    mode: int
    size: int
    age: int


class CollateralFolder:
    """A folder as `cloister.core.verifier.collateral_key` lays it out; made at the first write."""

    def __init__(self, root: Path) -> None:
        """Name the folder; nothing is touched."""
        self.root: Final = root

    def write(self, name: str, content: bytes) -> Entry:
        """Put a file in place: a reader finds the old content or the new, also after a crash.

        Raises:
            UsageError: the folder can't be written.
        """
        path = self.root / name
        fresh = path.with_name(f".{path.name[-64:]}.{os.getpid()}")
        try:
            for folder in (self.root, path.parent):
                folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            try:
                _write_durably(fresh, content)
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
            _sync_folder(path.parent)
        except OSError as error:
            raise UsageError(
                "the collateral folder can't be written",
                code="collateral.folder",
                claim=str(path),
                actual=error.strerror,
            ) from error
        return self._entry(path)

    def find(self, name: str) -> Entry | None:
        """One file, or None where it isn't there."""
        path = self.root / name
        return self._entry(path) if path.is_file() else None

    def entries(self) -> Iterator[Entry]:
        """Every file, by name."""
        for folder in FOLDERS:
            for path in sorted((self.root / folder).glob("[!.]*")):
                if path.is_file():
                    yield self._entry(path)

    def _entry(self, path: Path) -> Entry:
        status = path.stat()
        return Entry(
            name=path.relative_to(self.root).as_posix(),
            mode=stat.S_IMODE(status.st_mode),
            size=status.st_size,
            age=max(0, int(time.time() - status.st_mtime)),
        )


def _write_durably(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # a process of this number may have died here
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), FILE_MODE)  # whatever the umask took away
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
