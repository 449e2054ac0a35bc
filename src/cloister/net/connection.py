"""The server's side of one connection: one request at a time, read straight into the buffer its handler owns.

A connection passes through four states. HEAD collects a head in a buffer of fixed size; BODY fills a buffer
of exactly the declared length, whose front the handler may use already; BUSY waits for the handler and for
the peer to read the answer, and reads no more than the head's buffer holds, so that neither pipelined
requests nor a slow reader grow memory, and the connection's end is seen; DISCARD has refused, or answered
before the body's end, and drops what still arrives, because closing a socket with unread bytes would destroy
the answer before the peer reads it.
"""

from __future__ import annotations

import asyncio
import enum
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, TypeAlias, cast

from cloister.errors import FormatError
from cloister.net import http1
from cloister.net.body import EAGER, Body
from cloister.net.guest import Guest
from cloister.net.messages import JOIN, Answer, Buffer, Fields, Head, Limits, Tap

Handler: TypeAlias = Callable[[Head, Body], Awaitable[Answer]]
Get: TypeAlias = Callable[[], "Answer | Awaitable[Answer]"]
ROUTE: Final = b"/ohttp"
_LINGER: Final = 1.0  # seconds that a refused peer has to read its refusal
_logger = logging.getLogger("cloister.net")


class Member(Protocol):
    """A connection as the server that owns it sees it."""

    def tick(self, now: float) -> None:
        """Drop the connection if its time is over; ``now`` is the loop's clock."""

    def shut(self) -> None:
        """Close now if idle, else after the request in progress."""

    def abort(self) -> None:
        """Close now, whatever is in progress."""


@dataclass(slots=True, kw_only=True)
class Shared:
    """What the connections of one server share."""

    handler: Handler
    gets: Mapping[bytes, Get]
    other: Callable[[], asyncio.Protocol] | None
    limits: Limits
    tap: Tap | None
    loop: asyncio.AbstractEventLoop
    cancel: bool = False  # handlers whose peer is gone
    members: set[Member] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    buffered: int = 0  # bytes of request bodies in memory
    closing: bool = False


class _State(enum.Enum):
    HEAD = enum.auto()
    BODY = enum.auto()
    BUSY = enum.auto()
    DISCARD = enum.auto()
    GONE = enum.auto()


