from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import UsageError
from cloister.net.body import Body
from cloister.net.connection import Connection
from cloister.net.front import Answer, FrontServer, Head, Limits, serve
from support.fronts import whole

from .conftest import Go

POST = b"POST /ohttp HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n%s\r\n"


@whole
async def echo(head: Head, body: memoryview) -> Answer:
    return Answer(status=200, body=body, content_type=b"a/b")


class Raw:
    """A client that sends just what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, front: FrontServer) -> Raw:
        return cls(*await asyncio.open_connection("127.0.0.1", front.port))

    async def answer(self) -> tuple[int, bytes, bytes]:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return int(head.split(b" ")[1]), head, await self.reader.readexactly(length)

    async def ask(self, raw: bytes) -> tuple[int, bytes, bytes]:
        self.writer.write(raw)
        return await self.answer()

    async def closed(self) -> bool:
        return await self.reader.read() == b""

    async def end(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


async def exchange(raw: bytes, **options: Any) -> tuple[int, bytes, bool]:
    """One request to a fresh server: status, body, and whether the connection was then closed."""
    front = await serve(options.pop("handler", echo), **options)
    client = await Raw.connect(front)
    status, _, body = await client.ask(raw)
    try:
        closed = await asyncio.wait_for(client.closed(), 0.2)
    except TimeoutError:
        closed = False
    await client.end()
    await front.close()
    return status, body, closed


REFUSED = {
    "no length": (b"POST /ohttp HTTP/1.1\r\nhost: a\r\n\r\n", 411),
    "chunks": (b"POST /ohttp HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    "two framings": (
        b"POST /ohttp HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n",
        400,
    ),
    "two lengths": (
        b"POST /ohttp HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\ncontent-length: 44\r\n\r\n",
        400,
    ),
    "space before the colon": (b"POST /ohttp HTTP/1.1\r\nhost: a\r\ncontent-length : 4\r\n\r\nabcd", 400),
    "folded": (b"POST /ohttp HTTP/1.1\r\nhost: a\r\nx: a\r\n b\r\ncontent-length: 0\r\n\r\n", 400),
    "another method": (b"PUT /ohttp HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n", 405),
    "another expectation": (POST % (4, b"expect: tea\r\n"), 417),
    "another path": (b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n", 404),
    "large head": (b"GET /" + b"a" * 20_000, 431),
    "many fields": (b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: 1\r\n" % n for n in range(65)) + b"\r\n", 431),
    "1 GiB": (POST % (1 << 30, b""), 413),
    "1 GiB, expecting": (POST % (1 << 30, b"expect: 100-continue\r\n"), 413),
    "10^15 bytes": (POST % (10**15 - 1, b""), 413),
}


@pytest.mark.parametrize(("raw", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(go: Go, raw: bytes, expected: int) -> None:
    status, body, closed = go(exchange(raw))
    assert (status, body, closed) == (expected, b"", True)


def test_an_over_long_body_is_refused_before_it_is_read_or_allocated(go: Go) -> None:
    async def main() -> None:
        seen: list[int] = []

        @whole
        async def handler(head: Head, body: memoryview) -> Answer:
            seen.append(len(body))
            return Answer()

        front = await serve(handler, limits=Limits(max_body=1000))
        client = await Raw.connect(front)
        # The client goes on sending; it still gets to read the refusal, not a connection reset.
        client.writer.write(POST % (1001, b"") + bytes(500_000))
        status, head, _ = await client.answer()
        assert (status, b"connection: close" in head) == (413, True)
        assert await client.closed()
        assert seen == []
        assert front._shared.buffered == 0
        await client.end()
        await front.close()

    go(main())


def test_a_slow_head_is_given_up(go: Go) -> None:
    async def main() -> None:
        front = await serve(echo, limits=Limits(head_timeout=0.1))
        client = await Raw.connect(front)
        for piece in (b"POST /ohttp HTTP/1.1\r\n", b"host: a\r\n", b"x: y\r\n"):
            client.writer.write(piece)
            await asyncio.sleep(0.05)
        status, _, _ = await client.answer()
        assert status == 408
        assert await client.closed()
        silent = await Raw.connect(front)
        assert await silent.closed()
        await client.end()
        await silent.end()
        await front.close()

    go(main())


def test_a_slow_body_is_given_up(go: Go) -> None:
    async def main() -> None:
        front = await serve(echo, limits=Limits(body_timeout=0.1))
        client = await Raw.connect(front)
        client.writer.write(POST % (100, b"") + b"abc")
        assert (await client.answer())[0] == 408
        assert await client.closed()
        assert front._shared.buffered == 0
        await client.end()
        await front.close()

    go(main())


def test_an_idle_connection_is_given_up(go: Go) -> None:
    async def main() -> None:
        front = await serve(echo, limits=Limits(idle_timeout=0.1))
        client = await Raw.connect(front)
        assert (await client.ask(POST % (0, b"")))[0] == 200
        assert await client.closed()
        await client.end()
        await front.close()

    go(main())


def test_a_truncated_body_never_reaches_the_handler(go: Go) -> None:
    async def main() -> None:
        called = False

        @whole
        async def handler(head: Head, body: memoryview) -> Answer:
            nonlocal called
            called = True
            return Answer()

        front = await serve(handler)
        client = await Raw.connect(front)
        client.writer.write(POST % (100, b"") + b"x" * 99)
        client.writer.write_eof()
        assert await client.closed()
        await client.end()
        assert not called
        assert front._shared.buffered == 0
        await front.close()

    go(main())


def test_bodies_in_memory_have_a_limit_over_all_connections(go: Go) -> None:
    async def main() -> None:
        front = await serve(echo, limits=Limits(max_body=1000, max_buffered=1500))
        first, second = await Raw.connect(front), await Raw.connect(front)
        first.writer.write(POST % (1000, b"") + bytes(900))
        await asyncio.sleep(0.05)
        assert (await second.ask(POST % (1000, b"") + bytes(1000)))[0] == 503
        assert (await first.ask(bytes(100)))[0] == 200
        third = await Raw.connect(front)
        assert (await third.ask(POST % (1000, b"") + bytes(1000)))[0] == 200
        for client in (first, second, third):
            await client.end()
        await front.close()

    go(main())


def test_one_connection_too_many(go: Go) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        @whole
        async def held(head: Head, body: memoryview) -> Answer:
            await gate.wait()
            return Answer()

        front = await serve(held, limits=Limits(max_connections=1))
        first = await Raw.connect(front)
        asked = asyncio.ensure_future(first.ask(POST % (0, b"")))
        await asyncio.sleep(0.05)
        second = await Raw.connect(front)
        assert (await second.answer())[0] == 503
        assert await second.closed()
        gate.set()
        assert (await asked)[0] == 200
        await first.end()
        await second.end()
        await front.close()

    go(main())


def test_silent_connections_make_room_for_those_who_ask(go: Go) -> None:
    """Whoever holds every place without asking for anything keeps nobody out."""

    async def main() -> None:
        front = await serve(echo, limits=Limits(max_connections=8))
        regular = await Raw.connect(front)
        assert (await regular.ask(POST % (0, b"")))[0] == 200
        silent = [await Raw.connect(front) for _ in range(6)]
        partial = await Raw.connect(front)
        partial.writer.write(b"POST /oh")
        await asyncio.sleep(0.05)
        for _ in range(20):
            client = await Raw.connect(front)
            assert (await client.ask(POST % (3, b"") + b"abc"))[2] == b"abc"
            await client.end()
        assert await silent[0].closed()
        assert (await regular.ask(POST % (0, b"")))[0] == 200  # served before, so it went last
        for each in (*silent, partial, regular):
            await each.end()
        await front.close()

    go(main())


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_echo_over_a_kept_connection(go: Go, size: int) -> None:
    async def main() -> None:
        front = await serve(echo)
        client = await Raw.connect(front)
        data = os.urandom(size)
        for _ in range(3):
            status, head, body = await client.ask(POST % (size, b"") + data)
            assert (status, body) == (200, data)
            assert b"connection: close" not in head
        await client.end()
        await front.close()

    go(main())


def test_pipelined_requests_are_answered_one_at_a_time_in_order(go: Go) -> None:
    async def main() -> None:
        running = most = 0

        @whole
        async def handler(head: Head, body: memoryview) -> Answer:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.005)
            running -= 1
            return Answer(body=bytes(body))

        front = await serve(handler)
        client = await Raw.connect(front)
        client.writer.write(b"".join(POST % (5, b"") + b"no %02d" % n for n in range(20)))
        for n in range(20):
            assert (await client.answer())[2] == b"no %02d" % n
        assert most == 1
        await client.end()
        await front.close()

    go(main())


def test_a_request_in_single_bytes(go: Go) -> None:
    async def main() -> None:
        front = await serve(echo)
        client = await Raw.connect(front)
        for byte in POST % (3, b"") + b"abc":
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await client.answer())[2] == b"abc"
        await client.end()
        await front.close()

    go(main())


def test_expect_continue(go: Go) -> None:
    async def main() -> None:
        front = await serve(echo)
        client = await Raw.connect(front)
        client.writer.write(POST % (3, b"Expect: 100-Continue\r\n"))
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await client.ask(b"abc"))[2] == b"abc"
        await client.end()
        await front.close()

    go(main())


def test_http_1_0_closes(go: Go) -> None:
    assert go(exchange(b"POST /ohttp HTTP/1.0\r\ncontent-length: 1\r\n\r\na")) == (200, b"a", True)


def test_a_failing_handler_is_a_bare_500_and_logs_only_its_type(
    go: Go, caplog: pytest.LogCaptureFixture
) -> None:
    @whole
    async def handler(head: Head, body: memoryview) -> Answer:
        raise ValueError("the secret input")

    with caplog.at_level(logging.DEBUG):
        assert go(exchange(POST % (0, b""), handler=handler)) == (500, b"", True)
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


def test_an_answer_that_would_split_is_a_500(go: Go) -> None:
    @whole
    async def handler(head: Head, body: memoryview) -> Answer:
        return Answer(fields=[(b"x", b"a\r\ny: b")])

    assert go(exchange(POST % (0, b""), handler=handler))[0] == 500


def test_outer_gets(go: Go) -> None:
    async def document() -> Answer:
        return Answer(body=b"doc", content_type=b"a/b")

    async def main() -> None:
        front = await serve(echo, gets={b"/healthz": lambda: Answer(body=b"ok"), b"/doc": document})
        client = await Raw.connect(front)
        assert (await client.ask(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"))[2] == b"ok"
        assert (await client.ask(b"GET /doc HTTP/1.1\r\nhost: a\r\n\r\n"))[2] == b"doc"
        client.writer.write(b"HEAD /doc HTTP/1.1\r\nhost: a\r\n\r\n")
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 3" in head
        assert (await client.ask(POST % (1, b"") + b"x"))[2] == b"x"
        assert (await client.ask(b"POST /doc HTTP/1.1\r\nhost: a\r\n\r\n"))[0] == 405
        await client.end()
        await front.close()

    go(main())


def test_a_get_with_a_body_is_refused(go: Go) -> None:
    gets = {b"/doc": lambda: Answer(body=b"doc")}
    raw = (
        b"GET /doc HTTP/1.1\r\nhost: a\r\ncontent-length: 30\r\n\r\n"
        + b"GET /doc HTTP/1.1\r\nhost: a\r\n\r\n"
    )
    assert go(exchange(raw, gets=gets)) == (400, b"", True)


def test_a_reader_that_does_not_read_is_dropped_and_holds_one_answer(go: Go) -> None:
    async def main() -> None:
        answered = 0

        @whole
        async def handler(head: Head, body: memoryview) -> Answer:
            nonlocal answered
            answered += 1
            return Answer(body=bytes(8 << 20))

        front = await serve(handler, limits=Limits(body_timeout=-127.8))  # 0.2 s for 8 MiB
        client = await Raw.connect(front)
        client.writer.transport.pause_reading()
        client.writer.write((POST % (0, b"")) * 10)
        await asyncio.sleep(0.1)
        assert front.connections == 1
        await asyncio.sleep(0.5)
        assert front.connections == 0
        assert answered == 1
        await client.end()
        await front.close()

    go(main())


class Shout(asyncio.Protocol):
    """Stands for uvicorn: answers whatever comes in upper case."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data.upper())  # type: ignore[attr-defined]


