"""The carriers: connections of their own for encapsulated requests, httpx for the rest, none sent twice."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import TransportError, UsageError
from cloister.net.front import serve
from cloister.net.messages import Answer, Head, Limits
from cloister.party import carry
from cloister.party.carry import MAX_ANSWER, AsyncCarrier, Carrier, _lost
from cloister.party.wire import Wire, reason_of
from support.fronts import whole

FIELDS = ((b"content-type", b"message/ohttp-req"),)
OK = b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\ncontent-length: 3\r\n\r\nabc"


@dataclass
class Post:
    content: bytes | bytearray = b"sealed"
    method: bytes = b"POST"
    target: bytes = b"/ohttp"
    fields: tuple[tuple[bytes, bytes], ...] = FIELDS
    meanwhile: None = None

    @property
    def body(self) -> bytes | bytearray:
        return self.content


@dataclass
class Server:
    """Answers each request with the next of its lines; None closes the connection, a function is called."""

    lines: list[Any]
    port: int = 0
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, listener: socket.socket) -> None:
        while True:
            try:
                stream, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.serve, args=(stream,), daemon=True).start()

    def serve(self, stream: socket.socket) -> None:
        with stream, contextlib.suppress(OSError):
            while (request := read_request(stream)) and self.lines:
                self.requests.append(request)
                line = self.lines.pop(0)
                if line is None:
                    return
                if callable(line):
                    line(stream)
                else:
                    stream.sendall(line)


def read_request(stream: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = stream.recv(65536)
        if not piece:
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    while len(body) < length:
        body += stream.recv(65536)
    return head + b"\r\n\r\n" + body


@contextmanager
def server(*lines: Any) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Server(list(lines), listener.getsockname()[1])
        thread = threading.Thread(target=made.run, args=(listener,), daemon=True)
        thread.start()
        yield made
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@contextmanager
def carrier(url: str, **options: Any) -> Iterator[Carrier]:
    made = Carrier(url, **options)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def wire(port: int, **options: Any) -> Iterator[Wire]:
    made = Wire("127.0.0.1", port, **{"limits": Limits(max_body=1000, max_head=500), **options})
    try:
        yield made
    finally:
        made.close()


def post(made: Wire, body: bytes = b"sealed", timeout: float = 5) -> Answer:
    return made.request(b"POST", b"/ohttp", FIELDS, body, timeout=timeout)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# What is refused.

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
def test_refused_answer(line: bytes, code: str) -> None:
    def answer(stream: socket.socket) -> None:
        stream.sendall(line)
        stream.shutdown(socket.SHUT_RDWR)

    with server(answer, OK) as peer, wire(peer.port) as made:
        with pytest.raises(TransportError) as caught:
            post(made)
        assert (caught.value.code, caught.value.sent) == (code, True)
        assert len(peer.requests) == 1  # it was not sent again
        assert post(made).body == b"abc"  # on a new connection
        assert peer.connections == 2


@pytest.mark.parametrize(
    "url", ["ftp://host", "host:80", "", "http://", "http://h:0", "http://h:99999", "file:///x"]
)
@pytest.mark.parametrize("kind", [Carrier, AsyncCarrier])
def test_a_url_of_another_kind_is_refused(kind: Callable[[str], Any], url: str) -> None:
    with pytest.raises(UsageError) as caught:
        kind(url)
    assert caught.value.code == "net.url"


def test_nobody_listens() -> None:
    with carrier(f"http://127.0.0.1:{closed_port()}") as made, pytest.raises(TransportError) as caught:
        made.send(Post())
    assert (caught.value.code, caught.value.sent) == ("transport.connect", False)


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 64 + ".invalid"])
def test_a_host_that_has_no_address(host: str) -> None:
    with carrier(f"http://{host}") as made, pytest.raises(TransportError) as caught:
        made.send(Post())
    assert (caught.value.code, caught.value.sent) == ("transport.connect", False)


@pytest.mark.parametrize("host", ["127.0.0.1", "a" * 64 + ".invalid"])
def test_nobody_answers_the_async_carrier(host: str) -> None:
    async def main() -> None:
        made = AsyncCarrier(f"http://{host}:{closed_port()}")
        with pytest.raises(TransportError) as caught:
            await made.send(Post())
        assert (caught.value.code, caught.value.sent) == ("transport.connect", False)
        await made.aclose()
        with pytest.raises(TransportError):
            await made.send(Post())

    asyncio.run(main())


def test_silence_is_a_timeout() -> None:
    with (
        server(lambda stream: time.sleep(0.5)) as peer,
        wire(peer.port, silence=0.1) as made,
        pytest.raises(TransportError) as caught,
    ):
        post(made)
    assert (caught.value.code, caught.value.sent) == ("transport.timeout", True)


def test_an_answer_that_drips_is_a_timeout() -> None:
    def drip(stream: socket.socket) -> None:
        for byte in OK:
            stream.sendall(bytes([byte]))
            time.sleep(0.02)

    with server(drip) as peer, wire(peer.port) as made, pytest.raises(TransportError) as caught:
        post(made, timeout=0.2)
    assert (caught.value.code, caught.value.sent) == ("transport.timeout", True)


def test_a_body_that_nobody_reads_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        with wire(port, silence=0.2) as made, pytest.raises(TransportError) as caught:
            post(made, bytes(64 << 20))
    assert (caught.value.code, caught.value.sent) == ("transport.timeout", True)


def test_a_field_that_would_break_the_head_is_refused_before_anything_is_sent() -> None:
    with server() as peer, wire(peer.port) as made:
        with pytest.raises(UsageError):
            made.request(b"POST", b"/ohttp", ((b"x", b"a\r\nb: c"),), b"", timeout=5)
        assert peer.connections == 0


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_any_bytes_give_an_answer_or_our_error(line: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        from cloister.party.wire import _Connection

        theirs.sendall(line)
        theirs.shutdown(socket.SHUT_WR)
        try:
            answer, _ = _Connection(ours, Limits(max_body=100)).receive(b"POST", time.monotonic() + 5)
        except TransportError:
            return
        assert len(answer.body) <= 100


# Once or not at all.


def test_a_kept_connection_that_was_closed_is_replaced_before_anything_is_sent() -> None:
    def answer_then_close(stream: socket.socket) -> None:
        stream.sendall(OK)
        stream.shutdown(socket.SHUT_RDWR)

    with server(answer_then_close, OK) as peer, wire(peer.port) as made:
        assert post(made).status == 200
        time.sleep(0.05)
        assert post(made).status == 200
        assert peer.connections == 2
        assert len(peer.requests) == 2


def test_a_connection_closed_after_the_request_was_sent_is_an_error_and_no_second_request() -> None:
    with server(OK, None, OK) as peer, wire(peer.port) as made:
        assert post(made).status == 200
        with pytest.raises(TransportError) as caught:
            post(made)
        assert (caught.value.code, caught.value.sent) == ("transport.closed", True)
        assert len(peer.requests) == 2


def test_bytes_that_nobody_asked_for_are_never_taken_for_an_answer() -> None:
    with (
        server(OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", OK) as peer,
        wire(peer.port) as made,
    ):
        assert post(made).body == b"abc"
        assert post(made).body == b"abc"
        assert peer.connections == 2


def test_a_refusal_before_the_whole_request_was_read_is_the_answer() -> None:
    async def main() -> None:
        @whole
        async def never(head: Head, body: memoryview) -> Answer:
            raise AssertionError

        front = await serve(never, limits=Limits(max_body=10))
        with wire(front.port) as made:
            answer = await asyncio.to_thread(post, made, bytes(300_000))
        assert answer.status == 413
        await front.close()

    asyncio.run(main())


# What holds.


def test_connections_are_kept_and_reused() -> None:
    with server(OK, OK, OK) as peer, wire(peer.port) as made:
        for _ in range(3):
            assert post(made) == Answer(status=200, body=b"abc", content_type=b"a/b")
        assert peer.connections == 1


def test_a_server_that_says_close_is_believed() -> None:
    closing = OK.replace(b"content-type", b"connection: close\r\ncontent-type")
    with server(closing, OK) as peer, wire(peer.port) as made:
        assert post(made).status == 200
        assert post(made).status == 200
        assert peer.connections == 2


def test_informational_and_empty_answers() -> None:
    with (
        server(b"HTTP/1.1 103 Early\r\n\r\n" + OK, b"HTTP/1.1 204 No\r\n\r\n") as peer,
        wire(peer.port) as made,
    ):
        assert post(made).body == b"abc"
        assert post(made) == Answer(status=204, body=b"")


@pytest.mark.parametrize("size", [0, 1, 100_000, 5 << 20])
def test_bodies_pass_unchanged_both_ways(size: int) -> None:
    async def main() -> None:
        @whole
        async def echo(head: Head, body: memoryview) -> Answer:
            assert head.fields[b"content-type"] == FIELDS[0][1]
            return Answer(status=200, body=body, content_type=b"a/b")

        front = await serve(echo)
        body = bytearray(size)
        body[::97] = b"x" * len(body[::97])
        url = f"http://127.0.0.1:{front.port}"
        with carrier(url) as made:
            for _ in range(2):
                answer = await asyncio.to_thread(made.send, Post(content=body))
                assert (answer.status, answer.body, answer.content_type) == (200, body, b"a/b")
        other = AsyncCarrier(url)
        for _ in range(2):
            answer = await other.send(Post(content=body))
            assert (answer.status, answer.body, answer.content_type) == (200, body, b"a/b")
        await other.aclose()
        await front.close()

    asyncio.run(main())


def test_host_and_prefix_follow_from_the_url() -> None:
    with server(OK) as peer, carrier(f"{peer.url}/behind/a/proxy/") as made:
        made.send(Post())
        head = peer.requests[0].partition(b"\r\n\r\n")[0]
    assert head.startswith(b"POST /behind/a/proxy/ohttp HTTP/1.1\r\n")
    assert f"host: 127.0.0.1:{peer.port}".encode() in head
    assert head.lower().count(b"\r\nhost:") == 1


def test_only_encapsulated_requests_take_the_short_way() -> None:
    with server(OK, OK) as peer, carrier(peer.url) as made:
        assert made.send(Post(method=b"GET", target=b"/.well-known/cloister", content=b"")).body == b"abc"
        assert made.send(Post()).body == b"abc"
        assert b"user-agent: python-httpx" in peer.requests[0].lower()
        assert b"httpx" not in peer.requests[1]


def test_a_transport_of_the_callers_own_carries_everything() -> None:
    seen = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.path)
        return httpx.Response(200, stream=httpx.ByteStream(b"abc"))

    with carrier("http://nowhere.invalid", transport=httpx.MockTransport(handle)) as made:
        assert made.send(Post()).body == b"abc"
    assert seen == ["/ohttp"]


@pytest.mark.parametrize("url", ["https://127.0.0.1:{}", "http://user:secret@127.0.0.1:{}"])
def test_tls_and_passwords_are_httpx_work(url: str) -> None:
    with (
        carrier(url.format(closed_port())) as made,
        pytest.raises(TransportError) as caught,
    ):
        made.send(Post())
    assert caught.value.actual == "connection refused"
    assert "://127.0.0.1:" in caught.value.expected  # without the password


def test_tls_to_a_service_without_it_gets_a_hint() -> None:
    def answer_plainly(stream: socket.socket) -> None:
        stream.recv(1000)
        stream.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    with (
        server(answer_plainly) as peer,
        carrier(f"https://127.0.0.1:{peer.port}") as made,
        pytest.raises(TransportError) as caught,
    ):
        made.send(Post())
    assert "plain http" in caught.value.hint
    with carrier(f"https://127.0.0.1:{closed_port()}") as made, pytest.raises(TransportError) as caught:
        made.send(Post())
    assert "plain http" not in caught.value.hint


@pytest.mark.parametrize(
    ("error", "hinted"),
    [
        (httpx.ConnectTimeout("x"), True),
        (httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version number"), True),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), False),
        (httpx.ConnectError("[Errno 111] Connection refused"), False),
    ],
)
def test_only_what_may_be_plain_http_is_hinted_at(error: Exception, hinted: bool) -> None:
    assert ("plain http" in _lost(error, httpx.URL("https://x")).hint) is hinted
    assert "plain http" not in _lost(error, httpx.URL("http://x")).hint


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(111, "x"), "connection refused"),
        (socket.gaierror(-2, "x"), "unknown host"),
        (TimeoutError("timed out"), "no answer in time"),
        (OSError(101, "Network is unreachable"), "Network is unreachable"),
        (OSError("without a number"), "OSError"),
        (RuntimeError("x"), "RuntimeError"),
    ],
)
def test_the_reason_of_a_lost_connection_is_said(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
    outer = httpx.ConnectError("x")
    outer.__cause__ = error
    assert reason_of(outer) == ("ConnectError" if reason == type(error).__name__ else reason)


def test_a_closed_carrier_says_so() -> None:
    made = Carrier("http://127.0.0.1:9")
    made.close()
    with pytest.raises(TransportError) as caught:
        made.send(Post())
    assert (caught.value.code, caught.value.sent) == ("transport.closed", False)


def test_an_answer_may_be_as_large_as_is_said() -> None:
    assert MAX_ANSWER > 64 << 20


def test_threads_may_share_a_wire() -> None:
    async def main() -> None:
        @whole
        async def echo(head: Head, body: memoryview) -> Answer:
            await asyncio.sleep(0.001)
            return Answer(status=200, body=body)

        front = await serve(echo)
        with wire(front.port) as made:

            def ask(number: int) -> bool:
                body = b"%d" % number * 50
                return all(post(made, body).body == body for _ in range(20))

            assert all(await asyncio.gather(*(asyncio.to_thread(ask, n) for n in range(8))))
        await front.close()

    asyncio.run(main())


# --- bodies that are made while they are sent


class Made:
    """Three pieces, made when they are asked for; notes how often each was."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 300_000

    def pieces(self) -> Iterator[bytes]:
        for number in range(3):
            self.asked.append(number)
            yield bytes([number]) * 100_000


