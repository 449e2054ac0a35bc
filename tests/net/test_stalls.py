"""Peers that stop in the middle: slow readers, uploads that halt, answers before the end of an upload."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from cloister.errors import TransportError
from cloister.net.body import Body
from cloister.net.front import Answer, Head, Limits, serve
from cloister.net.link import Peer, Upstream
from support.fronts import whole

from .conftest import Go
from .test_front import POST, Raw

PIECE = 400_000  # bytes; all of them are several times what the kernel holds
COUNT = 100
REFUSAL = b"HTTP/1.1 413 Large\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno"


class Slow(asyncio.Protocol):
    """A peer that reads nothing before it is told to."""

    def __init__(self) -> None:
        self.count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # uvloop begins to read after this call, whatever is asked for here
        asyncio.get_running_loop().call_soon(self.transport.pause_reading)

    def data_received(self, data: bytes) -> None:
        self.count += len(data)

    async def read(self, count: int) -> None:
        self.transport.resume_reading()
        while self.count < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def slow_peer() -> AsyncIterator[tuple[Upstream, list[Slow]]]:
    peers: list[Slow] = []

    def made() -> Slow:
        peers.append(Slow())
        return peers[-1]

    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
    upstream = Upstream(Peer(host="127.0.0.1", port=server.sockets[0].getsockname()[1]))
    try:
        yield upstream, peers
    finally:
        await upstream.aclose()
        for peer in peers:
            peer.transport.abort()
        server.close()
        await asyncio.sleep(0.01)


class Counted:
    """Pieces that say how many of them were made; one of them may fail."""

    def __init__(self, *, fails: int = COUNT, gives: int = COUNT) -> None:
        self.made = 0
        self.data = os.urandom(PIECE)
        self.fails, self.gives = fails, gives

    def __len__(self) -> int:
        return COUNT * PIECE

    def pieces(self) -> Iterator[bytes]:
        for number in range(self.gives):
            if number == self.fails:
                raise ValueError("no more")
            self.made += 1
            yield self.data


# --- a peer that does not read


def test_pieces_are_made_no_faster_than_the_peer_reads(go: Go) -> None:
    async def main() -> None:
        async with slow_peer() as (link, peers):
            pieces = Counted()
            asking = asyncio.ensure_future(link.request(b"POST", b"/ohttp", (), pieces, timeout=10))
            await asyncio.sleep(0.3)
            held = pieces.made
            assert held < COUNT * 0.8, "all that the kernel does not hold is in memory"
            await asyncio.sleep(0.1)
            assert pieces.made == held
            (peer,) = peers
            await peer.read(len(pieces))
            peer.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            assert (await asking).body == b"ok"
            assert pieces.made == COUNT

    go(main())


def test_what_arrives_for_a_peer_that_does_not_read_is_not_written(go: Go) -> None:
    async def main() -> None:
        async with slow_peer() as (link, peers):
            body = Body(COUNT * PIECE)
            body.view[:] = os.urandom(PIECE) * COUNT
            asking = asyncio.ensure_future(link.request(b"POST", b"/ohttp", (), body, timeout=10))
            for _ in range(COUNT):
                await asyncio.sleep(0.001)
                body.advance(PIECE)
            (exchange,) = link._busy
            assert exchange._transport.get_write_buffer_size() < 3 * PIECE
            (peer,) = peers
            await peer.read(len(body))
            peer.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            assert (await asking).status == 200
            assert len(link._idle) == 1

    go(main())


@pytest.mark.parametrize(("options", "error"), [({"fails": 3}, ValueError), ({"gives": 3}, TransportError)])
def test_pieces_that_end_early_end_the_request(
    go: Go, options: dict[str, int], error: type[Exception]
) -> None:
    async def main() -> None:
        @whole
        async def never(head: Head, body: memoryview) -> Answer:
            raise AssertionError("it was never whole")

        front = await serve(never, limits=Limits(max_body=COUNT * PIECE))
        link = Upstream(Peer(host="127.0.0.1", port=front.port))
        with pytest.raises(error):
            await link.request(b"POST", b"/ohttp", (), Counted(**options), timeout=2)
        assert (link._idle, link._busy) == ([], set())
        await link.aclose()
        await front.close()

    go(main())


# --- an answer before the end of the request


@asynccontextmanager
async def refusing(after: int, *, line: bytes = REFUSAL) -> AsyncIterator[Upstream]:
    """A peer that says ``line`` once it has read so many bytes, and reads on."""

    class Refusing(Slow):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)

        def data_received(self, data: bytes) -> None:
            if self.count < after <= self.count + len(data):
                if line:
                    self.transport.write(line)
                else:
                    self.transport.abort()
            super().data_received(data)

    server = await asyncio.get_running_loop().create_server(Refusing, "127.0.0.1", 0)
    link = Upstream(Peer(host="127.0.0.1", port=server.sockets[0].getsockname()[1]))
    try:
        yield link
    finally:
        await link.aclose()
        server.close()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("line", [REFUSAL, REFUSAL.replace(b"connection: close\r\n", b"")])
def test_an_answer_is_there_before_the_upload_ends(go: Go, line: bytes) -> None:
    async def main() -> None:
        async with refusing(10_000, line=line) as link:
            body = Body(1_000_000)
            body.advance(50_000)
            answer = await asyncio.wait_for(link.request(b"POST", b"/ohttp", (), body, timeout=30), 1)
            assert (answer.status, answer.body) == (413, b"no")
            assert (link._idle, link._busy) == ([], set()), "the peer waits for the rest of that request"
            body.advance(950_000)  # goes nowhere

    go(main())


def test_pieces_that_nobody_wants_any_more_are_not_made(go: Go) -> None:
    async def main() -> None:
        async with refusing(10_000) as link:
            pieces = Counted()
            answer = await link.request(b"POST", b"/ohttp", (), pieces, timeout=5)
            assert (answer.status, answer.body) == (413, b"no")
            made = pieces.made
            await asyncio.sleep(0.05)
            assert pieces.made == made < COUNT

    go(main())


def test_a_peer_that_leaves_ends_the_request_before_the_upload_ends(go: Go) -> None:
    async def main() -> None:
        async with refusing(10_000, line=b"") as link:
            body = Body(1_000_000)
            body.advance(50_000)
            with pytest.raises(TransportError) as caught:
                await asyncio.wait_for(link.request(b"POST", b"/ohttp", (), body, timeout=30), 1)
            assert (caught.value.code, caught.value.sent) == ("transport.closed", True)
            body.advance(950_000)
            body.fail()

    go(main())


# --- an upload that halts


def test_an_upload_that_halts_is_given_up(go: Go) -> None:
    async def main() -> None:
        front = await serve(_echo, limits=Limits(stall_timeout=0.1))
        client = await Raw.connect(front)
        start = asyncio.get_running_loop().time()
        assert (await client.ask(POST % (1_000_000, b"") + bytes(100)))[0] == 408
        assert asyncio.get_running_loop().time() - start < 1
        assert await client.closed()
        assert front._shared.buffered == 0
        await client.end()
        await front.close()

    go(main())


def test_an_upload_that_goes_on_slowly_is_not(go: Go) -> None:
    async def main() -> None:
        front = await serve(_echo, limits=Limits(stall_timeout=0.2))
        client = await Raw.connect(front)
        client.writer.write(POST % (10, b""))
        for _ in range(10):
            await asyncio.sleep(0.06)
            client.writer.write(b"x")
        assert (await client.answer())[2] == b"x" * 10
        await client.end()
        await front.close()

    go(main())


# --- connections


def test_an_idle_connection_that_its_peer_closes_is_forgotten(go: Go) -> None:
    async def main() -> None:
        front = await serve(_echo)
        link = Upstream(Peer(host="127.0.0.1", port=front.port), limits=Limits(max_connections=2))
        for _ in range(5):  # more often than there are connections: each is given back
            assert (await link.request(b"POST", b"/ohttp", (), b"x", timeout=2)).body == b"x"
            assert len(link._idle) == 1
            (connection,) = front._shared.members
            connection.abort()
            await asyncio.sleep(0.02)
            assert link._idle == []
        await link.aclose()
        await front.close()

    go(main())


def test_there_are_never_more_connections_than_declared(go: Go) -> None:
    async def main() -> None:
        most = 0

        @whole
        async def slow(head: Head, body: memoryview) -> Answer:
            nonlocal most
            most = max(most, front.connections)
            await asyncio.sleep(0.002)
            return Answer(body=bytes(body))

        front = await serve(slow)
        limits = Limits(max_connections=4)
        link = Upstream(Peer(host="127.0.0.1", port=front.port), max_idle=4, limits=limits)

        async def one(n: int) -> bool:
            answer = await link.request(b"POST", b"/ohttp", (), b"%d" % n, timeout=10)
            return answer.body == b"%d" % n

        for _ in range(3):
            assert all(await asyncio.gather(*(one(n) for n in range(20))))
        assert most <= 5  # one may still be closing at its other end
        await link.aclose()
        await front.close()

    go(main())


def test_connections_that_were_idle_for_long_are_closed(go: Go) -> None:
    async def main() -> None:
        front = await serve(_echo)
        link = Upstream(Peer(host="127.0.0.1", port=front.port))
        await asyncio.gather(*(link.request(b"POST", b"/ohttp", (), b"x", timeout=2) for _ in range(3)))
        now = asyncio.get_running_loop().time()
        link.trim(now + 10)
        await asyncio.sleep(0.02)
        assert (len(link._idle), front.connections) == (3, 3)
        link.trim(now + 30)
        await asyncio.sleep(0.02)
        assert (len(link._idle), front.connections) == (0, 0)
        await link.aclose()
        await front.close()

    go(main())


@whole
async def _echo(head: Head, body: memoryview) -> Answer:
    return Answer(body=bytes(body))