def test_handover_with_all_bytes_read(go: Go) -> None:
    async def main() -> None:
        front = await serve(echo, other=Shout)
        client = await Raw.connect(front)
        assert (await client.ask(POST % (3, b"") + b"abc"))[2] == b"abc"
        raw = b"PUT /other HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + b"b" * 50_000
        client.writer.write(raw)
        assert await client.reader.readexactly(len(raw)) == raw.upper()
        client.writer.write(b"more" * 100_000)
        assert await client.reader.readexactly(400_000) == b"MORE" * 100_000
        assert front.connections == 1
        await client.end()
        await front.close()

    go(main())


def test_handover_of_a_pipelined_request(go: Go) -> None:
    async def main() -> None:
        front = await serve(echo, other=Shout)
        client = await Raw.connect(front)
        second = b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n"
        assert (await client.ask(POST % (3, b"") + b"abc" + second))[2] == b"abc"
        assert await client.reader.readexactly(len(second)) == second.upper()
        await client.end()
        await front.close()

    go(main())


def test_a_malformed_head_is_never_handed_over(go: Go) -> None:
    raw = b"PUT /x HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n"
    assert go(exchange(raw, other=Shout))[0] == 400


def test_a_silent_guest_is_dropped(go: Go) -> None:
    async def main() -> None:
        front = await serve(echo, other=Shout, limits=Limits(guest_timeout=0.1))
        client = await Raw.connect(front)
        raw = b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n"
        client.writer.write(raw)
        await client.reader.readexactly(len(raw))
        with contextlib.suppress(ConnectionError):
            assert await client.reader.read() == b""
        assert front.connections == 0
        await client.end()
        await front.close()

    go(main())


