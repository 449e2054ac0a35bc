"""GET requests to a vendor's service, bounded in size and time. What comes back is checked by the caller."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import httpx

from cloister.errors import FormatError, NotFound, Unavailable, UsageError

TIMEOUT: Final = httpx.Timeout(20.0, connect=5.0)  # seconds between two signs of life
DEADLINE: Final = 60.0  # seconds for one request and its whole answer
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """One answer: its body, and its header fields by lower-case name."""

    body: bytes
    fields: Mapping[str, str]


class Service:
    """A connection pool for GET requests. Close it when done; no redirect is followed.

    It has an event loop of its own, because only a task can be given up whatever it is waiting for. So it
    can't be used where a loop is running.
    """

    def __init__(
        self,
        *,
        tls_ca: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        deadline: float = DEADLINE,
    ) -> None:
        """Make a client.

        Args:
            tls_ca: File of certificates (PEM) to believe instead of the system's, for a private cache.
            transport: An httpx transport that carries everything, for tests.
            deadline: Seconds for one request and its whole answer.

        Raises:
            UsageError: the file holds no certificates.
        """
        try:
            context = ssl.create_default_context(cafile=tls_ca)
        except OSError as error:  # ssl.SSLError is one, too
            raise UsageError(
                "the certificates can't be read", code="collateral.tls", claim="--tls-ca", actual=tls_ca
            ) from error
        self._deadline = deadline
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(
            verify=context, transport=transport, timeout=TIMEOUT, follow_redirects=False, trust_env=False
        )

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        with self._runner:
            self._runner.run(self._http.aclose())

    def get(self, url: str, query: Mapping[str, str], *, limit: int, what: str) -> Fetched:
        """Fetch one thing.

        Args:
            url: Of the thing: https, or http on this machine.
            query: Its query parameters.
            limit: Most bytes of the body.
            what: Its name, for errors.

        Raises:
            UsageError: the URL is none, or not https.
            NotFound: the service has no such thing (status 404).
            FormatError: the body is longer than ``limit``.
            Unavailable: no answer in time, or another status.
        """
        require_url(url)
        try:
            return self._runner.run(self._get(url, query, limit, what))
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, TimeoutError) as error:
            raise Unavailable(
                f"the {what} could not be fetched",
                code="collateral.service",
                claim=url,
                expected="an answer",
                actual=type(error).__name__,
            ) from error

    async def _get(self, url: str, query: Mapping[str, str], limit: int, what: str) -> Fetched:
        async with (
            asyncio.timeout(self._deadline),
            self._http.stream(
                "GET", url, params=dict(query), headers={"accept-encoding": "identity"}
            ) as answer,
        ):
            _require_status(answer.status_code, url, what)
            body = bytearray()
            async for part in answer.aiter_raw():
                body += part
                if len(body) > limit:
                    raise FormatError(
                        f"the {what} is too long",
                        code="collateral.format",
                        claim=what,
                        expected=f"at most {limit} B",
                        actual="more",
                    )
            return Fetched(body=bytes(body), fields=dict(answer.headers))


def require_url(url: str) -> str:
    """Refuse a URL that would go over the network unprotected; raises UsageError."""
    try:
        parts = urlsplit(url)
        local = parts.scheme == "http" and parts.hostname in _LOOPBACK
        usable = (parts.scheme == "https" and bool(parts.hostname)) or local
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(
            "not the URL of a service",
            code="collateral.url",
            claim="URL",
            expected="https://..., or http:// on this machine",
            actual=url[:200],
        )
    return url.rstrip("/")


def _require_status(status: int, url: str, what: str) -> None:
    if status == 200:
        return
    if status == 404:
        raise NotFound(f"the service has no {what}", code="collateral.unknown", claim=url, actual=status)
    raise Unavailable(
        f"the service gave no {what}",
        code="collateral.service",
        claim=url,
        expected="status 200",
        actual=status,
        hint="It limits how often one may ask; try later" if status == 429 else "",
    )
