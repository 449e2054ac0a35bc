"""Evidence from the simulated TEE: a client of the device that the platform left this process.

The device is an inherited Unix stream socket, whose number stands in ``CLOISTER_TEE_FD``. A message is a
big-endian u32 length and that many bytes of deterministic CBOR; each request gets one answer.
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any, Final

from cloister.core.encoding import decode, encode
from cloister.core.evidence.bundle import Evidence
from cloister.core.secret import Secret
from cloister.enclave.attester.device import SEALING_KEY_SIZE, require_report_data
from cloister.errors import FormatError, TransportError, Unavailable, UsageError

DEVICE_VARIABLE: Final = "CLOISTER_TEE_FD"
MAX_ANSWER: Final = 1 << 20  # bytes; a quote with its collateral has about 20 KiB
TIMEOUT: Final = 10.0  # seconds


class SimulatedAttester:
    """The simulated TEE, as this enclave sees it."""

    simulated: bool = True

    def __init__(self, device: socket.socket) -> None:
        """Take over a connected stream socket."""
        self._device = device
        self._device.settimeout(TIMEOUT)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, descriptor: str) -> SimulatedAttester:
        """Open the inherited device.

        Args:
            descriptor: Its number, as the environment gives it.

        Raises:
            UsageError: no number, or not an open Unix stream socket.
        """
        if not (descriptor.isascii() and descriptor.isdigit() and len(descriptor) <= 6):
            raise UsageError(
                f"{DEVICE_VARIABLE} is not a file descriptor", code="attester.device", claim="descriptor"
            )
        try:
            device = socket.socket(fileno=int(descriptor))
        except OSError as error:
            raise UsageError(
                f"{DEVICE_VARIABLE} names no socket",
                code="attester.device",
                claim="descriptor",
                actual=descriptor,
            ) from error
        if device.family != socket.AF_UNIX or device.type != socket.SOCK_STREAM:
            device.detach()
            raise UsageError(
                f"{DEVICE_VARIABLE} names no Unix stream socket",
                code="attester.device",
                claim="descriptor",
                actual=descriptor,
            )
        # Whatever this enclave starts gets no way to speak in its name.
        device.set_inheritable(False)
        return cls(device)

    def evidence(self, report_data: bytes) -> Evidence:
        """A genuine-format SGX quote over ``report_data`` (64 bytes), with collateral.

        Raises:
            UsageError: ``report_data`` has another length.
            FormatError: the device's answer does not parse.
            Unavailable: the device refused, or doesn't answer.
        """
        require_report_data(report_data)
        return Evidence.from_data(self._ask({"op": "evidence", "report_data": report_data}, "evidence"))

    def sealing_key(self) -> Secret:
        """The sealing key of this measurement on this platform (32 bytes).

        Raises:
            FormatError: the device's answer is not a key.
            Unavailable: the device refused, or doesn't answer.
        """
        key = self._ask({"op": "sealing-key"}, "sealing-key")
        if type(key) is not bytes or len(key) != SEALING_KEY_SIZE:
            raise FormatError(
                "the TEE device gave no sealing key", code="attester.answer", claim="sealing key"
            )
        return Secret(key)

    def close(self) -> None:
        """Give the device back."""
        self._device.close()

    def _ask(self, request: dict[str, Any], field: str) -> Any:
        body = encode(request)
        with self._lock:
            try:
                self._device.sendall(struct.pack(">I", len(body)) + body)
                answer = self._receive()
            except OSError as error:
                self._device.close()
                raise TransportError("the TEE device is gone", code="attester.device") from error
            except (FormatError, TransportError):
                # What follows on the connection would be taken for the answer to a later request.
                self._device.close()
                raise
        message = decode(memoryview(answer), what="answer of the TEE device", limit=MAX_ANSWER)
        if type(message) is not dict or len(message) != 1:
            raise FormatError("the TEE device gave no answer", code="attester.answer", claim="answer")
        if type(message.get("error")) is str:
            raise Unavailable(f"the TEE device refused: {message['error'][:200]}", code="attester.refused")
        if field not in message:
            raise FormatError(
                "the TEE device answered something else", code="attester.answer", claim="answer"
            )
        return message[field]

    def _receive(self) -> bytearray:
        size = struct.unpack(">I", self._read(4))[0]
        if not 0 < size <= MAX_ANSWER:
            raise FormatError(
                "the TEE device's answer has an impossible length",
                code="attester.answer",
                claim="length",
                expected=f"1 to {MAX_ANSWER} B",
                actual=size,
            )
        return self._read(size)

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            count = self._device.recv_into(view[filled:])
            if count == 0:
                raise TransportError("the TEE device closed the connection", code="attester.device")
            filled += count
        return data