def test_a_body_in_pieces_is_begun_again_where_an_idle_connection_was_gone() -> None:
    def answer_and_close(stream: socket.socket) -> None:
        stream.sendall(OK)
        stream.shutdown(socket.SHUT_RDWR)

    body = Made()
    with server(answer_and_close, OK) as other, wire(other.port) as made:
        post(made)
        while made._idle[-1].stands:
            time.sleep(0.001)
        made.request(b"POST", b"/ohttp", FIELDS, body, timeout=5)
        assert other.connections == 2
        assert other.requests[-1].endswith(b"".join(Made().pieces()))


def test_work_is_done_while_an_answer_is_awaited() -> None:
    order: list[str] = []

    def answer(stream: socket.socket) -> None:
        order.append("asked")
        stream.sendall(OK)

    with server(answer) as other, wire(other.port) as made:

        def meanwhile() -> None:
            while not order:
                time.sleep(0.001)  # the request is on its way, or this would never end
            order.append("meanwhile")

        made.request(b"POST", b"/ohttp", FIELDS, b"x", timeout=5, meanwhile=meanwhile)
    assert order == ["asked", "meanwhile"]


def test_a_connection_is_closed_where_that_work_fails() -> None:
    def fails() -> None:
        raise ValueError

    with server(OK, OK) as other, wire(other.port) as made:
        with pytest.raises(ValueError):
            made.request(b"POST", b"/ohttp", FIELDS, b"x", timeout=5, meanwhile=fails)
        post(made)
        assert other.connections == 2


