"""The client's side of one connection: one request out, one response in, straight into its buffer."""

from __future__ import annotations

import asyncio
import select
from typing import Final, cast

from cloister.errors import FormatError, TransportError
from cloister.net import http1
from cloister.net.http1 import ResponseHead
from cloister.net.messages import Buffer, Limits, Tap

_STALE: Final = select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLRDHUP


class Exchange(asyncio.BufferedProtocol):
    """One connection of an `Upstream`.

    `begin` writes a request; `head` waits for the head of its response; `fill` then reads exactly as many
    bytes of the body as its buffer holds. Reading is paused in between: nothing is read ahead of its reader.
    """

    def __init__(self, limits: Limits, tap: Tap | None, loop: asyncio.AbstractEventLoop) -> None:
        self._limits = limits
        self._tap = tap
        self._loop = loop
        self._transport: asyncio.Transport
        self._head = bytearray(limits.max_head)
        self._filled = 0
        self._target: memoryview | None = None  # the buffer that `fill` is filling
        self._got = 0
        self._waiter: asyncio.Future[ResponseHead | None] | None = None
        self._method = b""
        self._left = 0  # bytes of the response's body that are still to come
        self._lost: TransportError | None = None
        self._keep_alive = True
        self._tapped = 0
        self.last_used = loop.time()

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        self._transport = cast(asyncio.Transport, transport)
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
                self._transport.pause_reading()
                self._resolve(None)
            return
        self._filled += nbytes
        if self._waiter is None:
            self._fail("the peer spoke without being asked", code="transport.format")
        else:
            self._read_head()

    def eof_received(self) -> bool:
        """Close."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail whatever waits."""
        self._lose(TransportError("the peer closed the connection", code="transport.closed"))

    # --- what an Upstream calls ---

    @property
    def left(self) -> int:
        """Bytes of the response's body that are still to come."""
        return self._left

    @property
    def stale(self) -> bool:
        """Whether an idle connection can't be used: closed, or with something to read, such as its end."""
        if self._lost is not None or self._transport.is_closing():
            return True
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), _STALE)
        return bool(poll.poll(0))

    @property
    def reusable(self) -> bool:
        """Whether the response is complete and the connection stays open for another request."""
        complete = self._left == 0 and self._filled == 0 and self._waiter is None
        # A peer that answered before it read the whole request will take the rest of it for another request.
        written = self._transport.get_write_buffer_size() == 0
        alive = self._lost is None and not self._transport.is_closing()
        return self._keep_alive and complete and written and alive

    def begin(self, method: bytes, parts: list[Buffer]) -> None:
        """Write a request, or its beginning. From here on its bytes count as sent."""
        self._method = method
        self._keep_alive = False
        if self._lost is None and not self._transport.is_closing():
            self._transport.pause_reading()  # an answer to half a request waits until the rest was written
        for part in parts:
            self.write(part)

    def write(self, part: Buffer) -> None:
        """Write more of the request that was begun."""
        if self._tap is not None:
            self._tap.sent(self._tapped, part)
        self._transport.write(part)

    async def head(self) -> ResponseHead:
        """Wait for the head of the final response, whose ``length`` is then never None."""
        self._read_on()
        head = cast(ResponseHead, await self._wait())
        self._keep_alive = head.keep_alive
        return head

    async def fill(self, target: memoryview) -> None:
        """Read exactly ``len(target)`` bytes of the body."""
        if len(target) > self._left:
            raise TransportError("the response is shorter than that", code="transport.format")
        count = min(self._filled, len(target))
        target[:count] = memoryview(self._head)[:count]
        self._drop(count)
        if count < len(target):
            self._target, self._got = target, count
            self._read_on()
            await self._wait()
        self._left -= len(target)

    def idle(self) -> None:
        """Watch for the end of the connection while it waits for another request."""
        self.last_used = self._loop.time()
        self._read_on()

    def abort(self) -> None:
        """Close now."""
        self._transport.abort()

    # --- inside ---

    def _read_on(self) -> None:
        if self._lost is None and not self._transport.is_closing():
            self._transport.resume_reading()

    async def _wait(self) -> ResponseHead | None:
        if self._lost is not None:
            raise self._lost
        self._waiter = self._loop.create_future()
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def _read_head(self) -> None:
        while (end := self._head.find(http1.END, 0, self._filled)) >= 0:
            end += len(http1.END)
            try:
                head = http1.parse_response(memoryview(self._head)[:end], self._limits)
            except FormatError as error:
                return self._fail(f"not a response: {error.message}", code="transport.format")
            self._drop(end)
            if head.status >= 200:
                return self._take_head(head)
            if head.status == 101:
                return self._fail("the peer changed the protocol", code="transport.format")
        if self._filled == len(self._head):
            return self._fail("the head of the response is too large", code="transport.format")
        return None

    def _take_head(self, head: ResponseHead) -> None:
        expected = http1.has_body(head.status, self._method)
        if expected and head.length is None:
            return self._fail("a response without its length", code="transport.format")
        self._left = head.length or 0 if expected else 0
        self._transport.pause_reading()
        return self._resolve(head)

    def _drop(self, count: int) -> None:
        rest = self._filled - count
        self._head[:rest] = self._head[count : self._filled]
        self._filled = rest

    def _resolve(self, value: ResponseHead | None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(value)

    def _fail(self, message: str, *, code: str) -> None:
        self._lose(TransportError(message, code=code))
        self._transport.abort()

    def _lose(self, error: TransportError) -> None:
        self._lost = self._lost or error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._lost)
