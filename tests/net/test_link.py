from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from cloister.errors import NotFound, TransportError, UsageError
from cloister.net.front import Answer, Head, Limits, serve
from cloister.net.link import Peer, Upstream
from support.fronts import whole

from .conftest import Go


@whole
async def echo(head: Head, body: memoryview) -> Answer:
    return Answer(
        status=200, body=body, content_type=b"a/b", fields=[(b"x-seen", head.fields.get(b"x", b"-"))]
    )


class Scripted(asyncio.Protocol):
    """A peer that records what it gets and answers each arrival with the next of its lines."""

    def __init__(self, lines: list[bytes], seen: bytearray, then_close: bool) -> None:
        self.lines, self.seen, self.then_close = lines, seen, then_close

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        self.seen += data
        if self.lines:
            self.transport.write(self.lines.pop(0))
        if self.then_close and not self.lines:
            self.transport.close()


@asynccontextmanager
async def scripted(*lines: bytes, close: bool = False) -> AsyncIterator[tuple[Upstream, bytearray]]:
    seen = bytearray()
    script = list(lines)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Scripted(script, seen, close), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    upstream = Upstream(Peer(host="127.0.0.1", port=port), limits=Limits(max_body=1000, max_head=500))
    try:
        yield upstream, seen
    finally:
        await upstream.aclose()
        server.close()
        await asyncio.sleep(0.01)


BAD = {
    "chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "transport.format"),
    "no length": (b"HTTP/1.1 200 OK\r\n\r\nabc", "transport.format"),
    "two lengths": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        "transport.format",
    ),
    "not HTTP": (b"hello\r\n\r\n", "transport.format"),
    "another protocol": (b"HTTP/1.1 101 Switching\r\n\r\n", "transport.format"),
    "large head": (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 600, "transport.format"),
    "1 TiB": (b"HTTP/1.1 200 OK\r\ncontent-length: 1099511627776\r\n\r\n", "transport.too-large"),
    "truncated head": (b"HTTP/1.1 200 OK\r\ncont", "transport.closed"),
    "truncated body": (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n123456789", "transport.closed"),
    "nothing": (b"", "transport.closed"),
}


@pytest.mark.parametrize(("line", "code"), BAD.values(), ids=BAD.keys())
def test_refused_response(go: Go, line: bytes, code: str) -> None:
    async def main() -> None:
        async with scripted(line, close=code == "transport.closed") as (upstream, seen):
            with pytest.raises(TransportError) as caught:
                await upstream.request(b"POST", b"/ohttp", (), b"once", timeout=5)
            assert (caught.value.code, caught.value.sent) == (code, True)
            assert seen.count(b"once") == 1

    go(main())