def test_close_lets_a_request_finish_and_leaves_nothing(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        @whole
        async def slow(head: Head, body: memoryview) -> Answer:
            await asyncio.sleep(0.1)
            return Answer(body=b"done")

        path = tmp_path / "s.sock"
        front = await serve(slow, unix=path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        busy = Raw(*await asyncio.open_unix_connection(str(path)))
        idle = Raw(*await asyncio.open_unix_connection(str(path)))
        busy.writer.write(POST % (0, b""))
        await asyncio.sleep(0.03)
        closing = asyncio.ensure_future(front.close())
        assert await idle.closed()
        status, head, body = await busy.answer()
        assert (status, body, b"connection: close" in head) == (200, b"done", True)
        await closing
        assert not path.exists()
        await busy.end()
        await idle.end()

    go(main())


def test_close_drops_what_does_not_finish(go: Go) -> None:
    async def main() -> None:
        cancelled = asyncio.Event()

        @whole
        async def stuck(head: Head, body: memoryview) -> Answer:
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()
            return Answer()

        front = await serve(stuck)
        client = await Raw.connect(front)
        client.writer.write(POST % (0, b""))
        await asyncio.sleep(0.03)
        await front.close(0.05)
        assert cancelled.is_set()
        assert front.connections == 0
        await client.end()

    go(main())


def test_a_path_too_long_for_a_socket_is_refused(go: Go, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        go(serve(echo, unix=tmp_path / ("x" * 108)))
    assert caught.value.code == "net.unix-path"


def test_a_port_that_is_taken_is_our_error(go: Go) -> None:
    async def main() -> None:
        front = await serve(echo)
        with pytest.raises(UsageError):
            await serve(echo, port=front.port)
        await front.close()

    go(main())


# --- peers that go away ---


def test_a_handler_learns_that_its_peer_is_gone_and_runs_to_its_end(go: Go) -> None:
    async def main() -> None:
        seen: list[bool] = []
        called: list[int] = []
        done = asyncio.Event()

        async def slow(head: Head, body: Body) -> Answer:
            body.when_abandoned(lambda: called.append(1))
            seen.append(body.abandoned)
            while not body.abandoned:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            seen.append(bool(called))
            done.set()
            return Answer()

        front = await serve(slow)
        client = await Raw.connect(front)
        client.writer.write(POST % (3, b"") + b"abc")
        await asyncio.sleep(0.02)
        await client.end()
        await asyncio.wait_for(done.wait(), 1)
        assert (seen, called) == ([False, True], [1])
        await front.close()

    go(main())


def test_a_handler_is_cancelled_where_that_is_wanted(go: Go) -> None:
    async def main() -> None:
        ended: list[str] = []

        async def slow(head: Head, body: Body) -> Answer:
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
            return Answer()

        front = await serve(slow, cancel=True)
        leaving = [await Raw.connect(front) for _ in range(3)]
        for client in leaving:
            client.writer.write(POST % (3, b"") + b"abc")
        await asyncio.sleep(0.02)
        assert front._shared.buffered == 9
        for client in leaving:
            await client.end()
        await asyncio.sleep(0.05)
        assert ended == ["cancelled"] * 3
        assert (front._shared.buffered, front.connections, front._shared.tasks) == (0, 0, set())
        await front.close()

    go(main())


def test_a_handler_that_had_not_begun_leaves_nothing(go: Go) -> None:
    async def main() -> None:
        front = await serve(echo, cancel=True)
        client = await Raw.connect(front)
        await asyncio.sleep(0.02)
        (connection,) = front._shared.members
        raw = POST % (3, b"") + b"abc"
        assert isinstance(connection, Connection)
        connection.get_buffer(-1)[: len(raw)] = raw
        connection.buffer_updated(len(raw))  # its task begins in the next round
        connection.abort()
        connection.connection_lost(None)
        await asyncio.sleep(0.02)
        assert (front._shared.buffered, front._shared.tasks) == (0, set())
        await client.end()
        await front.close()

    go(main())


def test_what_is_pipelined_meanwhile_is_bounded(go: Go) -> None:
    """The end of a connection is seen while a request is in progress, and yet nobody can fill memory."""

    async def main() -> None:
        release = asyncio.Event()

        @whole
        async def slow(head: Head, body: memoryview) -> Answer:
            await release.wait()
            return Answer(body=bytes(body))

        limits = Limits(max_head=4096)
        front = await serve(slow, limits=limits)
        client = await Raw.connect(front)
        second = b"y" * 100_000
        client.writer.write(POST % (3, b"") + b"abc" + POST % (len(second), b"") + second)
        await asyncio.sleep(0.05)
        (connection,) = front._shared.members
        assert isinstance(connection, Connection)
        assert connection._filled == len(connection._head) == 4096
        assert front._shared.buffered == 3
        release.set()
        assert (await client.answer())[2] == b"abc"
        assert (await client.answer())[2] == second
        await client.end()
        await front.close()

    go(main())


def test_a_peer_that_closes_one_direction_is_gone(go: Go) -> None:
    async def main() -> None:
        lost = asyncio.Event()

        async def slow(head: Head, body: Body) -> Answer:
            body.when_abandoned(lost.set)
            await lost.wait()
            return Answer()

        front = await serve(slow)
        client = await Raw.connect(front)
        client.writer.write(POST % (3, b"") + b"abc")
        client.writer.write_eof()
        await asyncio.wait_for(lost.wait(), 1)
        assert await client.closed()
        await client.end()
        await front.close()

    go(main())
