"""The enclave's server: once a key was established everything is answered inside; nothing leaks outside."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from cloister.core.ohttp import bhttp, encapsulation
from cloister.core.ohttp.hpke import WIRE_SUITES
from cloister.core.ohttp.kem import PrivateKey, generate_private_key
from cloister.core.ohttp.keyconfig import KeyConfiguration
from cloister.core.protocol import problem
from cloister.enclave.server import MAX_WAITING, EnclaveServer, InnerRequest
from cloister.errors import AccessRefused, CloisterError, NotFound
from cloister.net.body import Body
from cloister.net.messages import Answer, Head
from support.realm import kem_key

pytestmark = pytest.mark.asyncio
TYPE = b"message/ohttp-req"
SECRET = "4f1d-secret-input"


class Echo:
    """A handler that remembers what it saw, and fails as told."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.seen: list[InnerRequest] = []

    async def __call__(self, request: InnerRequest) -> bhttp.Response:
        self.seen.append(request)
        if self.error is not None:
            raise self.error
        return bhttp.Response(status=200, content=bytes(request.http.content)[::-1])


def seal(
    key: PrivateKey, content: bytes = b"", key_id: int = 1
) -> tuple[encapsulation.Encapsulation, bytearray]:
    config = KeyConfiguration.for_key(key_id, key)
    suite = next(suite for suite in WIRE_SUITES if suite.kem_id == key.kem_id)
    exchange = encapsulation.begin(config, suite)
    inner = bhttp.Request(method=b"POST", path=b"/x", content=content)
    return exchange, exchange.seal(inner.to_bytes(pad=True))


async def send(server: EnclaveServer, body: bytes | bytearray, **fields: bytes) -> Answer:
    names = {name.replace("_", "-").encode(): value for name, value in fields.items()}
    head = Head(method=b"POST", target=b"/ohttp", fields={b"content-type": TYPE, **names})
    return await server.handle(head, Body.of(bytearray(body)))


def outer(answer: Answer) -> dict[str, Any]:
    assert answer.content_type == problem.MEDIA_TYPE
    return json.loads(bytes(answer.body))


def inside(exchange: encapsulation.Encapsulation, answer: Answer) -> bhttp.Response:
    assert (answer.status, answer.content_type) == (200, b"message/ohttp-res")
    return bhttp.Response.from_bytes(exchange.open(answer.body))


@pytest.mark.parametrize("kem_id", [0x647A, 0x20])
async def test_an_answer(kem_id):
    handler = Echo()
    server = EnclaveServer(handler, [(1, kem_key(kem_id))])
    exchange, body = seal(kem_key(kem_id), b"hello")
    response = inside(exchange, await send(server, body))
    assert (response.status, bytes(response.content)) == (200, b"olleh")
    request = handler.seen[0]
    assert (request.enc, request.key_id, request.sender) == (exchange.enc, 1, b"")
    assert request.arrived <= request.opened


async def test_whose_the_host_says_a_request_is():
    handler = Echo()
    server = EnclaveServer(handler, [(1, kem_key(0x20))])
    await send(server, seal(kem_key(0x20))[1], cloister_sender=b"operator")
    assert handler.seen[0].sender == b"operator"


@pytest.mark.parametrize("kind", [b"", b"application/json", b"message/ohttp-res", b"message/ohttp-req; x"])
async def test_another_media_type(kind):
    handler = Echo()
    server = EnclaveServer(handler, [(1, kem_key(0x20))])
    answer = await send(server, seal(kem_key(0x20))[1], content_type=kind)
    assert answer.status == 415
    assert outer(answer) == {"type": "about:blank", "code": "ohttp.media-type"}
    head = Head(method=b"POST", target=b"/ohttp")
    assert (await server.handle(head, Body.of(b""))).status == 415
    assert handler.seen == []


async def test_an_unknown_key_is_answered_outside_in_the_clear():
    handler = Echo()
    server = EnclaveServer(handler, [(1, kem_key(0x20))])
    answer = await send(server, seal(kem_key(0x20), key_id=2)[1])
    assert answer.status == 400
    assert outer(answer) == {
        "type": "https://iana.org/assignments/http-problem-types#ohttp-key",
        "code": "ohttp.key",
    }
    assert handler.seen == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda body: body[:3], "ohttp.request"),
        (lambda body: b"", "ohttp.request"),
        (lambda body: body[:-1], "ohttp.open"),
        (lambda body: body[:-1] + bytes([body[-1] ^ 1]), "ohttp.open"),
        (lambda body: body[:20] + bytes([body[20] ^ 1]) + body[21:], "ohttp.open"),
        (lambda body: body[:7] + bytes(32) + body[39:], "hpke.kem"),
        (lambda body: bytes([1, 0, 0x20, 0, 1, 0, 1]) + body[7:], "ohttp.key"),
    ],
)
async def test_a_request_that_does_not_open(change, code):
    handler = Echo()
    server = EnclaveServer(handler, [(1, kem_key(0x20))])
    answer = await send(server, change(bytes(seal(kem_key(0x20))[1])))
    assert answer.status == 400
    assert outer(answer)["code"] == code
    assert handler.seen == []


async def test_a_request_to_a_key_of_the_same_id_that_died():
    server = EnclaveServer(Echo(), [(1, kem_key(0x20))])
    answer = await send(server, seal(generate_private_key(0x20))[1])
    assert outer(answer)["code"] == "ohttp.open"


