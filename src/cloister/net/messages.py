"""What both ends of a connection share: the head of a request, an answer, and the limits of a connection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
Fields: TypeAlias = Sequence[tuple[bytes, bytes]]
JOIN: Final = 16 << 10  # bytes; a shorter body is written together with its head


class Pieces(Protocol):
    """A body that is made while it is sent. Asked again, it gives the same bytes from the start."""

    def __len__(self) -> int:
        """Its length in bytes."""

    def pieces(self) -> Iterator[Buffer]:
        """Its bytes in order."""


def pieces_of(body: Buffer | Pieces) -> Iterator[Buffer]:
    """A body's bytes in order; those of a buffer in one piece."""
    return iter((body,)) if isinstance(body, bytes | bytearray | memoryview) else body.pieces()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one end accepts from the other. Every limit holds before anything is allocated for it.

    Attributes:
        max_body: Largest message body, in bytes.
        max_head: Largest request or response head, in bytes.
        max_fields: Most header fields in one head.
        max_buffered: Received bytes of request bodies in memory at once, over all connections.
        max_connections: Most connections at once; for a client, per peer.
        head_timeout: Seconds for a head to arrive once its connection, or its first byte, is there.
        body_timeout: Seconds for a body to pass in either direction, on top of one second per 64 KiB.
        stall_timeout: Seconds without a byte of a request's body after which it is given up.
        idle_timeout: Seconds that a connection may wait between requests.
        guest_timeout: Seconds of silence after which a handed-over connection is dropped.
    """

    max_body: int = 8 << 20
    max_head: int = 16 << 10
    max_fields: int = 64
    max_buffered: int = 256 << 20
    max_connections: int = 1024
    head_timeout: float = 10.0
    body_timeout: float = 20.0
    stall_timeout: float = 10.0
    idle_timeout: float = 75.0
    guest_timeout: float = 300.0

    def transfer_timeout(self, length: int) -> float:
        """Seconds within which ``length`` bytes must have passed."""
        return self.body_timeout + length / (64 << 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The head of an HTTP/1.1 request.

    Attributes:
        method: As sent, for example ``b"POST"``.
        target: Origin form, with the query if there is one.
        fields: Values by name in lower case.
        length: Value of Content-Length; None where the request has none.
        chunked: Whether a Transfer-Encoding is declared, so that the length of the body is unknown.
        keep_alive: Whether the connection stays open after the answer.
    """

    method: bytes
    target: bytes
    fields: Mapping[bytes, bytes] = field(default_factory=dict)
    length: int | None = None
    chunked: bool = False
    keep_alive: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response with its whole body.

    Attributes:
        status: Between 200 and 599.
        body: Kept as it is until it is written, never copied; whoever makes the answer no longer changes it.
        content_type: Left out of the head when empty.
        fields: Further header fields; Content-Length and Connection are added by the connection.
    """

    status: int = 200
    body: Buffer = b""
    content_type: bytes = b""
    fields: Fields = ()

    def field(self, name: bytes) -> bytes | None:
        """The first value of a header field, by its name in lower case."""
        return next((value for each, value in self.fields if each.lower() == name), None)


class Tap(Protocol):
    """Sees every byte that a connection carries, for audits: what an operator can see, and nothing more."""

    def opened(self, label: str) -> int:
        """A connection of the kind ``label`` opened; returns the number that stands for it from now on."""

    def received(self, connection: int, data: Buffer) -> None:
        """These bytes arrived. The buffer is reused after the call."""

    def sent(self, connection: int, data: Buffer) -> None:
        """These bytes were handed to the kernel's side of the connection."""
