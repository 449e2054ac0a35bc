"""Carries sans-I/O conversations over HTTP: whatever a flow yields is sent, whatever comes back is handed in.

Over plain HTTP the encapsulated requests, large and many, take connections of our own; all else is httpx's.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import httpx

from cloister.core.protocol.flow import Flow, Outgoing, drive, drive_async
from cloister.errors import TransportError, UsageError
from cloister.net.link import Peer, Upstream
from cloister.net.messages import Answer, Limits
from cloister.party.wire import Wire, reason_of

T = TypeVar("T")

# What httpx raises for a lost connection, an unusable URL, a closed client, and a body of another length.
_FOREIGN: Final = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, RuntimeError)
MAX_ANSWER: Final = 128 << 20  # bytes
TIMEOUT: Final = httpx.Timeout(30.0, connect=5.0)
PATIENCE: Final = 120.0  # seconds for the answer to an encapsulated request: a model may have to be loaded
_OHTTP: Final = b"/ohttp"
_LIMITS: Final = Limits(max_body=MAX_ANSWER)


class Carrier:
    """A connection pool to one base URL, synchronous. Close it when done.

    Args:
        url: Base URL, ``http://`` or ``https://``.
        transport: An httpx transport that carries everything, for tests and special networks.

    Raises:
        UsageError: another URL.
    """

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        self._plain = _plain(url) if transport is None else None
        self._wire = Wire(self._plain.host, self._plain.port, limits=_LIMITS) if self._plain else None
        self._http = httpx.Client(
            base_url=url, transport=transport, timeout=TIMEOUT, follow_redirects=False, trust_env=False
        )

    def run(self, flow: Flow[T]) -> T:
        """Drive a flow to its end; gives its result, or raises what it raises."""
        return drive(flow, self.send, time.sleep)

    def send(self, outgoing: Outgoing) -> Answer:
        """Send one request; raises TransportError."""
        if self._wire is not None and self._plain is not None and outgoing.target == _OHTTP:
            return self._wire.request(
                outgoing.method,
                self._plain.prefix + outgoing.target,
                (self._plain.field, *outgoing.fields),
                outgoing.content,
                timeout=_patience(outgoing),
                meanwhile=outgoing.meanwhile,
            )
        try:
            with self._http.stream(
                outgoing.method.decode(),
                outgoing.target.decode(),
                headers=[*outgoing.fields],
                content=bytes(outgoing.body) if outgoing.content else None,
            ) as response:
                return _whole(response)
        except _FOREIGN as error:
            raise _lost(error, self._http.base_url) from error

    def upload(self, target: str, pieces: Any, size: int) -> Answer:
        """PUT a long body piece by piece; raises TransportError."""
        try:
            with self._http.stream(
                "PUT",
                target,
                content=pieces,
                headers={"content-length": str(size), "accept-encoding": "identity"},
                timeout=httpx.Timeout(60.0, write=60.0),
            ) as response:
                return _whole(response)
        except _FOREIGN as error:
            raise _lost(error, self._http.base_url) from error

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        if self._wire is not None:
            self._wire.close()


class AsyncCarrier:
    """The same for asyncio."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._plain = _plain(url) if transport is None else None
        self._link: Upstream | None = None  # made where its event loop runs
        self._http = httpx.AsyncClient(
            base_url=url, transport=transport, timeout=TIMEOUT, follow_redirects=False, trust_env=False
        )

    async def run(self, flow: Flow[T]) -> T:
        """Drive a flow to its end; gives its result, or raises what it raises."""
        return await drive_async(flow, self.send, asyncio.sleep)

    async def send(self, outgoing: Outgoing) -> Answer:
        """Send one request; raises TransportError."""
        if self._plain is not None and outgoing.target == _OHTTP:
            if self._link is None:
                self._link = Upstream(Peer(host=self._plain.host, port=self._plain.port), limits=_LIMITS)
            return await self._link.request(
                outgoing.method,
                self._plain.prefix + outgoing.target,
                (self._plain.field, *outgoing.fields),
                outgoing.content,
                timeout=_patience(outgoing),
            )
        try:
            async with self._http.stream(
                outgoing.method.decode(),
                outgoing.target.decode(),
                headers=[*outgoing.fields],
                content=bytes(outgoing.body) if outgoing.content else None,
            ) as response:
                body = bytearray()
                async for piece in response.aiter_raw():
                    body += piece
                    _require_size(len(body))
                return _answer(response, body)
        except _FOREIGN as error:
            raise _lost(error, self._http.base_url) from error

    async def aclose(self) -> None:
        """Close the connections."""
        self._plain = None  # a request after this is httpx's to refuse
        await self._http.aclose()
        if self._link is not None:
            await self._link.aclose()


@dataclass(frozen=True, slots=True)
class _Plain:
    """A base URL of plain HTTP: where to connect, the Host field, and what stands before each target."""

    host: str
    port: int
    field: tuple[bytes, bytes]
    prefix: bytes


def _plain(url: str) -> _Plain | None:
    """The parts of an ``http://`` URL; None where httpx is needed, as for TLS and for URLs with a password.

    Raises:
        UsageError: neither ``http://`` nor ``https://``, or no host.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise _bad_url(url) from error
    port_exists = parsed.port is None or 0 < parsed.port < 65536
    if parsed.scheme not in ("http", "https") or not parsed.host or not port_exists:
        raise _bad_url(url)
    if parsed.scheme == "https" or parsed.userinfo or parsed.query:
        return None
    return _Plain(
        host=parsed.raw_host.decode("ascii"),
        port=parsed.port or 80,
        field=(b"host", parsed.netloc),
        prefix=parsed.raw_path.rstrip(b"/"),
    )


def _bad_url(url: str) -> UsageError:
    return UsageError(
        "the URL is none of a service",
        code="net.url",
        claim="URL",
        expected="http://HOST[:PORT] or https://HOST[:PORT]",
        actual=url[:200],
    )


def _patience(outgoing: Outgoing) -> float:
    """Seconds for a request to leave and its answer to come."""
    return PATIENCE + _LIMITS.transfer_timeout(len(outgoing.content))


def _whole(response: httpx.Response) -> Answer:
    """The answer as it came, not expanded; raises TransportError where it is too long."""
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        _require_size(len(body))
    return _answer(response, body)


def _answer(response: httpx.Response, body: bytes | bytearray) -> Answer:
    return Answer(
        status=response.status_code, body=body, content_type=response.headers.get("content-type", "").encode()
    )


def _require_size(length: int) -> None:
    if length > MAX_ANSWER:
        raise TransportError(claim="answer", expected=f"at most {MAX_ANSWER} B", actual="more")


def _lost(error: Exception, url: httpx.URL) -> TransportError:
    return TransportError(
        "the service could not be reached",
        claim="connection",
        expected=f"an answer from {str(url.copy_with(userinfo=b'')).rstrip('/')}",
        actual=reason_of(error),
        hint="Check the URL, and that the service runs",
    )