@pytest.mark.parametrize("plaintext", [b"", b"\x00", b"\x07", b"\x01\x40\xc8", b"\xff" * 50])
async def test_a_plaintext_that_is_no_request_is_answered_inside(plaintext):
    server = EnclaveServer(Echo(), [(1, kem_key(0x20))])
    exchange = encapsulation.begin(KeyConfiguration.for_key(1, kem_key(0x20)), WIRE_SUITES[1])
    response = inside(exchange, await send(server, exchange.seal(plaintext)))
    assert response.status == 400
    assert problem.from_bytes(bytes(response.content)).code == "bhttp"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AccessRefused("no grant", code="access.grant", claim="grant", actual=SECRET), 403),
        (NotFound(code="not-found.model"), 404),
        (CloisterError("x", code="y"), 500),
    ],
)
async def test_our_errors_are_answered_inside(error, status):
    server = EnclaveServer(Echo(error), [(1, kem_key(0x20))])
    exchange, body = seal(kem_key(0x20))
    answer = await send(server, body)
    assert SECRET.encode() not in bytes(answer.body)
    response = inside(exchange, answer)
    assert response.status == status
    assert problem.from_bytes(bytes(response.content)).to_dict() == error.to_dict()


@pytest.mark.parametrize("kind", [ValueError, KeyError, MemoryError, RecursionError, OSError, AssertionError])
async def test_an_unexpected_exception_leaks_nothing(kind, caplog):
    server = EnclaveServer(Echo(kind(SECRET)), [(1, kem_key(0x20))])
    exchange, body = seal(kem_key(0x20), SECRET.encode())
    with caplog.at_level(logging.DEBUG):
        answer = await send(server, body)
    response = inside(exchange, answer)
    sent = problem.from_bytes(bytes(response.content))
    assert (response.status, sent.code) == (500, "internal")
    assert SECRET not in json.dumps(sent.to_dict())
    assert SECRET not in caplog.text
    assert "Traceback" not in caplog.text
    assert kind.__name__ in caplog.text


async def test_answers_are_padded():
    """What an answer's length tells is its bucket."""
    lengths = set()
    for size in range(100, 200):
        server = EnclaveServer(Echo(NotFound(code="a" * size)), [(1, kem_key(0x20))])
        lengths.add(len((await send(server, seal(kem_key(0x20), b"abc")[1])).body))
    assert len(lengths) <= 20


async def test_replaced_keys_are_forgotten():
    server = EnclaveServer(Echo(), [(1, kem_key(0x20))])
    server.replace_keys([(2, kem_key())])
    assert outer(await send(server, seal(kem_key(0x20))[1]))["code"] == "ohttp.key"
    exchange, body = seal(kem_key(), b"x", key_id=2)
    assert inside(exchange, await send(server, body)).status == 200


async def test_a_server_without_keys():
    assert outer(await send(EnclaveServer(Echo()), seal(kem_key(0x20))[1]))["code"] == "ohttp.key"


async def test_an_unknown_key_may_come_with_one_renewal():
    renewed = 0

    async def renew() -> None:
        nonlocal renewed
        renewed += 1
        server.replace_keys([(1, kem_key(0x20))])

    server = EnclaveServer(Echo(), renew=renew)
    exchange, body = seal(kem_key(0x20), b"x")
    assert inside(exchange, await send(server, body)).status == 200
    answer = await send(server, seal(kem_key(0x20), key_id=9)[1])
    assert outer(answer)["code"] == "ohttp.key"
    assert renewed == 2


async def test_requests_that_wait_for_a_key_are_bounded():
    gate = asyncio.Event()
    calls = 0

    async def renew() -> None:
        nonlocal calls
        calls += 1
        await gate.wait()

    server = EnclaveServer(Echo(), renew=renew)
    body = seal(kem_key(0x20))[1]
    waiting = [asyncio.ensure_future(send(server, body)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    assert outer(await send(server, body))["code"] == "ohttp.key"  # at once
    gate.set()
    assert {(await task).status for task in waiting} == {400}
    assert calls == MAX_WAITING
    assert (await send(server, body)).status == 400
    assert calls == MAX_WAITING + 1


@pytest.mark.parametrize(
    "error", [None, NotFound("no"), ValueError("no")], ids=["answer", "refusal", "failure"]
)
async def test_requests_and_answers_are_wiped(error):
    """Once an answer is sealed, nothing of it or of its request is left in the buffers that they came in."""

    class Giving(Echo):
        async def __call__(self, request: InnerRequest) -> bhttp.Response:
            response = await super().__call__(request)
            self.given = bytearray(response.content)
            return bhttp.Response(status=200, content=self.given)

    key, handler = kem_key(0x20), Giving(error)
    server = EnclaveServer(handler, [(1, key)])
    exchange, body = seal(key, SECRET.encode() * 10_000)
    answer = await send(server, body)
    opened = bhttp.Response.from_bytes(exchange.open(answer.body))
    await asyncio.sleep(0)
    assert bytes(handler.seen[0].http.content) == bytes(len(SECRET) * 10_000)
    if error is None:
        assert bytes(opened.content) == (SECRET.encode() * 10_000)[::-1]
        assert handler.given == bytes(len(SECRET) * 10_000)


async def test_a_handler_s_own_bytes_stay(monkeypatch):
    """Such as a document that is served again and again."""
    kept = bytearray(b"kept")

    async def handler(request: InnerRequest) -> bhttp.Response:
        return bhttp.Response(status=200, content=memoryview(kept))

    key = kem_key(0x20)
    _, body = seal(key)
    await send(EnclaveServer(handler, [(1, key)]), body)
    await asyncio.sleep(0)
    assert kept == b"kept"
