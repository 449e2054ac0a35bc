"""The service document as the gateway serves it: fetched from the key service, kept a moment, never read.

It is signed and the same for everyone, so a cache can't alter it and needn't be trusted; while the key
service is down, the last one is served until clients find it expired.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cloister.errors import CloisterError, Unavailable
from cloister.host.gateway.forward import Forwarder
from cloister.host.gateway.registry import KEY_SERVICE, Registry
from cloister.host.problems import problem, status_of
from cloister.net.messages import Answer

TARGET: Final = b"/.well-known/cloister"
_FRESH: Final = 0.1  # seconds
_TIMEOUT: Final = 5.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Bytes of a service document, with their entity tag."""

    body: bytes
    content_type: str
    etag: str


class DocumentCache:
    """Fetches the document once for all who ask at the same time."""

    def __init__(
        self, registry: Registry, forwarder: Forwarder, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._forwarder = forwarder
        self._clock = clock
        self._lock = asyncio.Lock()
        self._last: Document | None = None
        self._checked = float("-inf")

    async def get(self) -> Document:
        """The document, at most about a second old while the key service is up.

        Raises:
            Unavailable: there has been none yet.
        """
        async with self._lock:
            if self._clock() - self._checked >= _FRESH:
                try:
                    self._last = await self._fetch()
                except CloisterError:
                    if self._last is None:
                        raise
                # After a failure too: a key service that is down isn't asked once per client.
                self._checked = self._clock()
        if self._last is None:
            raise Unavailable("no service document yet", code="gateway.no-document")
        return self._last

    async def answer(self) -> Answer:
        """The document for the enclaves' front, or a problem."""
        try:
            found = await self.get()
        except CloisterError as error:
            return problem(status_of(error), error.code, retry_after=1)
        return Answer(body=found.body, content_type=found.content_type.encode())

    async def _fetch(self) -> Document:
        entry = self._registry.choose(KEY_SERVICE, self._clock())
        answer = await self._forwarder.link(entry.worker).request(b"GET", TARGET, timeout=_TIMEOUT)
        if answer.status != 200:
            raise Unavailable(
                "the key service has no document",
                code="gateway.no-document",
                expected=200,
                actual=answer.status,
            )
        body = bytes(answer.body)
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return Document(body=body, content_type=answer.content_type.decode("latin-1"), etag=etag)
