"""GET requests to a vendor's service, bounded in size and time. What comes back is checked by the caller."""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import httpx

from cloister.errors import FormatError, NotFound, Unavailable, UsageError

TIMEOUT: Final = httpx.Timeout(20.0, connect=5.0)  # seconds between two signs of life
DEADLINE: Final = 60.0  # seconds for one whole answer
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """One answer: its body, and its header fields by lower-case name."""

    body: bytes
    fields: Mapping[str, str]


class Service:
    """A connection pool for GET requests. Close it when done; no redirect is followed."""

    def __init__(
        self,
        *,
        tls_ca: str | None = None,
        transport: httpx.BaseTransport | None = None,
        deadline: float = DEADLINE,
    ) -> None:
        """Make a client.

        Args:
            tls_ca: File of certificates (PEM) to believe instead of the system's, for a private cache.
            transport: An httpx transport that carries everything, for tests.
            deadline: Seconds for one whole answer.

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
        self._http = httpx.Client(
            verify=context, transport=transport, timeout=TIMEOUT, follow_redirects=False, trust_env=False
        )

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

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
        until = time.monotonic() + self._deadline
        try:
            with self._http.stream(
                "GET", url, params=dict(query), headers={"accept-encoding": "identity"}
            ) as answer:
                _require_status(answer.status_code, url, what)
                body = bytearray()
                for part in answer.iter_raw():
                    body += part
                    if len(body) > limit:
                        raise FormatError(
                            f"the {what} is too long",
                            code="collateral.format",
                            claim=what,
                            expected=f"at most {limit} B",
                            actual="more",
                        )
                    if time.monotonic() > until:
                        raise httpx.ReadTimeout("the whole answer took too long")
                return Fetched(body=bytes(body), fields=dict(answer.headers))
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise Unavailable(
                f"the {what} could not be fetched",
                code="collateral.service",
                claim=url,
                expected="an answer",
                actual=type(error).__name__,
            ) from error


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
