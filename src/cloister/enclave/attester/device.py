"""What the attesters share: system calls behind one small interface, bounded reading, derived keys.

A `Kernel` stands between an attester and its device, so that tests can put one in that behaves as Linux does,
failures included. Whatever a device says is bounded before it is kept.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.core.secret import Secret
from cloister.errors import FormatError, Unavailable, UsageError

REPORT_DATA_SIZE: Final = 64  # bytes
SEALING_KEY_SIZE: Final = 32  # bytes
_CHUNK: Final = 4096  # bytes


class Kernel(Protocol):
    """The system calls that attesters make; each raises OSError as Linux would."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor."""

    def read(self, descriptor: int, size: int) -> bytes:
        """At most ``size`` bytes; empty at the end."""

    def write(self, descriptor: int, data: bytes) -> int:
        """How many bytes were taken."""

    def close(self, descriptor: int) -> None:
        """Give a descriptor back."""

    def mkdir(self, path: Path) -> None:
        """Make a folder."""

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> None:
        """Call a device; it may change ``argument`` and the buffers whose addresses stand there."""


class Linux:
    """The system's own calls."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor, closed on exec."""
        return os.open(path, flags | os.O_CLOEXEC)

    def read(self, descriptor: int, size: int) -> bytes:
        """At most ``size`` bytes."""
        return os.read(descriptor, size)

    def write(self, descriptor: int, data: bytes) -> int:
        """How many bytes were taken."""
        return os.write(descriptor, data)

    def close(self, descriptor: int) -> None:
        """Give a descriptor back."""
        os.close(descriptor)

    def mkdir(self, path: Path) -> None:
        """Make a folder for this user alone."""
        path.mkdir(mode=0o700)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> None:
        """Call a device."""
        fcntl.ioctl(descriptor, request, argument)


LINUX: Final = Linux()


class Buffer:
    """Memory with an address, for what a device reads or writes behind a pointer."""

    def __init__(self, size: int, content: bytes = b"") -> None:
        self._memory = ctypes.create_string_buffer(content, size)

    @property
    def address(self) -> int:
        """Where it lies."""
        return ctypes.addressof(self._memory)

    def content(self, size: int) -> bytes:
        """Its first bytes."""
        return ctypes.string_at(self._memory, min(size, len(self._memory)))

    def wipe(self) -> None:
        """Overwrite it with zeros."""
        ctypes.memset(self._memory, 0, len(self._memory))


@contextmanager
def opened(kernel: Kernel, path: Path, flags: int) -> Iterator[int]:
    """A descriptor for as long as it is needed. Raises OSError, also where closing fails."""
    descriptor = kernel.open(path, flags)
    try:
        yield descriptor
    finally:
        kernel.close(descriptor)


def read_file(kernel: Kernel, path: Path, limit: int, what: str) -> bytes:
    """A pseudo-file's content, however the kernel cuts it.

    Raises:
        FormatError: more than ``limit`` bytes.
        OSError: whatever the kernel says.
    """
    data = bytearray()
    with opened(kernel, path, os.O_RDONLY) as descriptor:
        while part := kernel.read(descriptor, min(_CHUNK, limit + 1 - len(data))):
            data += part
            if len(data) > limit:
                raise FormatError(
                    f"the TEE's {what} is too long",
                    code="attester.answer",
                    claim=what,
                    expected=f"at most {limit} B",
                    actual="more",
                )
    return bytes(data)


def write_file(kernel: Kernel, path: Path, data: bytes) -> None:
    """Write a pseudo-file in one call, since each call is a value of its own; raises OSError."""
    with opened(kernel, path, os.O_WRONLY) as descriptor:
        if kernel.write(descriptor, data) != len(data):
            raise OSError(errno.EIO, "the kernel took a part only")


def require_report_data(report_data: bytes) -> None:
    """Refuse report data of another length than 64 bytes; raises UsageError."""
    if len(report_data) != REPORT_DATA_SIZE:
        raise UsageError(
            "report data has the wrong length",
            code="attester.report-data",
            claim="report_data",
            expected=f"{REPORT_DATA_SIZE} B",
            actual=f"{len(report_data)} B",
        )


def require_own(found: bytes, report_data: bytes) -> None:
    """Refuse evidence that was made for somebody else's report data; raises FormatError."""
    if found != report_data:
        raise FormatError(
            "the TEE gave evidence over other report data",
            code="attester.answer",
            claim="report data",
            expected=report_data.hex(),
            actual=found.hex(),
        )


def derive_sealing_key(root: bytes, tee: str) -> Secret:
    """The 32-byte sealing key from a TEE's own measurement-bound key (HKDF-SHA256)."""
    info = b"cloister/v1/sealing-key/" + tee.encode()
    return Secret(HKDF(algorithm=hashes.SHA256(), length=SEALING_KEY_SIZE, salt=None, info=info).derive(root))


def no_sealing_key(tee: str) -> UsageError:
    """The error of a TEE that has no key for exactly one measurement."""
    return UsageError(
        f"{tee} gives no key that is bound to this enclave's measurement",
        code="attester.sealing-key",
        claim="sealing key",
        expected="a TEE with measurement-bound keys (SGX, SEV-SNP)",
        actual=tee,
        hint="Run the key service on SGX or SEV-SNP, or wait for recovery by custodians; workers need none",
    )


def silent(what: str, error: OSError, hint: str = "") -> Unavailable:
    """The error of a TEE that did not answer, naming the system's own error."""
    reason = errno.errorcode.get(error.errno or 0, "unknown error")
    return Unavailable(
        f"{what} failed: {reason}", code="attester.refused", claim=what, actual=reason, hint=hint
    )