# Long bodies.


@pytest.mark.parametrize("length", [1000, 1001])
def test_the_answer_to_an_upload_is_bounded(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(carry, "MAX_ANSWER", 1000)
    line = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % length + bytes(length)
    with server(line) as made, carrier(made.url) as carried:
        if length == 1000:
            assert carried.upload("/v1/blobs", iter([b"ab", b"c"]), 3).body == bytes(1000)
            assert made.requests[0].endswith(b"\r\n\r\nabc")
            return
        with pytest.raises(TransportError) as caught:
            carried.upload("/v1/blobs", iter([b"ab", b"c"]), 3)
        assert (caught.value.claim, caught.value.expected) == ("answer", "at most 1000 B")


def test_the_answer_to_an_upload_is_not_expanded() -> None:
    """A thousandfold of what came would have to be held."""
    packed = gzip.compress(bytes(1 << 20))
    line = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed) + packed
    with server(line) as made, carrier(made.url) as carried:
        assert carried.upload("/v1/blobs", iter([b"abc"]), 3).body == packed
        assert b"accept-encoding: identity\r\n" in made.requests[0].lower()


@pytest.mark.parametrize("allowed", [None, 60.0])
def test_both_carriers_wait_for_a_model_to_be_loaded(
    monkeypatch: pytest.MonkeyPatch, allowed: float | None
) -> None:
    """The synchronous one gave up after the seconds that a connection may be silent elsewhere."""
    carrier = Carrier("http://127.0.0.1:9")
    assert carrier._wire is not None
    assert carrier._wire._silence == carry.PATIENCE
    until = carry._until(allowed)
    post: Any = Post()
    assert carry._timeout(post, until).read == pytest.approx(allowed or carry.PATIENCE, abs=1)
    post.target = b"/.well-known/cloister"
    assert carry._timeout(post, until).read == 30
    carrier.close()
