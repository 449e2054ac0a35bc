"""Carries sans-I/O conversations over HTTP: whatever a flow yields is sent, whatever comes back is handed in.

The flows are `cloister.core`'s; this module sees methods, targets and opaque bodies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Final, Protocol, TypeVar

import httpx

from cloister.errors import TransportError
from cloister.net.messages import Answer, Fields

T = TypeVar("T")
MAX_ANSWER: Final = 128 << 20  # bytes
TIMEOUT: Final = httpx.Timeout(30.0, connect=5.0)


class Outgoing(Protocol):
    """What a flow yields."""

    @property
    def method(self) -> bytes:
        """HTTP method."""

    @property
    def target(self) -> bytes:
        """Origin form."""

    @property
    def fields(self) -> Fields:
        """Header fields."""

    @property
    def body(self) -> bytes | bytearray:
        """The whole body."""


Flow = Generator[Any, Any, T]


class Carrier:
    """A connection pool to one base URL, synchronous. Close it when done."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        self._http = httpx.Client(
            base_url=url, transport=transport, timeout=TIMEOUT, follow_redirects=False, trust_env=False
        )

    def run(self, flow: Flow[T]) -> T:
        """Drive a flow to its end; gives its result, or raises what it raises."""
        return drive(flow, self.send, time.sleep)

    def send(self, outgoing: Outgoing) -> Answer:
        """Send one request; raises TransportError."""
        try:
            with self._http.stream(
                outgoing.method.decode(),
                outgoing.target.decode(),
                headers=[*outgoing.fields],
                content=bytes(outgoing.body) if outgoing.body else None,
            ) as response:
                body = bytearray()
                for piece in response.iter_raw():
                    body += piece
                    _require_size(len(body))
                return _answer(response, body)
        except httpx.HTTPError as error:
            raise _lost(error) from error

    def upload(self, target: str, pieces: Any, size: int) -> Answer:
        """PUT a long body piece by piece; raises TransportError."""
        try:
            response = self._http.put(
                target,
                content=pieces,
                headers={"content-length": str(size)},
                timeout=httpx.Timeout(60.0, write=60.0),
            )
        except httpx.HTTPError as error:
            raise _lost(error) from error
        return _answer(response, response.content)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


class AsyncCarrier:
    """The same for asyncio."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._http = httpx.AsyncClient(
            base_url=url, transport=transport, timeout=TIMEOUT, follow_redirects=False, trust_env=False
        )

    async def run(self, flow: Flow[T]) -> T:
        """Drive a flow to its end; gives its result, or raises what it raises."""
        return await drive_async(flow, self.send, asyncio.sleep)

    async def send(self, outgoing: Outgoing) -> Answer:
        """Send one request; raises TransportError."""
        try:
            async with self._http.stream(
                outgoing.method.decode(),
                outgoing.target.decode(),
                headers=[*outgoing.fields],
                content=bytes(outgoing.body) if outgoing.body else None,
            ) as response:
                body = bytearray()
                async for piece in response.aiter_raw():
                    body += piece
                    _require_size(len(body))
                return _answer(response, body)
        except httpx.HTTPError as error:
            raise _lost(error) from error

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def drive(flow: Flow[T], send: Callable[[Any], Answer], sleep: Callable[[float], None]) -> T:
    """Drive a flow with a blocking ``send``; where that raises TransportError, the flow decides."""
    value, failure = None, None
    while True:
        try:
            outgoing = flow.throw(failure) if failure is not None else flow.send(value)
        except StopIteration as end:
            result: T = end.value
            return result
        value, failure = None, None
        seconds = getattr(outgoing, "seconds", None)
        if seconds is not None:
            sleep(seconds)
            continue
        try:
            value = send(outgoing)
        except TransportError as error:
            failure = error


async def drive_async(
    flow: Flow[T], send: Callable[[Any], Awaitable[Answer]], sleep: Callable[[float], Awaitable[None]]
) -> T:
    """Drive a flow with an asynchronous ``send``."""
    value, failure = None, None
    while True:
        try:
            outgoing = flow.throw(failure) if failure is not None else flow.send(value)
        except StopIteration as end:
            result: T = end.value
            return result
        value, failure = None, None
        seconds = getattr(outgoing, "seconds", None)
        if seconds is not None:
            await sleep(seconds)
            continue
        try:
            value = await send(outgoing)
        except TransportError as error:
            failure = error


def _answer(response: httpx.Response, body: bytes | bytearray) -> Answer:
    return Answer(
        status=response.status_code, body=body, content_type=response.headers.get("content-type", "").encode()
    )


def _require_size(length: int) -> None:
    if length > MAX_ANSWER:
        raise TransportError(claim="answer", expected=f"at most {MAX_ANSWER} B", actual="more")


def _lost(error: httpx.HTTPError) -> TransportError:
    return TransportError(
        "the service could not be reached",
        claim="connection",
        expected="an answer",
        actual=type(error).__name__,
        hint="Check the URL, and that the service runs",
    )
