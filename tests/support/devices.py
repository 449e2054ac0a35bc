"""Kernels for attesters to talk to: each behaves as Linux, or Gramine, does with one TEE, failures included.

What they do is taken from the sources: Gramine's ``libos/src/fs/dev/attestation.c``, Linux's
``drivers/virt/coco/guest/report.c`` with ``fs/configfs/file.c``, ``drivers/virt/coco/sev-guest`` and
``drivers/misc/nsm.c``. A test sets the failure that it wants.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import cbor2

from cloister.core.evidence.snp import REPORT_SIZE

ROOT: Final = Path("/machine")
MAX_TSM_INBLOB: Final = 64
MAX_TSM_OUTBLOB: Final = 32 << 10
MAX_SEV_CERTIFICATES: Final = 0x4000
MAX_NSM_REQUEST: Final = 0x1000


@dataclass
class _Handle:
    path: str
    content: bytes | None = None
    offset: int = 0
    pending: bytes = b""
    wrote: bool = False


class FakeKernel:
    """Descriptors and bounded reads; a subclass says what lies behind the paths.

    Attributes:
        short: Most bytes that one read gives.
        failures: For a call's name, the errors that its next calls raise.
    """

    def __init__(self) -> None:
        self.short = 1 << 20
        self.failures: dict[str, list[int]] = {}
        self.handles: dict[int, _Handle] = {}
        self._next = 100

    def load(self, path: str) -> bytes:
        raise OSError(errno.ENOENT, path)

    def store(self, path: str, data: bytes) -> None:
        raise OSError(errno.ENOENT, path)

    def exists(self, path: str) -> bool:
        return True

    def open(self, path: Path, flags: int) -> int:
        name = path.relative_to(ROOT).as_posix()
        self.fail("open", name)
        if not self.exists(name):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        self._next += 1
        self.handles[self._next] = _Handle(name)
        return self._next

    def read(self, descriptor: int, size: int) -> bytes:
        handle = self.handles[descriptor]
        self.fail("read", handle.path)
        if handle.content is None:
            handle.content = self.load(handle.path)
        part = handle.content[handle.offset : handle.offset + min(size, self.short)]
        handle.offset += len(part)
        return part

    def write(self, descriptor: int, data: bytes) -> int:
        handle = self.handles[descriptor]
        self.fail("write", handle.path)
        self.store(handle.path, data)
        return len(data)

    def close(self, descriptor: int) -> None:
        del self.handles[descriptor]

    def mkdir(self, path: Path) -> None:
        raise OSError(errno.EPERM, str(path))

    def rmdir(self, path: Path) -> None:
        raise OSError(errno.EPERM, str(path))

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> None:
        raise OSError(errno.ENOTTY, "no such ioctl")

    def fail(self, call: str, path: str = "") -> None:
        """Raise the next error that the test has set for ``call`` or for ``call name``."""
        for key in (call, f"{call} {path.rpartition('/')[2]}"):
            queued = self.failures.get(key, [])
            if queued and (number := queued.pop(0)):
                raise OSError(number, os.strerror(number), path)


class GramineKernel(FakeKernel):
    """``/dev/attestation`` of Gramine: one report data for the process, padded or cut to 64 bytes."""

    def __init__(self, quote: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self.quote = quote
        self.kind = b"dcap"
        self.key = bytes(range(16))
        self.report_data = bytes(64)
        self.taken: int | None = None  # bytes that a write takes, where not all
        self.target: bytes | None = None  # instead of what the quotes say

    def target_info(self) -> bytes:
        """TARGETINFO of this process: MRENCLAVE and ATTRIBUTES as in its quotes."""
        if self.target is not None:
            return self.target
        quote = self.quote(bytes(64))
        return (quote[112:144] + quote[96:112]).ljust(512, b"\0")

    def exists(self, path: str) -> bool:
        return path != "dev/attestation/quote" or self.kind != b"none"

    def load(self, path: str) -> bytes:
        if path == "dev/attestation/attestation_type":
            return self.kind
        if path == "dev/attestation/my_target_info":
            return self.target_info()
        if path == "dev/attestation/quote":
            return self.quote(self.report_data)
        if path == "dev/attestation/keys/_sgx_mrenclave":
            return self.key
        return super().load(path)

    def store(self, path: str, data: bytes) -> None:
        assert path == "dev/attestation/user_report_data"
        self.report_data = data[:64].ljust(64, b"\0")

    def write(self, descriptor: int, data: bytes) -> int:
        count = super().write(descriptor, data)
        return count if self.taken is None else self.taken


@dataclass
class _Report:
    inblob: bytes = b""
    level: int = 0
    writes: int = 0
    made_at: int = -1
    outblob: bytes = b""
    auxblob: bytes = b""


class TsmKernel(FakeKernel):
    """configfs-tsm. A binary attribute is written when it is closed, and errors of that are lost.

    Attributes:
        provider: Name of the driver, or None where none is loaded.
        floor: Least privilege level, or None where the provider has no levels.
        meddled: How many reports somebody else writes to while they are made.
        dropped: How many writes of ``inblob`` are lost at close.
        answers: Errors that making a report raises, one a time.
    """

    def __init__(
        self,
        provider: str | None,
        make: Callable[[bytes, int], tuple[bytes, bytes]],
        *,
        floor: int | None = None,
    ) -> None:
        super().__init__()
        self.provider = provider
        self.make = make
        self.floor = floor
        self.meddled = 0
        self.dropped = 0
        self.answers: list[int] = []
        self.reports: dict[str, _Report] = {}
        self.made: list[str] = []

    def mkdir(self, path: Path) -> None:
        name = path.relative_to(ROOT).as_posix()
        self.fail("mkdir", name)
        assert name.startswith("sys/kernel/config/tsm/report/")
        if self.provider is None:
            raise OSError(errno.ENXIO, "no provider")
        if name in self.reports:
            raise OSError(errno.EEXIST, name)
        self.reports[name] = _Report()
        self.made.append(name)

    def rmdir(self, path: Path) -> None:
        name = path.relative_to(ROOT).as_posix()
        self.fail("rmdir", name)
        del self.reports[name]

    def exists(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder not in self.reports:
            return False
        if name in ("privlevel", "privlevel_floor"):
            return self.floor is not None
        return name in ("generation", "provider", "inblob", "outblob", "auxblob")

    def load(self, path: str) -> bytes:
        folder, _, name = path.rpartition("/")
        report = self.reports[folder]
        if name == "generation":
            return b"%d\n" % report.writes
        if name == "provider":
            return f"{self.provider}\n".encode()
        if name == "privlevel_floor":
            return b"%d\n" % (self.floor or 0)
        self._generate(report)
        blob = report.outblob if name == "outblob" else report.auxblob
        if len(blob) > MAX_TSM_OUTBLOB:
            raise OSError(errno.EFBIG, name)
        return blob

    def _generate(self, report: _Report) -> None:
        if not report.inblob:
            raise OSError(errno.EINVAL, "nothing was written")
        if report.made_at == report.writes:
            return
        if self.answers and (number := self.answers.pop(0)):
            raise OSError(number, os.strerror(number))
        if len(report.inblob) != 64:
            raise OSError(errno.EINVAL, "wrong length")
        if report.level < (self.floor or 0):
            raise OSError(errno.EINVAL, "a level of somebody else")
        report.outblob, report.auxblob = self.make(report.inblob, report.level)
        report.made_at = report.writes
        if self.meddled:
            self.meddled -= 1
            report.writes += 1

    def store(self, path: str, data: bytes) -> None:
        folder, _, name = path.rpartition("/")
        report = self.reports[folder]
        if name == "privlevel":
            if not (self.floor or 0) <= int(data) <= 3:
                raise OSError(errno.EINVAL, "level")
            report.level, report.writes = int(data), report.writes + 1
        elif name == "inblob":
            if len(data) > MAX_TSM_INBLOB:
                raise OSError(errno.EFBIG, "inblob")
        else:
            raise OSError(errno.EACCES, name)

    def write(self, descriptor: int, data: bytes) -> int:
        count = super().write(descriptor, data)
        handle = self.handles[descriptor]
        handle.pending, handle.wrote = handle.pending + data, True
        return count

    def close(self, descriptor: int) -> None:
        handle = self.handles[descriptor]
        super().close(descriptor)
        folder, _, name = handle.path.rpartition("/")
        if name == "inblob" and handle.wrote:
            if self.dropped:
                self.dropped -= 1
                return
            report = self.reports[folder]
            report.inblob, report.writes = handle.pending, report.writes + 1


_SEV: Final = struct.Struct("=B7xQQII")


class SevGuestKernel(FakeKernel):
    """``/dev/sev-guest``. After an error of the firmware the driver forgets its key and answers ENOTTY.

    Attributes:
        table: What the host copies into the certificate buffer.
        level: What ``/sys`` says of the VMPL; None on older kernels.
        status: What the firmware answers with.
        size: Length that the firmware gives its report, where it isn't the report's.
        broken: (errno, firmware error, hypervisor error) of the next request.
        codes: The requests that came.
    """

    def __init__(
        self, make: Callable[[bytes, int], bytes], *, table: bytes = b"", key: bytes = b"k" * 32
    ) -> None:
        super().__init__()
        self.make = make
        self.table = table
        self.key = key
        self.level: bytes | None = b"0\n"
        self.status = 0
        self.size: int | None = None
        self.broken: tuple[int, int, int] | None = None
        self.disabled = False
        self.codes: list[int] = []
        self.key_requests: list[tuple[int, ...]] = []
        self.response_addresses: list[tuple[int, int]] = []

    def exists(self, path: str) -> bool:
        return path == "dev/sev-guest" or (
            path == "sys/devices/system/cpu/sev/vmpl" and self.level is not None
        )

    def load(self, path: str) -> bytes:
        return self.level or b""

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> None:
        assert self.handles[descriptor].path == "dev/sev-guest"
        self.codes.append(request)
        assert len(argument) == (request >> 16) & 0x3FFF
        version, asked, answer, _, _ = _SEV.unpack(argument)
        if not version or not asked or not answer:
            raise OSError(errno.EINVAL, "version or address")
        if self.disabled:
            raise OSError(errno.ENOTTY, "VMPCK is disabled")
        if self.broken is not None:
            number, firmware, hypervisor = self.broken
            self.broken, self.disabled = None, True
            argument[:] = _SEV.pack(version, asked, answer, firmware, hypervisor)
            raise OSError(number, os.strerror(number))
        if request == 0xC0205301:
            self.key_requests.append(struct.unpack("=IIQIIQ", ctypes.string_at(asked, 32)))
            self._answer(answer, struct.pack("=II24x", self.status, 0) + self.key, 64)
            return
        data, level, zeros = struct.unpack("=64sI28s", ctypes.string_at(asked, 96))
        assert not any(zeros)
        if request == 0xC0205302:
            self._certificates(argument, asked)
        elif request != 0xC0205300:
            raise OSError(errno.ENOTTY, "no such ioctl")
        report = b"" if self.status else self.make(data, level)
        size = len(report) if self.size is None else self.size
        self._answer(answer, struct.pack("=II24x", self.status, size) + report, 4000)

    def _certificates(self, argument: bytearray, asked: int) -> None:
        address, length = struct.unpack("=QI", ctypes.string_at(asked + 96, 12))
        if length > MAX_SEV_CERTIFICATES or length % 4096:
            raise OSError(errno.EINVAL, "length of the certificates")
        if len(self.table) > length:
            version, asked, answer, _, _ = _SEV.unpack(argument)
            argument[:] = _SEV.pack(version, asked, answer, 0, 1)  # SNP_GUEST_VMM_ERR_INVALID_LEN
            raise OSError(errno.EIO, "the certificates don't fit")
        ctypes.memmove(address, self.table.ljust(length, b"\0"), length)

    def _answer(self, address: int, content: bytes, size: int) -> None:
        self.response_addresses.append((address, size))
        ctypes.memmove(address, content.ljust(size, b"\0"), size)


_NSM: Final = struct.Struct("=QQQQ")


@dataclass
class NsmKernel(FakeKernel):
    """``/dev/nsm``: CBOR in, CBOR out, cut to the caller's buffer."""

    document: Callable[[bytes], bytes]
    answer: Any = None  # instead of a document
    raw: bytes | None = None  # instead of CBOR
    length: int | None = None  # that the driver claims to have written
    requests: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def exists(self, path: str) -> bool:
        return path == "dev/nsm"

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> None:
        assert self.handles[descriptor].path == "dev/nsm"
        if request != 0xC0200A00 or len(argument) != 32:
            raise OSError(errno.EINVAL, "no such ioctl")
        self.fail("ioctl")
        asked, size, place, room = _NSM.unpack(argument)
        if size > MAX_NSM_REQUEST:
            raise OSError(errno.EMSGSIZE, "too long")
        message = cbor2.loads(ctypes.string_at(asked, size))
        self.requests.append(message)
        answer = self.answer or {
            "Attestation": {"document": self.document(message["Attestation"]["user_data"])}
        }
        content = cbor2.dumps(answer) if self.raw is None else self.raw
        content = content[:room]
        ctypes.memmove(place, content, len(content))
        argument[:] = _NSM.pack(asked, size, place, len(content) if self.length is None else self.length)


def cut(report: bytes) -> bytes:
    """A report without its last byte."""
    assert len(report) == REPORT_SIZE
    return report[:-1]
