"""Evidence and sealing keys from an SEV-SNP guest, through ``/dev/sev-guest``.

Three ioctls take the same argument (Linux, ``include/uapi/linux/sev-guest.h``): a version, the addresses of a
request and of a response, and a place for the firmware's and the hypervisor's error. A response starts with
status and size; a report or key follows at byte 32 (AMD 56860, MSG_REPORT_RSP and MSG_KEY_RSP). The extended
report also copies the certificates that the host offers (AMD 56421, section 4.1.8).
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Final

from cloister.core.evidence.bundle import Evidence
from cloister.core.evidence.snp import REPORT_SIZE, SnpReport
from cloister.core.secret import Secret
from cloister.enclave.attester.device import (
    LINUX,
    Buffer,
    Kernel,
    derive_sealing_key,
    opened,
    read_file,
    require_own,
    require_report_data,
    silent,
)
from cloister.enclave.attester.stapled import StapledCollateral
from cloister.errors import FormatError, Unavailable

DEVICE: Final = Path("dev/sev-guest")
VMPL_FILE: Final = Path("sys/devices/system/cpu/sev/vmpl")  # Linux 6.11 and later
SNP_GET_REPORT: Final = 0xC0205300
SNP_GET_DERIVED_KEY: Final = 0xC0205301
SNP_GET_EXT_REPORT: Final = 0xC0205302
MAX_CERTIFICATES: Final = 0x4000  # bytes, SEV_FW_BLOB_MAX_SIZE; the length must be whole pages

REPORT_RESPONSE: Final = 4000  # bytes
KEY_RESPONSE: Final = 64
_PAYLOAD: Final = 32  # offset in a response
_KEY_SIZE: Final = 32
_MESSAGE_VERSION: Final = 1
_INVALID_LENGTH: Final = 1  # of the hypervisor: the certificates don't fit

_ARGUMENT: Final = struct.Struct("=B7xQQII")  # version, request, response, firmware error, hypervisor error
_REPORT_REQUEST: Final = struct.Struct("=64sI28x")
_CERTIFICATES: Final = struct.Struct("=QI4x")  # address and length, after a report request
_KEY_REQUEST: Final = struct.Struct("=IIQIIQ")  # root key, 0, fields, VMPL, guest SVN, TCB version
_HEAD: Final = struct.Struct("=II")  # status, size

# VCEK or VLEK as the root key, so that the key outlives the guest; the migration key does not.
_ROOT_KEY_VEK: Final = 0
# What a guest must share to get the key (MSG_KEY_REQ, GUEST_FIELD_SELECT): a guest open to a debugger has
# another policy, so it gets another key.
_POLICY, _IMAGE_ID, _FAMILY_ID, _MEASUREMENT = 1 << 0, 1 << 1, 1 << 2, 1 << 3
KEY_FIELDS: Final = _POLICY | _IMAGE_ID | _FAMILY_ID | _MEASUREMENT


class SevGuestAttester:
    """This SEV-SNP guest."""

    simulated: bool = False

    def __init__(
        self, collateral: StapledCollateral, *, root: Path = Path("/"), kernel: Kernel = LINUX
    ) -> None:
        """Make an attester; nothing is opened before it is asked."""
        self._collateral = collateral
        self._root = root
        self._kernel = kernel

    def evidence(self, report_data: bytes) -> Evidence:
        """A report over ``report_data`` (64 bytes), with the host's certificates or stapled ones.

        Raises:
            UsageError: ``report_data`` has another length.
            FormatError: the answer does not parse, or is over other report data.
            Unavailable: the device refuses, or the collateral isn't there.
        """
        require_report_data(report_data)
        request = _REPORT_REQUEST.pack(report_data, vmpl(self._kernel, self._root))
        certificates = Buffer(MAX_CERTIFICATES)
        extended = request + _CERTIFICATES.pack(certificates.address, MAX_CERTIFICATES)
        table = b""
        try:
            response = _call(self._kernel, self._root, SNP_GET_EXT_REPORT, extended, REPORT_RESPONSE)
            table = certificates.content(MAX_CERTIFICATES)
        except _CertificatesTooLong:
            response = _call(self._kernel, self._root, SNP_GET_REPORT, request, REPORT_RESPONSE)
        raw = _payload(response.content(REPORT_RESPONSE), REPORT_SIZE, sized=True)
        require_own(SnpReport.from_bytes(raw).report_data, report_data)
        return self._collateral.staple_report(raw, table)

    def sealing_key(self) -> Secret:
        """The key of exactly this measurement and policy on this processor (32 bytes); see `derived_key`."""
        return derived_key(self._kernel, self._root)


def derived_key(kernel: Kernel, root: Path) -> Secret:
    """The key that the firmware derives for this measurement, policy, image id and family id (32 bytes).

    It derives it from the processor's versioned key: another processor, and possibly another firmware
    version, gives another key.

    Raises:
        FormatError: the answer is no key.
        Unavailable: the device refuses.
    """
    request = _KEY_REQUEST.pack(_ROOT_KEY_VEK, 0, KEY_FIELDS, vmpl(kernel, root), 0, 0)
    response = _call(kernel, root, SNP_GET_DERIVED_KEY, request, KEY_RESPONSE)
    try:
        key = _payload(response.content(KEY_RESPONSE), _KEY_SIZE, sized=False)
    finally:
        response.wipe()
    if not any(key):
        raise FormatError("the firmware gave no key", code="attester.answer", claim="sealing key")
    return derive_sealing_key(key, "snp")


def vmpl(kernel: Kernel, root: Path) -> int:
    """This guest's privilege level: what the kernel says, or 0 where it is too old to say."""
    try:
        text = read_file(kernel, root / VMPL_FILE, 16, "VMPL").strip()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise silent(str(VMPL_FILE), error) from error
    if text not in (b"0", b"1", b"2", b"3"):
        raise FormatError(
            "the kernel names no VMPL", code="attester.answer", claim="VMPL", expected="0 to 3", actual=text
        )
    return int(text)


class _CertificatesTooLong(Exception):
    """The host offers more certificates than the driver takes."""


def _call(kernel: Kernel, root: Path, code: int, request: bytes, size: int) -> Buffer:
    sent, received = Buffer(len(request), request), Buffer(size)
    argument = bytearray(_ARGUMENT.pack(_MESSAGE_VERSION, sent.address, received.address, 0, 0))
    try:
        with opened(kernel, root / DEVICE, os.O_RDWR) as device:
            kernel.ioctl(device, code, argument)
    except OSError as error:
        _, _, _, firmware, hypervisor = _ARGUMENT.unpack(argument)
        if error.errno == errno.EIO and hypervisor == _INVALID_LENGTH:
            raise _CertificatesTooLong from error
        hint = f"Firmware error {firmware:#x}, hypervisor error {hypervisor:#x}"
        raise silent("/dev/sev-guest", error, hint) from error
    return received


def _payload(response: bytes, size: int, *, sized: bool) -> bytes:
    """What follows status and size; a response with a key has no size."""
    status, length = _HEAD.unpack_from(response)
    if status:
        raise Unavailable(
            f"the SEV firmware refused: status {status:#x}",
            code="attester.refused",
            claim="status",
            actual=status,
        )
    if sized and length != size:
        raise FormatError(
            "the SEV firmware's answer has another length",
            code="attester.answer",
            claim="size",
            expected=f"{size} B",
            actual=f"{length} B",
        )
    return response[_PAYLOAD : _PAYLOAD + size]
