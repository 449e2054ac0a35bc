"""Evidence from an AWS Nitro enclave's security module, through ``/dev/nsm``.

One ioctl carries a request and an answer, each in CBOR behind an address and a length (Linux,
``include/uapi/linux/nsm.h``; aws-nitro-enclaves-nsm-api, ``docs/attestation_process.md``)::

    {"Attestation": {"user_data", "nonce", "public_key"}} -> {"Attestation": {"document"}} or {"Error": name}

Report data goes into ``user_data``. The document brings its certificates, so there is no collateral.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, Final

from cloister.core.encoding import decode, encode
from cloister.core.evidence.bundle import Evidence
from cloister.core.evidence.nitro import NitroDocument
from cloister.core.secret import Secret
from cloister.enclave.attester.device import (
    LINUX,
    Buffer,
    Kernel,
    no_sealing_key,
    opened,
    require_own,
    require_report_data,
    silent,
)
from cloister.errors import FormatError, Unavailable

DEVICE: Final = Path("dev/nsm")
NSM_IOCTL_RAW: Final = 0xC0200A00  # _IOWR(0x0A, 0, struct nsm_raw)
MAX_RESPONSE: Final = 0x3000  # bytes; the driver cuts off what doesn't fit
_RAW: Final = struct.Struct("=QQQQ")  # request address and length, response address and length


class NsmAttester:
    """This Nitro enclave."""

    simulated: bool = False

    def __init__(self, *, root: Path = Path("/"), kernel: Kernel = LINUX) -> None:
        """Make an attester; nothing is opened before it is asked."""
        self._device = root / DEVICE
        self._kernel = kernel

    def evidence(self, report_data: bytes) -> Evidence:
        """An attestation document with ``report_data`` (64 bytes) as its user data.

        Raises:
            UsageError: ``report_data`` has another length.
            FormatError: the module's answer does not parse, or is over other report data.
            Unavailable: it refuses, or doesn't answer.
        """
        require_report_data(report_data)
        request = {"Attestation": {"user_data": report_data, "nonce": None, "public_key": None}}
        answer = _member(self._ask(encode(request)), "Attestation")
        document = _member(answer, "document")
        if type(document) is not bytes:
            raise _wrong("document", "bytes", document)
        require_own(NitroDocument.from_bytes(document).user_data or b"", report_data)
        return Evidence(tee="nitro", quote=document, collateral=None)

    def sealing_key(self) -> Secret:
        """A Nitro enclave has no key of its own; raises UsageError."""
        raise no_sealing_key("AWS Nitro")

    def _ask(self, message: bytes) -> Any:
        request, response = Buffer(len(message), message), Buffer(MAX_RESPONSE)
        argument = bytearray(_RAW.pack(request.address, len(message), response.address, MAX_RESPONSE))
        try:
            with opened(self._kernel, self._device, os.O_RDWR) as device:
                self._kernel.ioctl(device, NSM_IOCTL_RAW, argument)
        except OSError as error:
            raise silent("the Nitro security module", error) from error
        size = _RAW.unpack(argument)[3]
        if not 0 < size <= MAX_RESPONSE:
            raise _wrong("length of the answer", f"1 to {MAX_RESPONSE} B", size)
        answer = decode(response.content(size), what="answer of the Nitro security module")
        if type(answer) is dict and type(answer.get("Error")) is str:
            raise Unavailable(
                f"the Nitro security module refused: {answer['Error'][:80]}", code="attester.refused"
            )
        return answer


def _member(value: Any, name: str) -> Any:
    """The one member of a map; raises FormatError where there is another, or more."""
    if type(value) is not dict or list(value) != [name]:
        raise _wrong(name, "a map with it alone", value)
    return value[name]


def _wrong(claim: str, expected: str, actual: Any) -> FormatError:
    return FormatError(
        "the Nitro security module answered something else",
        code="attester.answer",
        claim=claim,
        expected=expected,
        actual=repr(actual)[:80],
    )
