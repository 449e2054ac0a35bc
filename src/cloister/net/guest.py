"""A connection that was handed over to a protocol of another kind, and stays counted, timed and tapped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from cloister.net.messages import Buffer, Tap


class Guest(asyncio.Protocol):
    """Passes the loop's calls on to ``inner``, an `asyncio.Protocol` such as uvicorn's.

    Args:
        inner: The protocol that serves the connection from now on.
        members: Where the connection counts while it lives.
        timeout: Seconds without a byte in either direction after which it is dropped.
        clock: The loop's clock.
    """

    def __init__(
        self, inner: asyncio.Protocol, members: set[Any], timeout: float, clock: Callable[[], float]
    ) -> None:
        self._inner = inner
        self._members = members
        self._timeout = timeout
        self._clock = clock
        self._active = clock()
        self._unsent = 0
        self._transport: asyncio.Transport
        self._tap: Tap | None = None
        self._tapped = 0

    def connection_made(  # type: ignore[override]  # the loop never calls it: the connection exists already
        self, transport: asyncio.Transport, tap: Tap | None = None, tapped: int = 0
    ) -> None:
        """Take the connection over."""
        self._transport, self._tap, self._tapped = transport, tap, tapped
        self._members.add(self)
        seen = transport if tap is None else cast(asyncio.Transport, _Tapped(transport, tap, tapped))
        self._inner.connection_made(seen)

    def feed(self, data: bytes) -> None:
        """Pass on bytes that were read, and tapped, before the connection changed hands."""
        self._active = self._clock()
        self._inner.data_received(data)

    def data_received(self, data: bytes) -> None:
        """Pass on bytes."""
        if self._tap is not None:
            self._tap.received(self._tapped, data)
        self.feed(data)

    def eof_received(self) -> bool | None:
        """Pass on the end of the peer's bytes."""
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        """Pass on flow control."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass on flow control; the peer reads, so it lives."""
        self._active = self._clock()
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on the end of the connection."""
        self._members.discard(self)
        self._inner.connection_lost(exc)

    def tick(self, now: float) -> None:
        """Drop a connection on which nothing has moved for too long."""
        unsent = self._transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent, self._active = unsent, now
        if now - self._active >= self._timeout:
            self._transport.abort()

    def shut(self) -> None:
        """Let the inner protocol finish what it is doing; uvicorn's has a method for it."""
        shutdown = getattr(self._inner, "shutdown", self._transport.close)
        shutdown()

    def abort(self) -> None:
        """Close now."""
        self._transport.abort()


class _Tapped:
    """A transport whose written bytes are seen by a tap; everything else is the transport's own."""

    def __init__(self, transport: asyncio.Transport, tap: Tap, tapped: int) -> None:
        self._transport = transport
        self._tap = tap
        self._tapped = tapped

    def write(self, data: Buffer) -> None:
        self._tap.sent(self._tapped, data)
        self._transport.write(data)

    def writelines(self, parts: list[Buffer]) -> None:
        for data in parts:
            self.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
