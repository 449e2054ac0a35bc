"""One server for every enclave: Oblivious HTTP in, routes inside (DESIGN, section 4).

What the host sees of a request is one status and one ciphertext. Whatever goes wrong after a key was
established is answered inside the encapsulation; before that, the outer answer says only that no key opened
the request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from cloister.core.ohttp import bhttp
from cloister.core.ohttp.encapsulation import (
    MAX_HEAD,
    MEDIA_TYPE_REQUEST,
    MEDIA_TYPE_RESPONSE,
    Decapsulation,
    Gateway,
    OpeningRequest,
)
from cloister.core.ohttp.kem import PrivateKey
from cloister.core.protocol import outer, problem
from cloister.core.protocol.limits import MAX_INNER_REQUEST
from cloister.enclave.memory import wipe
from cloister.errors import BindingRefused, CloisterError, NotFound
from cloister.net.body import Body
from cloister.net.messages import Answer, Head

log: Final = logging.getLogger(__name__)
CBOR: Final = b"application/cbor"
_REQUEST_TYPE: Final = MEDIA_TYPE_REQUEST.encode()
_RESPONSE_TYPE: Final = MEDIA_TYPE_RESPONSE.encode()
MAX_WAITING: Final = 64  # requests that wait for a key; more are refused at once
_KEY_PROBLEM: Final = "https://iana.org/assignments/http-problem-types#ohttp-key"


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerRequest:
    """A request as the enclave sees it.

    Attributes:
        http: Method, path, fields and content; the content is a view of the decrypted buffer.
        enc: The HPKE encapsulated key (its length depends on the suite).
        key_id: Which key configuration opened it.
        arrived: Monotonic seconds when its last ciphertext byte was there.
        opened: Monotonic seconds when it was decrypted.
        sender: Whose the host says it is: ``outer.OPERATOR``, ``outer.ENCLAVE``, empty for the public's.
        body: As it came, which knows whether anybody still waits for the answer; None where that isn't known.
    """

    http: bhttp.Request
    enc: bytes
    key_id: int
    arrived: float
    opened: float
    sender: bytes = b""
    body: Body | None = None


Handler = Callable[[InnerRequest], Awaitable[bhttp.Response]]


class EnclaveServer:
    """Opens encapsulated requests, hands them to a handler, and encapsulates its answers.

    Args:
        handler: Routes an inner request. It may raise any `CloisterError`.
        keys: (key id, private key) pairs; `replace_keys` changes them while serving.
        renew: Asks for newer keys where a request names one that isn't here: its epoch may have begun since
            the last renewal. It bounds by itself how often it does that.
        encrypted: Told how many seconds the padding and encryption of an answer took.
    """

    def __init__(
        self,
        handler: Handler,
        keys: Iterable[tuple[int, PrivateKey]] = (),
        *,
        renew: Callable[[], Awaitable[None]] | None = None,
        encrypted: Callable[[float], None] | None = None,
    ) -> None:
        self._handler = handler
        self._gateway = Gateway(keys)
        self._renew = renew
        self._encrypted = encrypted
        self._waiting = 0  # requests whose key may come with a renewal

    def replace_keys(self, keys: Iterable[tuple[int, PrivateKey]]) -> None:
        """Serve these keys from the next request on; those left out are forgotten."""
        self._gateway = Gateway(keys)

    async def handle(self, head: Head, body: Body) -> Answer:
        """Answer one outer request (the `cloister.net.front` handler)."""
        if head.fields.get(b"content-type") != _REQUEST_TYPE:
            return _outer(415, "about:blank", "ohttp.media-type")
        try:
            exchange, plaintext, arrived = await self._open(body)
        except BindingRefused as error:
            return _outer(400, _KEY_PROBLEM, error.code)
        except CloisterError as error:
            return _outer(400, "about:blank", error.code)
        plain: list[bytearray | memoryview] = [plaintext]
        try:
            sender = head.fields.get(outer.SENDER, b"")
            response = await self._answer(exchange, plaintext, arrived, sender, body)
            began = time.monotonic()
            message = response.to_bytes(pad=True)
            plain.append(message)
            if isinstance(response.content, bytearray):  # the handler gave it away
                plain.append(response.content)
            sealed = exchange.seal(message)
            if self._encrypted is not None:
                self._encrypted(time.monotonic() - began)
            return Answer(status=200, content_type=_RESPONSE_TYPE, body=sealed)
        finally:  # as soon as the answer is written: wiping 600 KB would hold it up for 50 us
            asyncio.get_running_loop().call_soon(_wipe, plain)

    async def _open(self, body: Body) -> tuple[Decapsulation, memoryview, float]:
        """Open a request while it arrives; says also when its end was there."""
        await body.more(min(len(body), MAX_HEAD) - 1)
        opening = await self._begin(body)
        try:
            while not body.complete:
                opening.advance(body.received)
                await body.more(body.received)
        except BaseException:
            opening.abandon()
            raise
        arrived = time.monotonic()
        opening.advance(len(body))
        return *opening.finish(), arrived

    async def _begin(self, body: Body) -> OpeningRequest:
        """Begin to open a request, once more after a renewal where its key isn't here."""
        try:
            return self._gateway.begin(body.view)
        except BindingRefused:
            if self._renew is None or self._waiting >= MAX_WAITING:
                raise
        self._waiting += 1
        try:
            await self._renew()
        finally:
            self._waiting -= 1
        return self._gateway.begin(body.view)

    async def _answer(
        self,
        exchange: Decapsulation,
        plaintext: bytes | bytearray | memoryview,
        arrived: float,
        sender: bytes,
        body: Body,
    ) -> bhttp.Response:
        try:
            request = InnerRequest(
                http=bhttp.Request.from_bytes(plaintext, max_content=MAX_INNER_REQUEST),
                enc=exchange.enc,
                key_id=exchange.key_id,
                arrived=arrived,
                opened=time.monotonic(),
                sender=sender,
                body=body,
            )
            return await self._handler(request)
        except CloisterError as error:
            return problem_response(error)
        except Exception as error:
            log.error("a request failed inside the enclave: %s", type(error).__name__)
            return problem_response(CloisterError("the enclave failed on this request", code="internal"))


def _wipe(plain: list[bytearray | memoryview]) -> None:
    for buffer in plain:
        wipe(buffer)


def problem_response(error: CloisterError) -> bhttp.Response:
    """The inner response that carries an error."""
    return bhttp.Response(
        status=problem.status_of(error),
        fields=((b"content-type", problem.MEDIA_TYPE),),
        content=problem.to_bytes(error),
    )


def cbor_response(content: bytes) -> bhttp.Response:
    """An inner response of deterministic CBOR."""
    return bhttp.Response(status=200, fields=((b"content-type", CBOR),), content=content)


def route_not_found(request: InnerRequest) -> NotFound:
    """The error of a path or a method that the enclave doesn't have."""
    return NotFound(
        "no such route",
        code="not-found.route",
        claim="route",
        expected="one of the enclave's routes",
        actual=f"{request.http.method.decode('ascii', 'replace')[:16]}",
    )


def _outer(status: int, kind: str, code: str) -> Answer:
    body = json.dumps({"type": kind, "code": code}).encode()
    return Answer(status=status, content_type=problem.MEDIA_TYPE, body=body)
