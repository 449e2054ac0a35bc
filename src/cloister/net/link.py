"""The client of the compact front: kept-alive connections to one peer, with bodies that are never copied.

Nothing is ever sent twice. A request goes to a fresh connection again only while no byte of it was written;
after that, the caller gets a `TransportError` whose ``sent`` is true and decides for itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.errors import NotFound, TransportError, UsageError
from cloister.net import http1
from cloister.net.body import Body
from cloister.net.exchange import Exchange
from cloister.net.messages import JOIN, Answer, Buffer, Fields, Limits, Pieces, Tap

__all__ = ["Answer", "Buffer", "Fields", "Limits", "Peer", "Stream", "Tap", "Upstream"]

_KEEP: Final = 20.0  # seconds; well below a front's idle timeout, so that it seldom closes first


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Where to connect: a Unix socket, or a host and a port."""

    unix: Path | None = None
    host: str = ""
    port: int = 0

    def __post_init__(self) -> None:
        if (self.unix is None) == (not self.host or not 0 < self.port < 65536):
            raise UsageError("a peer is either a Unix socket or a host and a port", code="net.peer")

    def __str__(self) -> str:
        return f"unix:{self.unix}" if self.unix is not None else f"{self.host}:{self.port}"


class Upstream:
    """Connections to one peer.

    Args:
        peer: Where it listens.
        max_idle: Connections that are kept open between requests.
        limits: ``max_body``, ``max_head`` and ``max_fields`` hold for responses, ``max_connections`` for all
            connections at once.
        tap: Sees every byte.
    """

    def __init__(
        self, peer: Peer, *, max_idle: int = 16, limits: Limits | None = None, tap: Tap | None = None
    ) -> None:
        self.peer = peer
        self._max_idle = max_idle
        self._limits = limits or Limits()
        self._tap = tap
        self._idle: list[Exchange] = []  # the last used at the end
        self._busy: set[Exchange] = set()
        self._slots = asyncio.Semaphore(self._limits.max_connections)  # places of those in use and idle
        self._waiting = 0  # requests that wait for a place
        self._closed = False

    async def request(
        self,
        method: bytes,
        target: bytes,
        fields: Fields = (),
        body: Buffer | Sequence[Buffer] | Pieces | Body | None = None,
        *,
        timeout: float,  # noqa: ASYNC109  (seconds; a caller must choose)
    ) -> Answer:
        """Send one request and wait for the whole response.

        Args:
            method: For example ``b"POST"``.
            target: Origin form.
            fields: Header fields but Content-Length, which follows from ``body``.
            body: Not copied, so it must not change before the response is there. `Pieces` are sent while they
                are made, a `Body` while it arrives. None sends no body.
            timeout: Seconds for all of it.

        Returns:
            The response with any status; its ``body`` is one bytearray.

        Raises:
            TransportError: with ``sent``; its code is ``transport.connect``, ``.closed``, ``.timeout``,
                ``.format`` or ``.too-large``; or the ``body`` did not arrive.
            UsageError: the request can't be written as HTTP/1.1.
        """
        parts, later = _message(method, target, fields, body)
        until = asyncio.get_running_loop().time() + timeout
        exchange = await self._take(timeout)
        try:
            exchange.begin(method, parts, later)
            return await exchange.answer(until)
        except BaseException:
            exchange.abort()
            raise
        finally:
            self._give(exchange)

    def stream(
        self,
        target: bytes,
        fields: Fields = (),
        *,
        chunk: int = 1 << 20,
        max_length: int = 1 << 40,
        timeout: float = 60.0,
    ) -> Stream:
        """GET a long body piece by piece; see `Stream`.

        Args:
            target: Origin form.
            fields: Header fields, for example a Range.
            chunk: Bytes of every piece but the last.
            max_length: Longest body, in bytes, that is accepted.
            timeout: Seconds for the head, and for each piece.
        """
        return Stream(self, target, fields, chunk=chunk, max_length=max_length, timeout=timeout)

    @property
    def busy(self) -> bool:
        """Whether a request is in progress."""
        return bool(self._busy)

    def trim(self, now: float) -> None:
        """Close the connections that were idle for long; ``now`` is the loop's clock."""
        for exchange in self._idle:
            if now - exchange.last_used >= _KEEP:
                exchange.abort()  # it is forgotten when it is gone

    async def aclose(self) -> None:
        """Close all connections; what is in progress fails."""
        self._closed = True
        for exchange in [*self._idle, *self._busy]:
            exchange.abort()
        await asyncio.sleep(0)

    async def _take(self, timeout: float) -> Exchange:  # noqa: ASYNC109
        """An idle connection that still stands, or a new one; after at most so many seconds."""
        loop = asyncio.get_running_loop()
        while self._idle:
            exchange = self._idle.pop()
            if not exchange.stale and loop.time() - exchange.last_used < _KEEP:
                self._busy.add(exchange)
                return exchange
            exchange.abort()
            self._slots.release()
        if self._closed:
            raise TransportError(f"the link to {self.peer} is closed", code="transport.closed", sent=False)
        try:
            async with asyncio.timeout(timeout):
                self._waiting += 1
                try:
                    await self._slots.acquire()
                finally:
                    self._waiting -= 1
                if self._closed:
                    self._slots.release()
                    raise TransportError(
                        f"the link to {self.peer} is closed", code="transport.closed", sent=False
                    )
                exchange = await self._connect()
        except TimeoutError:
            raise TransportError("the peer took too long", code="transport.timeout", sent=False) from None
        except (OSError, UnicodeError) as error:  # a name that is no host name fails in its encoding
            message = f"can't connect to {self.peer}"
            raise TransportError(message, code="transport.connect", sent=False) from error
        self._busy.add(exchange)
        return exchange

    async def _connect(self) -> Exchange:
        """A new connection, in the place that was taken for it."""
        loop, peer = asyncio.get_running_loop(), self.peer
        try:
            if peer.unix is not None:
                _, exchange = await loop.create_unix_connection(self._exchange, str(peer.unix))
            else:
                _, exchange = await loop.create_connection(self._exchange, peer.host, peer.port)
        except BaseException:
            self._slots.release()
            raise
        return exchange

    def _exchange(self) -> Exchange:
        return Exchange(self._limits, self._tap, asyncio.get_running_loop(), self._forget)

    def _give(self, exchange: Exchange) -> None:
        """Keep a connection for another request, or close it."""
        self._busy.discard(exchange)
        wanted = not self._closed and not self._waiting and len(self._idle) < self._max_idle
        if wanted and exchange.reusable:
            exchange.idle()
            self._idle.append(exchange)
        else:
            exchange.abort()
            self._slots.release()

    def _forget(self, exchange: Exchange) -> None:
        """A connection is gone; one in use is still given back."""
        if exchange in self._idle:
            self._idle.remove(exchange)
            self._slots.release()


