"""How much the proxy holds at once: requests, and bytes of their bodies. One loop, so no lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from cloister.core.protocol.limits import MAX_INNER_REQUEST
from cloister.errors import InvalidRequest, Overloaded

MAX_REQUESTS: Final = 256  # at once, REST and gRPC together
MAX_BYTES: Final = 512 << 20  # of bodies, at once


class Room:
    """What is taken of both limits.

    Args:
        max_requests: Requests at once.
        max_bytes: Bytes of bodies at once.
        max_body: Bytes of one body.
    """

    def __init__(
        self,
        *,
        max_requests: int = MAX_REQUESTS,
        max_bytes: int = MAX_BYTES,
        max_body: int = MAX_INNER_REQUEST,
    ) -> None:
        self.max_body: Final = max_body
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._requests = 0
        self._bytes = 0

    @contextmanager
    def enter(self) -> Iterator[Place]:
        """A place for one request, with all that it holds, until the block ends; raises Overloaded."""
        if self._requests >= self._max_requests:
            raise _full("requests in the proxy", self._max_requests)
        self._requests += 1
        place = Place(self)
        try:
            yield place
        finally:
            self._requests -= 1
            self._bytes -= place.held

    def take(self, count: int) -> None:
        """Count bytes as held; raises Overloaded."""
        if self._bytes + count > self._max_bytes:
            raise _full("bytes in the proxy", self._max_bytes)
        self._bytes += count


class Place:
    """One request's place; `held` counts the bytes of its bodies."""

    __slots__ = ("_room", "body", "held")

    def __init__(self, room: Room) -> None:
        self._room = room
        self.held = 0
        self.body = 0  # bytes of the body that is being read

    @property
    def limit(self) -> int:
        """Bytes of the largest body."""
        return self._room.max_body

    def hold(self, count: int) -> None:
        """Count bytes before they are allocated.

        Raises:
            InvalidRequest: ``request.size``, where the body gets larger than any enclave takes.
            Overloaded: where too many are held.
        """
        if self.body + count > self._room.max_body:
            raise too_large(self._room.max_body)
        self._room.take(count)
        self.held += count
        self.body += count

    def next_body(self) -> None:
        """The bytes that come now are of another form of the same body: decompressed, for example."""
        self.body = 0


def too_large(limit: int) -> InvalidRequest:
    """The error for a body beyond ``limit`` bytes."""
    return InvalidRequest(
        "the body is too large",
        code="request.size",
        claim="size of the body",
        expected=f"at most {limit} B",
        actual="more",
        hint="Send the inputs in several requests",
    )


def _full(claim: str, limit: int) -> Overloaded:
    return Overloaded(
        "the proxy is full", code="overloaded.proxy", claim=claim, expected=f"at most {limit}", actual="more"
    )
