"""The client's side of one connection: one request out, one response in, straight into its buffer."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable, Iterator
from typing import Final, cast

from cloister.errors import FormatError, TransportError
from cloister.net import http1
from cloister.net.body import Body
from cloister.net.http1 import ResponseHead
from cloister.net.messages import JOIN, Answer, Buffer, Limits, Pieces, Tap

_SEND: Final = 1 << 20  # bytes that the kernel may hold for a local peer: a request, mostly, in one write
_STALE: Final = select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLRDHUP


class Exchange(asyncio.BufferedProtocol):
    """One connection of an `Upstream`.

    `begin` writes a request; `answer` waits for the whole response, which may come before the request's end:
    the rest is then not written. A response can be read by parts instead: `head` waits for its head, and
    `fill` for exactly as many bytes of its body as a buffer holds, with reading paused in between. Each waits
    ``until`` a time of the loop's clock.

    Args:
        limits: ``max_head`` and ``max_fields`` hold for responses, ``max_body`` for those of `answer`.
        tap: Sees every byte.
        loop: The running loop.
        forget: Is called with this when the connection is gone.
    """

    def __init__(
        self,
        limits: Limits,
        tap: Tap | None,
        loop: asyncio.AbstractEventLoop,
        forget: Callable[[Exchange], None],
    ) -> None:
        self._limits = limits
        self._tap = tap
        self._loop = loop
        self._forget = forget
        self._transport: asyncio.Transport
        self._poll = select.poll()
        self._head = bytearray(limits.max_head)
        self._filled = 0
        self._target: memoryview | None = None  # the buffer that the body is read into
        self._got = 0
        self._waiter: asyncio.Future[None] | None = None
        self._method = b""
        self._body: Body | Iterator[Buffer] | None = None  # of the request, while it is written
        self._owed = 0  # bytes of the request's body that are still to be written
        self._slow = False  # whether the peer reads more slowly than is written
        self._parts = False  # whether the response is read by parts
        self._response: ResponseHead
        self._content = bytearray()
        self._left = 0  # bytes of the response's body that are still to come
        self._lost: Exception | None = None
        self._keep_alive = True
        self._tapped = 0
        self.last_used = loop.time()

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        self._transport = cast(asyncio.Transport, transport)
        connection = transport.get_extra_info("socket")
        self._transport.set_write_buffer_limits(0)  # what is written leaves now, or the peer is slow
        if connection.family == socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND)
        self._poll.register(connection.fileno(), _STALE)
        if self._tap is not None:
            self._tapped = self._tap.opened("upstream")

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._target is not None:
            return self._target[self._got :]
        return memoryview(self._head)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take in the bytes that were read."""
        if self._tap is not None:
            self._tap.received(self._tapped, self.get_buffer(-1)[:nbytes])
        if self._target is not None:
            self._got += nbytes
            if self._got == len(self._target):
                self._target = None
                self._resolve()
            return
        self._filled += nbytes
        if self._waiter is None or self._waiter.done():
            self._fail("the peer spoke without being asked")
        else:
            self._read_head()

    def pause_writing(self) -> None:
        """The peer reads more slowly than the request is written."""
        self._slow = True

    def resume_writing(self) -> None:
        """What was written has left."""
        self._slow = False
        self._write_on()

    def eof_received(self) -> bool:
        """Close."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail whatever waits."""
        self._fail("the peer closed the connection", code="transport.closed")
        self._forget(self)

    # --- what an Upstream calls ---

    @property
    def left(self) -> int:
        """Bytes of the response's body that are still to come."""
        return self._left

    @property
    def stale(self) -> bool:
        """Whether an idle connection can't be used: closed, or with something to read, such as its end."""
        return self._lost is not None or self._transport.is_closing() or bool(self._poll.poll(0))

    @property
    def reusable(self) -> bool:
        """Whether the response is complete and the connection stays open for another request."""
        complete = self._left == 0 and self._filled == 0 and self._target is None and self._waiter is None
        # A peer that answered before it read the whole request will take the rest of it for another request.
        written = self._owed == 0 and self._transport.get_write_buffer_size() == 0
        alive = self._lost is None and not self._transport.is_closing()
        return self._keep_alive and complete and written and alive

    def begin(
        self,
        method: bytes,
        parts: list[Buffer],
        body: Body | Pieces | None = None,
        *,
        by_parts: bool = False,
    ) -> None:
        """Write a request, or its beginning and the rest as it comes. From here on its bytes count as sent.

        Args:
            method: Of the request.
            parts: Its head, and its body where that is there as a whole.
            body: Its body where that isn't; `Pieces` are made no faster than the peer reads.
            by_parts: Whether `head` and `fill` read the response, not `answer`.
        """
        self._method, self._parts, self._keep_alive = method, by_parts, False
        if self._lost is not None:
            return
        self._owed = 0 if body is None else len(body)
        if isinstance(body, Body):
            body.watcher, self._body = self._write_on, body
            if body.received <= JOIN:
                parts = [b"".join((*parts, body.view[: body.received]))]
                self._owed -= body.received
        elif body is not None:
            self._body = body.pieces()
        for part in parts:
            self._write(part)
        if self._owed:
            self._write_on()

    async def answer(self, until: float) -> Answer:
        """Wait for the whole response."""
        await self._wait(until)
        head, content = self._response, self._content
        self._content = bytearray()
        return Answer(status=head.status, body=content, content_type=head.content_type, fields=head.further)

    async def head(self, until: float) -> ResponseHead:
        """Wait for the head of the final response."""
        await self._wait(until)
        return self._response

    async def fill(self, target: memoryview, until: float) -> None:
        """Read exactly ``len(target)`` bytes of the body."""
        if len(target) > self._left:
            raise TransportError("the response is shorter than that", code="transport.format")
        if not self._begin_fill(target):
            if self._lost is None and not self._transport.is_closing():
                self._transport.resume_reading()
            await self._wait(until)

    def idle(self) -> None:
        """Watch for the end of the connection while it waits for another request."""
        self.last_used = self._loop.time()
        if self._parts:
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close now."""
        self._stop()
        self._transport.abort()

    # --- writing ---

    def _write(self, part: Buffer) -> None:
        if self._tap is not None:
            self._tap.sent(self._tapped, part)
        self._transport.write(part)

    def _write_on(self) -> None:
        """Write what there is of the request's body; called whenever there may be more."""
        body = self._body
        if body is None or self._slow:
            return None
        try:
            piece = body.since(len(body) - self._owed) if isinstance(body, Body) else next(body, None)
            if piece is None or len(piece) > self._owed:
                raise TransportError("the body has another length than was said", code="transport.format")
        except Exception as error:  # the rest will not come, or what makes the pieces failed
            return self._lose(error)
        if piece:
            self._owed -= len(piece)
            self._write(piece)
        if self._owed == 0:
            self._stop()
        elif not isinstance(body, Body):
            self._loop.call_soon(self._write_on)  # the loop writes between two pieces, not within one
        return None

    def _stop(self) -> None:
        """Write no more of the request."""
        if isinstance(self._body, Body):
            self._body.watcher = None
        self._body = None

    # --- reading ---

    async def _wait(self, until: float) -> None:
        if self._lost is not None:
            raise self._lost
        self._waiter = self._loop.create_future()
        timer = self._loop.call_at(until, self._expire)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _expire(self) -> None:
        self._fail("the peer took too long", code="transport.timeout")

    def _read_head(self) -> None:
        while (end := self._head.find(http1.END, 0, self._filled)) >= 0:
            end += len(http1.END)
            try:
                head = http1.parse_response(memoryview(self._head)[:end], self._limits)
            except FormatError as error:
                return self._fail(f"not a response: {error.message}")
            self._drop(end)
            if head.status >= 200:
                return self._take_head(head)
            if head.status == 101:
                return self._fail("the peer changed the protocol")
        if self._filled == len(self._head):
            return self._fail("the head of the response is too large")
        return None

    def _take_head(self, head: ResponseHead) -> None:
        expected = http1.has_body(head.status, self._method)
        if expected and head.length is None:
            return self._fail("a response without its length")
        self._stop()
        self._response, self._keep_alive = head, head.keep_alive
        self._left = head.length or 0 if expected else 0
        if self._parts:
            return self._resolve()
        if self._left > self._limits.max_body:
            return self._lose(
                TransportError(
                    "the response is too large",
                    code="transport.too-large",
                    expected=f"at most {self._limits.max_body} B",
                    actual=self._left,
                )
            )
        self._content = bytearray(self._left)
        if self._begin_fill(memoryview(self._content)):
            self._resolve()
        return None

    def _begin_fill(self, target: memoryview) -> bool:
        """Read into ``target`` from now on; whether it is full already."""
        count = min(self._filled, len(target))
        target[:count] = memoryview(self._head)[:count]
        self._drop(count)
        self._left -= len(target)
        if count == len(target):
            return True
        self._target, self._got = target, count
        return False

    def _drop(self, count: int) -> None:
        rest = self._filled - count
        self._head[:rest] = self._head[count : self._filled]
        self._filled = rest

    def _resolve(self) -> None:
        if self._parts:
            self._transport.pause_reading()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, message: str, *, code: str = "transport.format") -> None:
        self._lose(TransportError(message, code=code))

    def _lose(self, error: Exception) -> None:
        self._lost = self._lost or error
        self.abort()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._lost)
