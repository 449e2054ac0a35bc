"""The platform's side of the simulated TEE device: one socket, one thread and one measurement per enclave.

Messages in both directions are a big-endian u32 length and that many bytes of deterministic CBOR::

    {"op": "evidence", "report_data": 64 B}  ->  {"evidence": Evidence.to_data()}
    {"op": "sealing-key"}                    ->  {"sealing-key": 32 B}
    anything else                            ->  {"error": text}

The device was handed its measurement when the process at the other end was launched. No message can name
another one, just as EREPORT takes none.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

from cloister.core.encoding import decode, encode
from cloister.core.evidence.bundle import Evidence
from cloister.core.secret import Secret
from cloister.errors import CloisterError, FormatError
from cloister.sim import tees
from cloister.sim.measurement import Measurement

MAX_REQUEST: Final = 4096  # bytes; an evidence request has less than 100
REPORT_DATA_SIZE: Final = 64  # bytes

_log = logging.getLogger(__name__)


class Authority(tees.Authority, Protocol):
    """What signs evidence and keeps secrets: `cloister.sim.authority.SimulatedAuthority`."""

    def sealing_key(self, mr_enclave: bytes) -> Secret:
        """The key that only enclaves of this measurement get from this platform."""


class TeeDevice:
    """Answers one enclave until it, or the platform, closes the connection."""

    def __init__(
        self,
        connection: socket.socket,
        authority: Authority,
        measurement: Measurement,
        clock: Callable[[], int],
        tee: str = "sgx",
    ) -> None:
        """Take over ``connection``; `start` begins to serve it.

        Args:
            connection: The platform's end of a stream socket pair.
            authority: Signs the quotes.
            measurement: Of the process that holds the other end.
            clock: Unix time in seconds.
            tee: The kind of TEE that it plays, of `cloister.sim.tees.TEES`.
        """
        self._tee = tees.require_tee(tee)
        self._connection = connection
        self._authority = authority
        self._measurement = measurement
        self._clock = clock
        self._thread = threading.Thread(target=self._serve, name=f"tee-{measurement.role}", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Cut the enclave off and wait for the thread. Any number of times."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join()
        self._connection.close()

    def _serve(self) -> None:
        try:
            while (request := self._receive()) is not None:
                self._send(self._answer(request))
        except FormatError as error:
            # After a length that is out of bounds nothing tells where the next message starts.
            with contextlib.suppress(OSError):
                self._send({"error": str(error)})
        except OSError:
            pass  # the enclave is gone
        finally:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def _receive(self) -> bytes | None:
        head = self._read(4)
        if head is None:
            return None
        size = struct.unpack(">I", head)[0]
        if not 0 < size <= MAX_REQUEST:
            raise FormatError("device request", claim="length", expected=f"1 to {MAX_REQUEST} B", actual=size)
        return self._read(size)

    def _read(self, size: int) -> bytes | None:
        """Exactly ``size`` bytes, or nothing when the other end closed before."""
        data = b""
        while len(data) < size:
            part = self._connection.recv(size - len(data))
            if not part:
                return None
            data += part
        return data

    def _send(self, answer: dict[str, Any]) -> None:
        body = encode(answer)
        self._connection.sendall(struct.pack(">I", len(body)) + body)

    def _answer(self, request: bytes) -> dict[str, Any]:
        try:
            message = decode(request, what="device request", limit=MAX_REQUEST)
            match message:
                case {"op": "evidence", "report_data": bytes(data), **rest} if not rest:
                    return {"evidence": self._evidence(data).to_data()}
                case {"op": "sealing-key", **rest} if not rest:
                    return {"sealing-key": self._authority.sealing_key(self._measurement.mr_enclave).reveal()}
        except CloisterError as error:
            return {"error": str(error)}
        except Exception as error:
            # An authority that fails must not take the device's thread along, and with it every later answer.
            _log.warning("the simulated authority failed: %s", type(error).__name__)
            return {"error": "the simulated authority failed"}
        return {"error": "the device has no such operation"}

    def _evidence(self, report_data: bytes) -> Evidence:
        if len(report_data) != REPORT_DATA_SIZE:
            raise FormatError(
                "report data", claim="length", expected=f"{REPORT_DATA_SIZE} B", actual=len(report_data)
            )
        return tees.evidence(self._authority, self._measurement, self._tee, report_data, self._clock())