class Stream:
    """The body of one GET, in pieces: ``async with upstream.stream(target) as stream``, then ``async for``.

    Each piece is a memoryview of one buffer that the next piece overwrites, so memory stays at one piece.
    Reading is paused between pieces. The body's ``length`` in bytes and ``status`` (200 or 206) are known
    once it is open. Iterating opens it too; the connection is given back at the end of the body.
    """

    def __init__(
        self,
        upstream: Upstream,
        target: bytes,
        fields: Fields,
        *,
        chunk: int,
        max_length: int,
        timeout: float,
    ) -> None:
        self.length = -1
        self.status = 0
        self._upstream = upstream
        self._parts, _ = _message(b"GET", target, fields, None)
        self._chunk = chunk
        self._max_length = max_length
        self._timeout = timeout
        self._exchange: Exchange | None = None
        self._buffer = bytearray()
        self._left = 0

    async def open(self) -> Stream:
        """Send the request and wait for the head of the response.

        Raises:
            NotFound: the peer answered 404.
            TransportError: as `Upstream.request`, and for any other status or a body that is too long.
        """
        until = asyncio.get_running_loop().time() + self._timeout
        self._exchange = await self._upstream._take(self._timeout)
        try:
            self._exchange.begin(b"GET", self._parts, by_parts=True)
            head = await self._exchange.head(until)
            self.status, self.length = head.status, self._exchange.left
            self._check()
        except BaseException:
            await self.aclose()
            raise
        self._left = self.length
        self._buffer = bytearray(min(self._chunk, self.length))
        return self

    def _check(self) -> None:
        if self.status == 404:
            raise NotFound("the peer has no such object", code="not-found")
        if self.status not in (200, 206):
            raise TransportError(
                "the peer refused",
                code="transport.status",
                claim="status",
                expected="200",
                actual=self.status,
            )
        if self.length > self._max_length:
            expected = f"at most {self._max_length} B"
            raise TransportError(
                "the body is too long", code="transport.too-large", expected=expected, actual=self.length
            )

    async def aclose(self) -> None:
        """Give the connection back, or close it if the body was not read to its end."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._upstream._give(exchange)

    async def __aenter__(self) -> Stream:
        return self if self._exchange is not None else await self.open()

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> memoryview:
        if self.length < 0:
            await self.open()
        if self._left == 0:
            await self.aclose()
            raise StopAsyncIteration
        if self._exchange is None:
            raise TransportError("the stream is closed", code="transport.closed")
        piece = memoryview(self._buffer)[: min(self._chunk, self._left)]
        try:
            await self._exchange.fill(piece, asyncio.get_running_loop().time() + self._timeout)
        except BaseException:
            await self.aclose()
            raise
        self._left -= len(piece)
        return piece


def _message(
    method: bytes, target: bytes, fields: Fields, body: Buffer | Sequence[Buffer] | Pieces | Body | None
) -> tuple[list[Buffer], Pieces | Body | None]:
    """The request as parts to write, the head joined with a short body; and the body that is yet to come."""
    if body is None:
        return [http1.format_request(method, target, fields, None)], None
    if not isinstance(body, bytes | bytearray | memoryview | Sequence):
        return [http1.format_request(method, target, fields, len(body))], body
    parts = [body] if isinstance(body, bytes | bytearray | memoryview) else list(body)
    length = sum(len(part) for part in parts)
    head = http1.format_request(method, target, fields, length)
    if length <= JOIN:
        return [b"".join([head, *parts])], None
    return [head, *parts], None
