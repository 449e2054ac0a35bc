"""The enclave's one way out: a Unix socket that its launcher serves. The host answers whatever it likes.

Nothing that comes through here is trusted: documents are verified, records and models are opened with keys
that the host doesn't have, and every length is bounded before it is read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

from cloister.core.encoding import decode, encode
from cloister.core.protocol.document import MAX_DOCUMENT
from cloister.core.protocol.flow import Outgoing
from cloister.core.protocol.limits import MAX_SEALED_MODEL
from cloister.errors import FormatError, NotFound, TransportError, Unavailable
from cloister.net.link import Peer, Upstream
from cloister.net.messages import Answer, Limits

PAGE: Final = 512  # records in one scan
TIMEOUT: Final = 20.0  # seconds for one exchange with the host
_LIMITS: Final = Limits(max_body=64 << 20)


class HostLink:
    """What an enclave may ask of its host. Owns its connections; `aclose` when done."""

    def __init__(self, socket: Path) -> None:
        self._host = Upstream(Peer(unix=socket), limits=_LIMITS)

    async def document(self) -> bytes:
        """The service document as the host has it, unverified."""
        answer = await self._request(b"GET", b"/.well-known/cloister")
        if len(answer.body) > MAX_DOCUMENT:
            raise FormatError(
                claim="service document", expected=f"at most {MAX_DOCUMENT} B", actual=len(answer.body)
            )
        return bytes(answer.body)

    async def send(self, outgoing: Outgoing) -> Answer:
        """Carry an encapsulated request to another enclave; returns the outer answer as it came."""
        return await self._host.request(
            outgoing.method, outgoing.target, outgoing.fields, outgoing.body, timeout=TIMEOUT
        )

    async def record(self, table: str, key: bytes) -> tuple[int, bytes] | None:
        """Version and sealed bytes of one record; None where the host says there is none."""
        try:
            answer = await self._request(b"GET", f"/records/{table}/{key.hex()}".encode())
        except NotFound:
            return None
        version, value = _exact_list(decode(answer.body, what="record", limit=_LIMITS.max_body), 2)
        if type(version) is not int or type(value) is not bytes:
            raise FormatError("the host answered with no record", code="store.format")
        return version, value

    async def scan(self, table: str) -> AsyncIterator[tuple[bytes, int, bytes]]:
        """Every record of a table, by key: (key, version, sealed bytes)."""
        after = b""
        while True:
            target = f"/records/{table}?after={after.hex()}&limit={PAGE}"
            page = decode(
                (await self._request(b"GET", target.encode())).body, what="records", limit=_LIMITS.max_body
            )
            if not isinstance(page, list) or len(page) > PAGE:
                raise FormatError("the host answered with no page of records", code="store.format")
            for row in page:
                key, version, value = _exact_list(row, 3)
                if (
                    type(key) is not bytes
                    or type(version) is not int
                    or type(value) is not bytes
                    or key <= after
                ):
                    raise FormatError("the host answered with records out of order", code="store.format")
                after = key
                yield key, version, value
            if not page:  # a page may end early where its records are large
                return

    async def apply(self, writes: Sequence[tuple[str, bytes, int, bytes | None]]) -> None:
        """Write records atomically: (table, key, version that must be there or 0, sealed bytes or None).

        Raises:
            Unavailable: the host did not say that they are durable, or another version is there.
        """
        await self._request(b"POST", b"/records", encode([list(write) for write in writes]))

    async def blob(self, digest: bytes, size: int) -> AsyncIterator[memoryview]:
        """Ciphertext of a sealed model, in pieces, at most ``size`` bytes.

        Raises:
            TransportError: it ends early or goes on too long.
        """
        if not 0 < size <= MAX_SEALED_MODEL:
            raise FormatError(claim="sealed model size", expected=f"1 to {MAX_SEALED_MODEL} B", actual=size)
        received = 0
        async with self._host.stream(
            f"/blobs/{digest.hex()}".encode(), max_length=MAX_SEALED_MODEL
        ) as pieces:
            async for piece in pieces:
                received += len(piece)
                if received > size:
                    break
                yield piece
        if received != size:
            raise TransportError(
                "the host's copy of the sealed model has another length",
                code="store.length",
                claim="sealed model",
                expected=f"{size} B",
                actual=f"{received} B",
            )

    async def aclose(self) -> None:
        """Close every connection."""
        await self._host.aclose()

    async def _request(self, method: bytes, target: bytes, body: bytes = b"") -> Answer:
        fields = ((b"content-type", b"application/cbor"),) if body else ()
        answer = await self._host.request(method, target, fields, body, timeout=TIMEOUT)
        if answer.status == 404:
            raise NotFound(code="not-found.host", claim="host answer", expected="200", actual="404")
        if answer.status not in (200, 204):
            raise Unavailable(
                "the host did not do what was asked",
                code="store.conflict" if answer.status == 409 else "host.status",
                claim="host answer",
                expected="200",
                actual=answer.status,
            )
        return answer


def _exact_list(data: Any, length: int) -> list[Any]:
    if not isinstance(data, list) or len(data) != length:
        raise FormatError("the host answered with another form of record", code="store.format")
    return data