def test_a_peer_that_is_not_there(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        for peer in (Peer(unix=tmp_path / "none"), Peer(host="127.0.0.1", port=1)):
            upstream = Upstream(peer)
            with pytest.raises(TransportError) as caught:
                await upstream.request(b"GET", b"/", timeout=5)
            assert (caught.value.code, caught.value.sent) == ("transport.connect", False)

    go(main())


def test_a_peer_that_does_not_answer(go: Go) -> None:
    async def main() -> None:
        async with scripted() as (upstream, _):
            with pytest.raises(TransportError) as caught:
                await upstream.request(b"GET", b"/", timeout=0.05)
            assert (caught.value.code, caught.value.sent) == ("transport.timeout", True)
            assert upstream._idle == []
            assert upstream._busy == set()

    go(main())


def test_waiting_for_a_free_connection_is_not_sent(go: Go) -> None:
    async def main() -> None:
        async with scripted() as (upstream, _):
            single = Upstream(upstream.peer, limits=Limits(max_connections=1))
            first = asyncio.ensure_future(single.request(b"GET", b"/", timeout=0.2))
            await asyncio.sleep(0.02)
            with pytest.raises(TransportError) as caught:
                await single.request(b"GET", b"/", timeout=0.05)
            assert (caught.value.code, caught.value.sent) == ("transport.timeout", False)
            with pytest.raises(TransportError):
                await first
            await single.aclose()

    go(main())


def test_an_interim_response_is_skipped(go: Go) -> None:
    async def main() -> None:
        line = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        async with scripted(line) as (upstream, _):
            assert (await upstream.request(b"GET", b"/", timeout=5)).body == b"ok"

    go(main())


def test_bytes_after_a_response_are_never_taken_for_the_next_one(go: Go) -> None:
    async def main() -> None:
        ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        async with scripted(ok + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", ok) as (upstream, _):
            assert (await upstream.request(b"GET", b"/", timeout=5)).body == b"ok"
            assert upstream._idle == []
            assert (await upstream.request(b"GET", b"/", timeout=5)).body == b"ok"

    go(main())


def test_an_unasked_response_closes_an_idle_connection(go: Go) -> None:
    async def main() -> None:
        ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        spoken: list[asyncio.Transport] = []

        class Talker(Scripted):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                spoken.append(self.transport)

        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Talker([ok], bytearray(), False), "127.0.0.1", 0)
        upstream = Upstream(Peer(host="127.0.0.1", port=server.sockets[0].getsockname()[1]))
        await upstream.request(b"GET", b"/", timeout=5)
        spoken[0].write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        assert (await upstream.request(b"GET", b"/", timeout=5)).body == b"ok"
        assert len(spoken) == 2
        await upstream.aclose()
        server.close()

    go(main())


@pytest.mark.parametrize("size", [0, 1, 16 << 10, (16 << 10) + 1, 600_000, 5_000_000])
def test_echo(go: Go, tmp_path: Path, size: int) -> None:
    async def main() -> None:
        data = os.urandom(size)
        by_path = await serve(echo, unix=tmp_path / "s")
        by_port = await serve(echo)
        for peer in (Peer(unix=tmp_path / "s"), Peer(host="127.0.0.1", port=by_port.port)):
            upstream = Upstream(peer)
            for body in (data, bytearray(data), memoryview(data), [data[:10], memoryview(data)[10:]]):
                answer = await upstream.request(b"POST", b"/ohttp", [(b"x", b"1")], body, timeout=10)
                assert (answer.status, answer.content_type) == (200, b"a/b")
                assert answer.body == data
                assert answer.field(b"x-seen") == b"1"
            assert len(upstream._idle) == 1  # one connection carried them all
            await upstream.aclose()
        await by_path.close()
        await by_port.close()

    go(main())


def test_concurrent_requests_keep_apart(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        front = await serve(echo, unix=tmp_path / "s")
        upstream = Upstream(Peer(unix=tmp_path / "s"), max_idle=3)

        async def one(n: int) -> bool:
            body = b"%d" % n * 20_000
            return (await upstream.request(b"POST", b"/ohttp", (), body, timeout=10)).body == body

        assert all(await asyncio.gather(*(one(n) for n in range(40))))
        assert len(upstream._idle) == 3
        await upstream.aclose()
        await front.close()

    go(main())


def test_a_connection_that_went_stale_is_replaced_without_an_error(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        front = await serve(echo, unix=tmp_path / "s")
        upstream = Upstream(Peer(unix=tmp_path / "s"))
        await upstream.request(b"POST", b"/ohttp", (), b"1", timeout=5)
        await front.close()
        front = await serve(echo, unix=tmp_path / "s")
        assert (await upstream.request(b"POST", b"/ohttp", (), b"2", timeout=5)).body == b"2"
        await upstream.aclose()
        await front.close()

    go(main())


def test_a_cancelled_request_leaves_no_connection(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        @whole
        async def slow(head: Head, body: memoryview) -> Answer:
            await asyncio.sleep(0.1)
            return Answer(body=b"late")

        front = await serve(slow, unix=tmp_path / "s")
        upstream = Upstream(Peer(unix=tmp_path / "s"))
        task = asyncio.ensure_future(upstream.request(b"POST", b"/ohttp", (), b"1", timeout=5))
        await asyncio.sleep(0.03)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (upstream._idle, upstream._busy) == ([], set())
        await upstream.aclose()
        await front.close()

    go(main())


def test_closing_fails_what_is_in_progress_and_all_later_requests(go: Go) -> None:
    async def main() -> None:
        async with scripted() as (upstream, _):
            task = asyncio.ensure_future(upstream.request(b"GET", b"/", timeout=5))
            await asyncio.sleep(0.03)
            await upstream.aclose()
            with pytest.raises(TransportError) as caught:
                await task
            assert caught.value.sent
            with pytest.raises(TransportError) as caught:
                await upstream.request(b"GET", b"/", timeout=5)
            assert not caught.value.sent

    go(main())


def test_a_request_that_would_split_is_never_sent(go: Go) -> None:
    async def main() -> None:
        async with scripted() as (upstream, seen):
            with pytest.raises(UsageError):
                await upstream.request(b"GET", b"/", [(b"x", b"1\r\n\r\n")], timeout=5)
            assert seen == b""

    go(main())


@pytest.mark.parametrize(
    "peer",
    [{}, {"host": "a"}, {"host": "a", "port": 70_000}, {"unix": Path("/a"), "host": "a", "port": 1}],
    ids=["nothing", "no port", "large port", "both"],
)
def test_refused_peer(peer: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Peer(**peer)  # type: ignore[arg-type]


# --- streams ---

BLOB = os.urandom(3_000_000)


@asynccontextmanager
async def blob_server(tmp_path: Path) -> AsyncIterator[Upstream]:
    gets = {b"/blob": lambda: Answer(body=BLOB), b"/empty": Answer, b"/bad": lambda: Answer(status=500)}
    front = await serve(echo, unix=tmp_path / "s", gets=gets)
    upstream = Upstream(Peer(unix=tmp_path / "s"))
    yield upstream
    await upstream.aclose()
    await front.close()


def test_stream(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with blob_server(tmp_path) as upstream:
            sizes, digest = [], hashlib.sha256()
            async with upstream.stream(b"/blob", chunk=1 << 20) as stream:
                assert (stream.status, stream.length) == (200, len(BLOB))
                async for piece in stream:
                    sizes.append(len(piece))
                    digest.update(piece)
            assert sizes == [1 << 20, 1 << 20, len(BLOB) - (2 << 20)]
            assert digest.digest() == hashlib.sha256(BLOB).digest()
            assert len(upstream._idle) == 1
            assert [piece async for piece in upstream.stream(b"/empty")] == []
            assert len(upstream._idle) == 1

    go(main())


def test_a_stream_left_early_closes_its_connection(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with blob_server(tmp_path) as upstream:
            async with upstream.stream(b"/blob", chunk=1000) as stream:
                assert len(await anext(stream)) == 1000
            assert (upstream._idle, upstream._busy) == ([], set())
            with pytest.raises(TransportError):
                await anext(stream)

    go(main())


@pytest.mark.parametrize(
    ("target", "error", "code"),
    [
        (b"/none", NotFound, "not-found"),
        (b"/bad", TransportError, "transport.status"),
        (b"/blob", TransportError, "transport.too-large"),
    ],
)
def test_refused_stream(go: Go, tmp_path: Path, target: bytes, error: type[Exception], code: str) -> None:
    async def main() -> None:
        async with blob_server(tmp_path) as upstream:
            with pytest.raises(error) as caught:
                await upstream.stream(target, max_length=1000).open()
            assert caught.value.code == code  # type: ignore[attr-defined]
            assert upstream._busy == set()

    go(main())


def test_a_truncated_stream(go: Go) -> None:
    async def main() -> None:
        line = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + b"x" * 99
        async with scripted(line, close=True) as (upstream, _):
            stream = upstream.stream(b"/", chunk=60)
            assert bytes(await anext(stream)) == b"x" * 60
            with pytest.raises(TransportError) as caught:
                await anext(stream)
            assert caught.value.code == "transport.closed"

    go(main())


def test_a_second_answer_does_not_replace_the_first(go: Go) -> None:
    """Both came in one read: 20,000 bytes were given out as 5,000,000, most of them zeros."""

    async def main() -> None:
        one = b"HTTP/1.1 200 OK\r\ncontent-length: 20000\r\n\r\n" + b"a" * 20000
        two = b"HTTP/1.1 200 OK\r\ncontent-length: 5000000\r\n\r\n" + b"b" * 10
        seen = bytearray()
        server = await asyncio.get_running_loop().create_server(
            lambda: Scripted([one + two, one], seen, then_close=False), "127.0.0.1", 0
        )
        upstream = Upstream(Peer(host="127.0.0.1", port=server.sockets[0].getsockname()[1]))
        try:
            answer = await upstream.request(b"POST", b"/ohttp", timeout=2)
            assert bytes(answer.body) == b"a" * 20000
        except TransportError as error:  # where what follows was seen first
            assert error.code == "transport.format"  # noqa: PT017
        assert (await upstream.request(b"POST", b"/ohttp", timeout=2)).body == b"a" * 20000
        await upstream.aclose()
        server.close()

    go(main())


def test_a_peer_that_is_not_there_takes_no_place(go: Go) -> None:
    async def main() -> None:
        upstream = Upstream(Peer(host="127.0.0.1", port=9), limits=Limits(max_connections=1))
        for _ in range(3):
            with pytest.raises(TransportError) as caught:
                await upstream.request(b"POST", b"/ohttp", timeout=1)
            assert caught.value.code == "transport.connect"
        await upstream.aclose()

    go(main())
