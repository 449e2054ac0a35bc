"""Carries sans-I/O conversations over HTTP: whatever a flow yields is sent, whatever comes back is handed in.

Over plain HTTP the encapsulated requests, large and many, take connections of our own; all else is httpx's.
"""

from __future__ import annotations

import asyncio
import math
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
_CHECK: Final = "Check the URL, and that the service runs"
_PLAIN: Final = "Does the service speak plain http? Then its URL begins with http://"
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
        self._wire = (
            Wire(self._plain.host, self._plain.port, limits=_LIMITS, silence=PATIENCE)
            if self._plain
            else None
        )
        self._http = httpx.Client(
            base_url=url, transport=transport, timeout=TIMEOUT, follow_redirects=False, trust_env=False
        )

    def run(self, flow: Flow[T], timeout: float | None = None) -> T:
        """Drive a flow to its end; gives its result, or raises what it raises.

        Args:
            flow: What is sent, and what is made of the answers.
            timeout: Seconds for all of it; None leaves each exchange its own.

        Raises:
            TransportError: code ``transport.timeout``, where the time is over.
        """
        until = _until(timeout)

        def pause(seconds: float) -> None:
            _require_time(until, seconds)
            time.sleep(seconds)

        return drive(flow, lambda outgoing: self.send(outgoing, until), pause)

    def send(self, outgoing: Outgoing, until: float = math.inf) -> Answer:
        """Send one request, to be answered before ``until`` (monotonic seconds); raises TransportError."""
        _require_time(until)
        if self._wire is not None and self._plain is not None and outgoing.target == _OHTTP:
            return self._wire.request(
                outgoing.method,
                self._plain.prefix + outgoing.target,
                (self._plain.field, *outgoing.fields),
                outgoing.content,
                timeout=_patience(outgoing, until),
                meanwhile=outgoing.meanwhile,
            )
        try:
            with self._http.stream(
                outgoing.method.decode(),
                outgoing.target.decode(),
                headers=[*outgoing.fields],
                content=bytes(outgoing.body) if outgoing.content else None,
                timeout=_timeout(outgoing, until),
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

    async def run(self, flow: Flow[T], timeout: float | None = None) -> T:  # noqa: ASYNC109
        """As `Carrier.run`."""
        until = _until(timeout)

        async def pause(seconds: float) -> None:
            _require_time(until, seconds)
            await asyncio.sleep(seconds)

        return await drive_async(flow, lambda outgoing: self.send(outgoing, until), pause)

    async def send(self, outgoing: Outgoing, until: float = math.inf) -> Answer:
        """As `Carrier.send`."""
        _require_time(until)
        if self._plain is not None and outgoing.target == _OHTTP:
            if self._link is None:
                self._link = Upstream(Peer(host=self._plain.host, port=self._plain.port), limits=_LIMITS)
            return await self._link.request(
                outgoing.method,
                self._plain.prefix + outgoing.target,
                (self._plain.field, *outgoing.fields),
                outgoing.content,
                timeout=_patience(outgoing, until),
            )
        try:
            async with self._http.stream(
                outgoing.method.decode(),
                outgoing.target.decode(),
                headers=[*outgoing.fields],
                content=bytes(outgoing.body) if outgoing.content else None,
                timeout=_timeout(outgoing, until),
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


def _patience(outgoing: Outgoing, until: float) -> float:
    """Seconds for a request to leave and its answer to come."""
    usual = PATIENCE + _LIMITS.transfer_timeout(len(outgoing.content))
    return min(usual, max(until - time.monotonic(), 0.001))


def _timeout(outgoing: Outgoing, until: float) -> httpx.Timeout:
    """The same for what httpx carries, for each wait."""
    usual = PATIENCE if outgoing.target == _OHTTP else TIMEOUT.read or PATIENCE
    left = max(until - time.monotonic(), 0.001)
    return httpx.Timeout(min(usual, left), connect=min(5.0, left))


def _until(timeout: float | None) -> float:
    """Monotonic seconds at which the time is over."""
    return math.inf if timeout is None else time.monotonic() + timeout


def _require_time(until: float, seconds: float = 0.0) -> None:
    """Refuse to begin what can't be over in time; raises TransportError."""
    if time.monotonic() + seconds >= until:
        raise TransportError(
            "the answer did not come in time", code="transport.timeout", hint="Allow more seconds"
        )


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
        code="transport.timeout" if isinstance(error, httpx.TimeoutException) else "transport",
        claim="connection",
        expected=f"an answer from {str(url.copy_with(userinfo=b'')).rstrip('/')}",
        actual=reason_of(error),
        hint=_PLAIN if url.scheme == "https" and _speaks_no_tls(error) else _CHECK,
    )


def _speaks_no_tls(error: Exception) -> bool:
    """Whether it failed as TLS does where it meets plain HTTP; a bad certificate is TLS all the same."""
    text = str(error).upper()
    failed = isinstance(error, httpx.ConnectError) and ("SSL" in text or "RESET" in text or not text)
    return isinstance(error, httpx.TimeoutException) or (failed and "CERTIFICATE" not in text)
