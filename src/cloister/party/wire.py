"""A blocking client for one server of plain HTTP/1.1: one write for a request, exact reads for its answer.

A body of 600 KB passes through a general client in ten writes and three copies, each of which costs more than
its encryption. Here head and body leave in one call, and the answer is read into one array.

Nothing is ever sent twice. A request goes to a fresh connection again only while no byte of it was written;
after that, the caller gets a `TransportError` whose ``sent`` is true and decides for itself.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from typing import Final

from cloister.errors import FormatError, TransportError
from cloister.net import http1
from cloister.net.http1 import ResponseHead
from cloister.net.messages import Answer, Buffer, Fields, Limits, Pieces, pieces_of

_KEEP: Final = 20.0  # seconds; well below a front's idle timeout, so that it seldom closes first
_MAX_IDLE: Final = 16
_CONNECT: Final = 5.0  # seconds
_SILENCE: Final = 30.0  # seconds without a byte in either direction
_HINT: Final = "Check the URL, and that the service runs"


class Wire:
    """Kept-alive connections to one server; several threads may share it. Close it when done.

    Args:
        host: Name or address.
        port: TCP port.
        limits: ``max_body``, ``max_head`` and ``max_fields`` hold for answers.
        silence: Seconds that the server may take for its next byte.
    """

    def __init__(
        self, host: str, port: int, *, limits: Limits | None = None, silence: float = _SILENCE
    ) -> None:
        self._address = (host, port)
        self._limits = limits or Limits()
        self._silence = silence
        self._idle: list[_Connection] = []  # the last used at the end
        self._closed = False

    def request(
        self,
        method: bytes,
        target: bytes,
        fields: Fields,
        body: Buffer | Pieces,
        *,
        timeout: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> Answer:
        """Send one request and wait for the whole answer.

        Args:
            method: For example ``b"POST"``.
            target: Origin form.
            fields: Header fields but Content-Length, which follows from ``body``.
            body: Not copied.
            timeout: Seconds until the answer begins; its body then has its own, by its length.
            meanwhile: Is called once, when the request was written and the answer is awaited.

        Raises:
            TransportError: with ``sent``; its code is ``transport.connect``, ``.closed``, ``.timeout``,
                ``.format`` or ``.too-large``.
            UsageError: the request can't be written as HTTP/1.1.
        """
        head = http1.format_request(method, target, fields, len(body))
        until = time.monotonic() + timeout
        connection = self._begin(head, body, until, min(self._silence, timeout))
        keep = False
        try:
            if meanwhile is not None:
                meanwhile()
            answer, keep = connection.receive(method, until)
        finally:
            if keep and not self._closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
            else:
                connection.close()
        return answer

    def close(self) -> None:
        """Close the idle connections; those in use close with their requests."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _begin(self, head: bytes, body: Buffer | Pieces, until: float, silence: float) -> _Connection:
        """A connection on which the request was written: an idle one that still stands, or a new one."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            if not connection.stands:
                connection.close()
                continue
            connection.allow(silence)
            if connection.send(head, body, until):
                return connection
        connection = self._connect(min(_CONNECT, silence))
        connection.allow(silence)
        if not connection.send(head, body, until):
            raise TransportError(
                "the service closed the connection", code="transport.closed", hint=_HINT, sent=False
            )
        return connection

    def _connect(self, timeout: float) -> _Connection:
        if self._closed:
            raise TransportError("the connection pool is closed", code="transport.closed", sent=False)
        try:
            stream = socket.create_connection(self._address, timeout)
        except (OSError, UnicodeError) as error:  # a name that is no host name fails in its encoding
            raise TransportError(
                "the service could not be reached",
                code="transport.connect",
                claim="connection",
                expected=f"an answer from {self._address[0]}:{self._address[1]}",
                actual=reason_of(error),
                hint=_HINT,
                sent=False,
            ) from error
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Connection(stream, self._limits)


class _Connection:
    """One connection, used by one request at a time."""

    __slots__ = ("_filled", "_head", "_limits", "_stream", "_used", "_whole")

    def __init__(self, stream: socket.socket, limits: Limits) -> None:
        self._stream = stream
        self._limits = limits
        self._head = bytearray(limits.max_head)
        self._filled = 0  # bytes of _head that hold received bytes
        self._whole = False  # whether the last request was written to its end
        self._used = time.monotonic()

    @property
    def stands(self) -> bool:
        """Whether an idle connection can be used: neither old nor closed, and with nothing to read."""
        if time.monotonic() - self._used > _KEEP:
            return False
        poll = select.poll()
        poll.register(self._stream, select.POLLIN | select.POLLHUP | select.POLLERR)
        return not poll.poll(0)

    def allow(self, silence: float) -> None:
        """Let the server take so many seconds for its next byte."""
        if self._stream.gettimeout() != silence:
            self._stream.settimeout(silence)

    def send(self, head: bytes, body: Buffer | Pieces, until: float) -> bool:
        """Write a request; False where the connection was gone before a byte of it was written.

        A server may refuse before it has read everything, and then close. So once something was written, a
        broken connection is no error here: an answer may be there to be read. Where nothing was written, and
        where an error is raised, the connection is closed.
        """
        try:
            started = self._write(head, body, until)
        except BaseException:
            self.close()
            raise
        if not started:
            self.close()
        return started

    def _write(self, head: bytes, body: Buffer | Pieces, until: float) -> bool:
        """Write as much as the peer takes; whether that was anything."""
        rest, started = [memoryview(head)], False
        self._whole = False
        for piece in pieces_of(body):
            rest.append(memoryview(piece))
            while rest:
                try:
                    count = self._stream.sendmsg(rest)
                except TimeoutError:
                    raise _late(sent=started) from None
                except OSError:
                    return started
                started = True
                while rest and count >= len(rest[0]):
                    count -= len(rest.pop(0))
                if rest:
                    rest[0] = rest[0][count:]
                    if time.monotonic() > until:
                        raise _late()
        self._whole = True
        return True

    def receive(self, method: bytes, until: float) -> tuple[Answer, bool]:
        """Read the answer; says also whether the connection can be used again."""
        head = self._read_head(until)
        expected = http1.has_body(head.status, method)
        if expected and head.length is None:
            raise TransportError("a response without its length", code="transport.format")
        length = head.length or 0 if expected else 0
        if length > self._limits.max_body:
            raise TransportError(
                "the response is too large",
                code="transport.too-large",
                expected=f"at most {self._limits.max_body} B",
                actual=length,
            )
        body = self._read_body(length)
        self._used = time.monotonic()
        answer = Answer(status=head.status, body=body, content_type=head.fields.get(b"content-type", b""))
        return answer, head.keep_alive and self._whole and self._filled == 0

    def close(self) -> None:
        """Close."""
        self._stream.close()

    def _read_head(self, until: float) -> ResponseHead:
        while True:
            end = self._head.find(http1.END, 0, self._filled)
            if end >= 0:
                head = self._parse(end + len(http1.END))
                if head.status >= 200:
                    return head
                if head.status == 101:
                    raise TransportError("the peer changed the protocol", code="transport.format")
            elif self._filled == len(self._head):
                raise TransportError("the head of the response is too large", code="transport.format")
            else:
                self._filled += self._receive(memoryview(self._head)[self._filled :], until)

    def _parse(self, end: int) -> ResponseHead:
        try:
            head = http1.parse_response(memoryview(self._head)[:end], self._limits)
        except FormatError as error:
            raise TransportError(f"not a response: {error.message}", code="transport.format") from error
        self._drop(end)
        return head

    def _read_body(self, length: int) -> bytearray:
        body = bytearray(length)
        got = min(self._filled, length)
        body[:got] = memoryview(self._head)[:got]
        self._drop(got)
        until = time.monotonic() + self._limits.transfer_timeout(length)
        with memoryview(body) as view:
            while got < length:
                got += self._receive(view[got:], until)
        return body

    def _receive(self, target: memoryview, until: float) -> int:
        try:
            count = self._stream.recv_into(target)
        except TimeoutError:
            raise _late() from None
        except OSError as error:
            raise _gone() from error
        if count == 0:
            raise _gone()
        if time.monotonic() > until:
            raise _late()
        return count

    def _drop(self, count: int) -> None:
        """Remove the first ``count`` bytes from the head buffer, whose size never changes."""
        rest = self._filled - count
        self._head[:rest] = self._head[count : self._filled]
        self._filled = rest


def reason_of(error: BaseException) -> str:
    """Why a connection failed, in few words: what the system said, if it is among the causes of an error."""
    each: BaseException | None = error
    while each is not None:
        match each:
            case socket.gaierror() | UnicodeError():
                return "unknown host"
            case ConnectionRefusedError():
                return "connection refused"
            case TimeoutError():
                return "no answer in time"
            case OSError(strerror=str(text)) if text:
                return text
        each = each.__cause__ or each.__context__
    return type(error).__name__


def _late(*, sent: bool = True) -> TransportError:
    return TransportError("the service took too long", code="transport.timeout", sent=sent)


def _gone() -> TransportError:
    return TransportError("the service closed the connection", code="transport.closed")
