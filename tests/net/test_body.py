"""Bodies that are used while they arrive: by a front's handler, and by a link that passes them on."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.errors import TransportError
from cloister.net.body import EAGER, Body
from cloister.net.front import Answer, Head, Limits, serve
from cloister.net.link import Peer, Upstream

from .conftest import Go
from .test_front import POST, Raw

SIZE = 300_000


# --- refusals


@pytest.mark.parametrize("cut", [0, 10, SIZE - 1])
def test_a_peer_that_leaves_fails_its_handler(go: Go, cut: int) -> None:
    async def main() -> None:
        outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def handler(head: Head, body: Body) -> Answer:
            try:
                await body.whole()
            except TransportError as error:
                outcome.set_result(error.code)
                raise
            outcome.set_result("whole")
            return Answer()

        front = await serve(handler)
        client = await Raw.connect(front)
        client.writer.write(POST % (SIZE, b"") + bytes(cut))
        await asyncio.sleep(0.05)
        await client.end()
        assert await asyncio.wait_for(outcome, 2) == "transport.closed"
        await asyncio.sleep(0.01)
        assert (front._shared.buffered, front._shared.tasks) == (0, set())
        await front.close()

    go(main())


def test_a_body_that_comes_too_slowly_fails_its_handler(go: Go) -> None:
    async def main() -> None:
        failures: list[str] = []

        async def handler(head: Head, body: Body) -> Answer:
            try:
                await body.whole()
            except TransportError as error:
                failures.append(error.code)
                raise
            return Answer()

        front = await serve(handler, limits=Limits(body_timeout=0.05))
        client = await Raw.connect(front)
        assert (await client.ask(POST % (3, b"") + b"x"))[0] == 408
        assert await client.closed()
        assert failures == ["transport.closed"]
        await client.end()
        await front.close()

    go(main())


def test_more_than_there_is_memory_for_fails_every_handler_beyond(go: Go) -> None:
    async def main() -> None:
        async def handler(head: Head, body: Body) -> Answer:
            return Answer(body=bytes(await body.whole()))

        front = await serve(handler, limits=Limits(max_buffered=SIZE))
        first, second = await Raw.connect(front), await Raw.connect(front)
        first.writer.write(POST % (SIZE, b"") + bytes(SIZE - 1))
        await asyncio.sleep(0.05)
        assert (await second.ask(POST % (SIZE, b"") + bytes(SIZE)))[0] == 503
        assert (await first.ask(b"x"))[2] == bytes(SIZE - 1) + b"x"
        assert front._shared.buffered == 0
        await first.end()
        await second.end()
        await front.close()

    go(main())


def test_the_end_of_a_peer_is_seen_after_it_filled_the_head_s_buffer(go: Go) -> None:
    async def main() -> None:
        seen: list[int] = []

        async def handler(head: Head, body: Body) -> Answer:
            await body.whole()
            seen.append(0)
            if len(seen) > 1:
                body.when_abandoned(lambda: seen.append(-1))
                await asyncio.sleep(1)
            await asyncio.sleep(0.1)
            return Answer(body=b"x")

        front = await serve(handler, limits=Limits(max_head=4096))
        client = await Raw.connect(front)
        request = POST % (3000, b"") + bytes(3000)
        client.writer.write(request)
        await asyncio.sleep(0.05)
        client.writer.write(request + request)  # more than the buffer of a head holds
        while len(seen) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        client.writer.transport.abort()
        await asyncio.sleep(0.3)
        assert seen[-1] == -1
        await front.close(0)

    go(main())


def test_large_bodies_leave_room_for_small_ones(go: Go) -> None:
    """Four requests of 64 MiB that waited for their turn shut everybody out."""

    async def main() -> None:
        gate, mib = asyncio.Event(), 1 << 20

        async def handler(head: Head, body: Body) -> Answer:
            if len(await body.whole()) > mib:
                await gate.wait()
            return Answer(body=b"done")

        front = await serve(handler, limits=Limits(max_body=8 * mib, max_buffered=4 * mib))
        waiting, larger, small = [await Raw.connect(front) for _ in range(3)]
        waiting.writer.write(POST % (2 * mib, b"") + bytes(2 * mib))
        while front._shared.buffered < 2 * mib:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        larger.writer.write(POST % (3 * mib // 2, b"") + bytes(3 * mib // 2))
        assert (await larger.answer())[0] == 503
        assert (await small.ask(POST % (mib, b"") + bytes(mib)))[2] == b"done"
        gate.set()
        assert (await waiting.answer())[2] == b"done"
        for client in (waiting, larger, small):
            await client.end()
        await front.close()

    go(main())


def test_a_link_whose_body_does_not_arrive_fails_and_is_not_used_again(go: Go) -> None:
    async def main() -> None:
        seen: list[int] = []

        async def handler(head: Head, body: Body) -> Answer:
            seen.append(len(await body.whole()))
            return Answer(body=b"done")

        front = await serve(handler)
        link = Upstream(Peer(host="127.0.0.1", port=front.port))
        body = Body(SIZE)
        body.advance(1000)
        asyncio.get_running_loop().call_later(0.05, body.fail)
        with pytest.raises(TransportError) as caught:
            await link.request(b"POST", b"/ohttp", (), body, timeout=2)
        assert (caught.value.code, caught.value.sent) == ("transport.closed", True)
        assert (await link.request(b"POST", b"/ohttp", (), b"x", timeout=2)).body == b"done"
        assert seen == [1]
        await link.aclose()
        await front.close()

    go(main())


def test_memory_is_counted_when_it_is_taken_and_given_back_with_the_answer(go: Go) -> None:
    async def main() -> None:
        async def handler(head: Head, body: Body) -> Answer:
            return Answer(body=b"%d" % len(await body.whole()))

        large = 3 * EAGER
        front = await serve(handler)
        for length, counted in ((SIZE, SIZE), (large, 1000)):
            client = await Raw.connect(front)
            client.writer.write(POST % (length, b"") + bytes(1000))
            await asyncio.sleep(0.05)
            assert front._shared.buffered == counted
            client.writer.write(bytes(length - 1000))
            assert (await client.answer())[2] == b"%d" % length
            assert front._shared.buffered == 0
            (connection,) = front._shared.members
            assert len(connection._body) == 0, "an idle connection keeps nothing"
            await client.end()
            await asyncio.sleep(0.02)
        await front.close()

    go(main())


@pytest.mark.parametrize("length", [EAGER, EAGER + 1])
def test_a_large_body_takes_memory_as_it_fills(length: int) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    bodies = [Body(length) for _ in range(40)]
    taken = resident() - before
    assert bodies[0].lazy == (length > EAGER)
    assert isinstance(bodies[0].view.obj, mmap.mmap if bodies[0].lazy else bytearray)
    if bodies[0].lazy:  # the others may have got memory that the process had, and hadn't given back
        assert taken < 10 * EAGER


# --- what holds


def test_a_handler_sees_the_front_before_the_end_is_there(go: Go) -> None:
    async def main() -> None:
        fronts: list[bytes] = []

        async def handler(head: Head, body: Body) -> Answer:
            assert await body.more(4) >= 5
            fronts.append(bytes(body.view[:5]))
            return Answer(body=bytes((await body.whole())[-3:]))

        front = await serve(handler)
        client = await Raw.connect(front)
        for _ in range(2):  # the connection is kept
            client.writer.write(POST % (SIZE, b"") + b"front" + bytes(100))
            await asyncio.sleep(0.05)
            assert fronts.pop() == b"front"
            client.writer.write(bytes(SIZE - 108) + b"end")
            assert (await client.answer())[2] == b"end"
        await client.end()
        await front.close()

    go(main())


def test_an_answer_before_the_end_of_the_body_arrives_and_ends_the_connection(go: Go) -> None:
    async def main() -> None:
        async def handler(head: Head, body: Body) -> Answer:
            return Answer(status=404, body=b"no such thing")

        front = await serve(handler)
        client = await Raw.connect(front)
        client.writer.write(POST % (SIZE, b"") + bytes(1000))
        status, head, body = await client.answer()
        assert (status, body, b"connection: close" in head) == (404, b"no such thing", True)
        client.writer.write(bytes(SIZE))  # goes nowhere
        await client.end()
        link = Upstream(Peer(host="127.0.0.1", port=front.port))
        late = Body(SIZE)
        late.advance(10)
        asyncio.get_running_loop().call_later(0.1, late.advance, SIZE - 10)
        answer = await link.request(b"POST", b"/ohttp", (), late, timeout=2)
        assert (answer.status, answer.body) == (404, b"no such thing")
        await link.aclose()
        await front.close()

    go(main())


class Made:
    """Pieces that are made when they are asked for."""

    def __len__(self) -> int:
        return SIZE

    def pieces(self) -> Iterator[bytes]:
        for number in range(3):
            yield bytes([number]) * (SIZE // 3)


def test_a_link_passes_on_what_arrives_and_what_is_made(go: Go) -> None:
    async def main() -> None:
        early = asyncio.Event()

        async def handler(head: Head, body: Body) -> Answer:
            await body.more(0)
            early.set()
            return Answer(body=bytes(await body.whole()))

        front = await serve(handler)
        link = Upstream(Peer(host="127.0.0.1", port=front.port))
        body = Body(SIZE)
        asking = asyncio.ensure_future(link.request(b"POST", b"/ohttp", (), body, timeout=5))
        body.view[:] = bytes(range(256)) * (SIZE // 256) + bytes(SIZE % 256)
        await asyncio.sleep(0.02)
        body.advance(100)
        await asyncio.wait_for(early.wait(), 2)
        assert not asking.done()
        for _ in range(10):
            body.advance((SIZE - 100) // 10)
            await asyncio.sleep(0.002)
        body.advance(SIZE - body.received)
        assert (await asking).body == bytes(body.view)
        made = await link.request(b"POST", b"/ohttp", (), Made(), timeout=5)
        assert made.body == b"".join(Made().pieces())
        assert (await link.request(b"POST", b"/ohttp", (), Body.of(b""), timeout=5)).body == b""
        assert front.connections == 1, "one connection served all of them"
        await link.aclose()
        await front.close()

    go(main())