class Connection(asyncio.BufferedProtocol):
    """One connection of a `FrontServer`."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._transport: asyncio.Transport
        self._state = _State.GONE
        self._deadline = math.inf  # by the loop's clock
        self._head = bytearray(shared.limits.max_head)
        self._filled = 0  # bytes of _head that hold received bytes
        self._body = Body(0)
        self._task: asyncio.Task[None] | None = None  # of the request in progress
        self._held = 0  # bytes counted in shared.buffered for this connection
        self._writable = asyncio.Event()
        self._writable.set()
        self._tapped = 0
        self._since = 0.0  # when it began to wait for a head, or bytes of a body came, by the loop's clock
        self._seen = 0  # bytes of the body that had come then
        self._served = False  # whether a whole head has come

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start waiting for a head, or refuse when too many are connected."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(0)  # what is written leaves now, or the peer is slow
        shared = self._shared
        if shared.tap is not None:
            self._tapped = shared.tap.opened("front")
        full = len(shared.members) >= shared.limits.max_connections and not self._displace()
        shared.members.add(self)
        self._state = _State.HEAD
        self._since = shared.loop.time()
        self._deadline = self._since + shared.limits.head_timeout
        if full or shared.closing:
            self._refuse(503, ((b"retry-after", b"1"),))

    def _displace(self) -> bool:
        """Where all places are taken, drop the connection that has waited longest for a whole head.

        Those that never sent one go first, then those between two requests.
        """
        waiting = (each for each in self._shared.members if isinstance(each, Connection) and each._waiting)
        oldest = min(waiting, key=lambda each: (each._served, each._since), default=None)
        if oldest is not None:
            oldest.abort()
            self._shared.members.discard(oldest)
        return oldest is not None

    @property
    def _waiting(self) -> bool:
        return self._state is _State.HEAD

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._state is _State.BODY:
            return self._body.view[self._body.received :]
        if self._state is _State.DISCARD:
            return memoryview(self._head)
        return memoryview(self._head)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take in the bytes that were read."""
        if self._shared.tap is not None:
            self._shared.tap.received(self._tapped, self.get_buffer(-1)[:nbytes])
        if self._state is _State.BODY:
            if not self._body.lazy or self._hold(nbytes, large=True):
                self._body.advance(nbytes)
                if self._body.complete:
                    self._busy()
        elif self._state is _State.BUSY:  # pipelined; nobody may send more than fits before the answer
            self._filled += nbytes
            if self._filled == len(self._head):
                self._transport.pause_reading()
        elif self._state is not _State.DISCARD:
            if self._filled == 0:
                self._deadline = self._shared.loop.time() + self._shared.limits.head_timeout
            self._filled += nbytes
            if self._state is _State.HEAD:
                self._advance()

    def eof_received(self) -> bool:
        """Close: a request that isn't complete never will be, and of one that is, nobody waits any more."""
        return False

    def pause_writing(self) -> None:
        """The peer reads more slowly than answers are written."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """What was written has left."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and tell the handler in progress (`Body.abandoned`).

        It runs to its end, for what it does may not be divisible, unless its server cancels handlers.
        """
        self._body.fail()
        self._state = _State.GONE
        if self._shared.cancel and self._task is not None:
            self._task.cancel()
            self._release()  # a task that hadn't begun yet never comes to it
        self._shared.members.discard(self)
        self._writable.set()

    # --- what the server calls ---

    def tick(self, now: float) -> None:
        """Drop the connection if its time is over: a slow head, a slow body, a slow reader, or just idle."""
        if self._state is _State.BODY and self._seen != self._body.received:
            self._seen, self._since = self._body.received, now
        halted = self._state is _State.BODY and now - self._since >= self._shared.limits.stall_timeout
        if now < self._deadline and not halted:
            return
        started = self._state is _State.HEAD and self._filled > 0
        if started or self._state is _State.BODY:
            self._refuse(408)
        else:
            self._transport.abort()

    def shut(self) -> None:
        """Close now if idle, else after the request in progress."""
        if self._state is _State.DISCARD or (self._state is _State.HEAD and self._filled == 0):
            self._transport.close()

    def abort(self) -> None:
        """Close now, whatever is in progress."""
        self._transport.abort()

    # --- reading ---

    def _advance(self) -> None:
        """Look for a complete head among the bytes that are there, and act upon it."""
        end = self._head.find(http1.END, 0, self._filled)
        if end < 0:
            if self._filled == len(self._head):
                self._refuse(431)
            return
        end += len(http1.END)
        try:
            request = http1.parse_request(memoryview(self._head)[:end], self._shared.limits)
        except FormatError as error:
            self._refuse(http1.status_of(error))
            return
        path = request.target
        self._served = True
        if path == ROUTE:
            self._expect_body(request, end)
        elif path in self._shared.gets:
            self._take_get(request, end)
        elif self._shared.other is not None:
            self._hand_over(self._shared.other)
        else:
            self._refuse(404)

    def _expect_body(self, request: Head, end: int) -> None:
        """Check all that can be checked before a byte of the body is allocated; then receive it."""
        shared, length = self._shared, request.length
        expect = request.fields.get(b"expect", b"").lower()
        if request.method != b"POST":
            return self._refuse(405, ((b"allow", b"POST"),))
        if length is None:
            return self._refuse(411)
        if length > shared.limits.max_body:
            return self._refuse(413)
        if expect not in (b"", b"100-continue"):
            return self._refuse(417)
        got = min(self._filled - end, length)
        if not self._hold(got if length > EAGER else length, large=length > EAGER):
            return None
        self._body = body = Body(length)
        body.view[:got] = memoryview(self._head)[end : end + got]
        body.advance(got)
        self._drop(end + got)
        self._state = _State.BODY
        self._since = shared.loop.time()
        self._seen = 0
        self._deadline = self._since + shared.limits.transfer_timeout(length)
        self._start(request, partial(shared.handler, request, body))
        if body.complete:
            self._busy()
        elif expect:
            self._write(http1.CONTINUE)
        return None

    def _hold(self, count: int, *, large: bool) -> bool:
        """Count bytes of bodies that are in memory; refuses the request that goes beyond the limit.

        Large bodies get three quarters of it, so that four of them that wait don't shut out everybody else.
        """
        shared = self._shared
        most = shared.limits.max_buffered * (3 if large else 4) // 4
        if shared.buffered + count > most:
            self._refuse(503, ((b"retry-after", b"1"),))
            return False
        shared.buffered += count
        self._held += count
        return True

    def _take_get(self, request: Head, end: int) -> None:
        if request.method not in (b"GET", b"HEAD"):
            return self._refuse(405, ((b"allow", b"GET, HEAD"),))
        if request.length or request.chunked:
            return self._refuse(400)
        self._drop(end)
        self._start(request, partial(_await, self._shared.gets[request.target]))
        return self._busy()

    def _hand_over(self, other: Callable[[], asyncio.Protocol]) -> None:
        """Give the connection, and every byte read from it so far, to a protocol of another kind.

        uvloop chooses between its two ways of reading when reading starts, so a protocol may only be
        exchanged while reading is paused.
        """
        unread = bytes(memoryview(self._head)[: self._filled])
        shared, transport = self._shared, self._transport
        self._state = _State.GONE
        shared.members.discard(self)
        guest = Guest(other(), shared.members, shared.limits.guest_timeout, shared.loop.time)
        transport.pause_reading()
        transport.set_write_buffer_limits()
        transport.set_protocol(guest)
        guest.connection_made(transport, shared.tap, self._tapped)
        transport.resume_reading()
        guest.feed(unread)

    def _drop(self, count: int) -> None:
        """Remove the first ``count`` bytes from the head buffer, whose size never changes."""
        rest = self._filled - count
        self._head[:rest] = self._head[count : self._filled]
        self._filled = rest

    # --- answering ---

    def _busy(self) -> None:
        """The request is there; read no other before it was answered."""
        self._state = _State.BUSY
        self._deadline = math.inf  # how long an answer may take is its handler's to decide

    def _start(self, request: Head, call: Callable[[], Awaitable[Answer]]) -> None:
        self._task = task = self._shared.loop.create_task(self._respond(request, call))
        self._shared.tasks.add(task)
        task.add_done_callback(self._shared.tasks.discard)

    async def _respond(self, request: Head, call: Callable[[], Awaitable[Answer]]) -> None:
        keep = request.keep_alive
        try:
            answer = await call()
            head = http1.format_answer(answer, keep_alive=keep and not self._shared.closing)
        except asyncio.CancelledError:
            self._transport.abort()
            raise
        except Exception as error:
            # Neither the peer nor the log learns more: a message or a traceback may hold data of a request.
            _logger.error("a handler failed: %s", type(error).__name__)
            answer, keep = Answer(status=500), False
            head = http1.format_answer(answer, keep_alive=False)
        finally:
            self._release()
            self._task = None
        if self._state in (_State.GONE, _State.DISCARD):
            return
        body = answer.body if http1.has_body(answer.status, request.method) else b""
        if self._state is _State.BODY:
            head = http1.format_answer(answer, keep_alive=False)
            linger = max(_LINGER, self._shared.limits.transfer_timeout(len(body)) if body else 0.0)
            self._end(lambda: self._write_message(head, body), linger)
            return
        self._write_message(head, body)
        if not self._writable.is_set():
            timeout = self._shared.limits.transfer_timeout(len(body))
            self._deadline = self._shared.loop.time() + timeout
            await self._writable.wait()
        self._next(keep=keep and not self._shared.closing)

    def _next(self, *, keep: bool) -> None:
        """After an answer: the next request, which may already be here."""
        if self._state is _State.GONE:
            return
        if not keep:
            self._transport.close()
            self._deadline = self._shared.loop.time() + self._shared.limits.body_timeout
            return
        limits = self._shared.limits
        self._state = _State.HEAD
        wait = limits.head_timeout if self._filled else limits.idle_timeout
        self._since = self._shared.loop.time()
        self._deadline = self._since + wait
        if self._filled:
            self._advance()
        alive = self._state is not _State.GONE and not self._transport.is_closing()
        if alive and self._filled < len(self._head):  # while BUSY, too: the peer's end must be seen
            self._transport.resume_reading()

    def _refuse(self, status: int, fields: Fields = ()) -> None:
        """Answer with an empty body and close, leaving the peer a moment to read it."""
        head = http1.format_answer(Answer(status=status, fields=fields), keep_alive=False)
        self._end(lambda: self._write(head))

    def _end(self, write: Callable[[], None], linger: float = _LINGER) -> None:
        """Write the last answer; drop what still arrives until the peer has read it, for so many seconds."""
        self._body.fail()
        self._filled = 0
        self._state = _State.DISCARD
        self._deadline = self._shared.loop.time() + linger
        write()
        if not self._transport.is_closing():
            self._transport.write_eof()
            self._transport.resume_reading()

    def _write_message(self, head: bytes, body: Buffer) -> None:
        if len(body) <= JOIN:
            self._write(head + body)
        else:
            self._write(head)
            self._write(body)

    def _write(self, data: Buffer) -> None:
        if self._shared.tap is not None:
            self._shared.tap.sent(self._tapped, data)
        self._transport.write(data)

    def _release(self) -> None:
        self._body = Body(0)  # a connection that waits for its next request keeps nothing of this one
        self._shared.buffered -= self._held
        self._held = 0


async def _await(get: Get) -> Answer:
    answer = get()
    return await answer if inspect.isawaitable(answer) else answer
