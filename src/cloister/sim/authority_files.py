"""The simulated authority on disk: a folder of keys and certificates in PEM, and the platform's secret.

::

    simulated-authority/<role>.key.pem    private key, mode 600
    simulated-authority/<role>.pem        its certificate
    simulated-authority/platform.secret   32 B, mode 600
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from cloister.core.secret import Secret
from cloister.errors import UsageError

FOLDER: Final = "simulated-authority"  # inside the data directory
SECRET_SIZE: Final = 32  # bytes

_SECRET: Final = "platform.secret"  # a file name  # noqa: S105


def write(directory: Path, parts: Mapping[str, tuple[bytes, bytes]], secret: Secret) -> None:
    """Keep a new authority, all or nothing; keys are readable by the owner only.

    Args:
        directory: The data directory; made if it doesn't exist.
        parts: Private key and certificate in PEM, by role.
        secret: Of the platform, 32 B.

    Raises:
        UsageError: there already is one, or the directory can't be written.
    """
    target = directory / FOLDER
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=directory))  # 0700
        try:
            for role, (key, certificate) in parts.items():
                _write_private(draft / f"{role}.key.pem", key)
                (draft / f"{role}.pem").write_bytes(certificate)
            _write_private(draft / _SECRET, secret.reveal())
            draft.rename(target)  # a second creator fails here
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"the simulated authority can't be written to {target}: {error.strerror}",
            code="sim.authority",
            hint="Is there one already?",
        ) from error


def read(directory: Path, roles: Iterable[str]) -> tuple[dict[str, tuple[bytes, bytes]], Secret]:
    """Private key and certificate in PEM by role, and the platform's secret.

    Raises:
        UsageError: there is none, a part of it is missing, or others can read its keys.
    """
    folder = directory / FOLDER
    try:
        parts = {
            role: (_private(folder / f"{role}.key.pem"), (folder / f"{role}.pem").read_bytes())
            for role in roles
        }
        secret = Secret(_private(folder / _SECRET))
    except OSError as error:
        raise UsageError(
            f"there is no simulated authority in {directory}: {error.strerror}", code="sim.authority"
        ) from error
    if len(secret) != SECRET_SIZE:
        raise damaged(directory)
    return parts, secret


def damaged(directory: Path) -> UsageError:
    """The error of an authority that can't be restored. Give it no cause: a parser's could quote a key."""
    return UsageError(f"the simulated authority in {directory / FOLDER} is damaged", code="sim.authority")


def _write_private(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _private(path: Path) -> bytes:
    if path.stat().st_mode & 0o077:
        raise UsageError(
            f"{path} can be read by others", code="sim.authority", expected="mode 600", hint="chmod 600 it."
        )
    return path.read_bytes()
