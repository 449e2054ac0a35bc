"""httpx transports: whatever an SDK sends to a model's path goes attested, sealed and signed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import httpx

from cloister.client.client import AsyncClient, Client
from cloister.client.identity import Identity
from cloister.client.session import model_of, path_of
from cloister.core.ohttp import bhttp
from cloister.core.protocol import problem
from cloister.core.protocol.trust import UserPolicy
from cloister.errors import CloisterError, TransportError

# Fields of the outer hop; inside an encapsulation they mean nothing, or would tell what needn't be told.
_HOP: Final = frozenset(
    {b"connection", b"host", b"content-length", b"transfer-encoding", b"accept-encoding", b"user-agent"}
)


class CloisterTransport(httpx.BaseTransport):
    """An httpx transport over a `Client`, which it closes with itself."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request to the enclave; errors of the enclave come back as problem documents."""
        content = request.read()
        try:
            model = self._client.session.resolve(model_of(request.url.raw_path))
            inner = _inner(request, model, content)
            return _response(self._client.send(model, inner, timeout=timeout_of(request)), request)
        except CloisterError as error:
            return _problem(error, request)

    def close(self) -> None:
        """Close the client."""
        self._client.close()


class AsyncCloisterTransport(httpx.AsyncBaseTransport):
    """The same over an `AsyncClient`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request to the enclave; errors of the enclave come back as problem documents."""
        content = await request.aread()
        try:
            model = self._client.session.resolve(model_of(request.url.raw_path))
            inner = _inner(request, model, content)
            return _response(await self._client.send(model, inner, timeout=timeout_of(request)), request)
        except CloisterError as error:
            return _problem(error, request)

    async def aclose(self) -> None:
        """Close the client."""
        await self._client.aclose()


def httpx_transport(
    url: str,
    *,
    policy: UserPolicy,
    identity: Identity,
    memory: Path | None = None,
    aliases: dict[str, str] | None = None,
) -> CloisterTransport:
    """A transport with a client of its own: for ``httpx.Client(transport=...)``, which closes it.

    Args:
        url: Of any gateway of the service; nothing about it is trusted.
        policy: What must hold before a request leaves.
        identity: Who asks.
        memory: File that keeps what was seen of the service between runs.
        aliases: Short names for model ids, in paths.
    """
    return CloisterTransport(Client(url, policy=policy, identity=identity, memory=memory, aliases=aliases))


def async_httpx_transport(
    url: str,
    *,
    policy: UserPolicy,
    identity: Identity,
    memory: Path | None = None,
    aliases: dict[str, str] | None = None,
) -> AsyncCloisterTransport:
    """The same for ``httpx.AsyncClient(transport=...)``."""
    return AsyncCloisterTransport(
        AsyncClient(url, policy=policy, identity=identity, memory=memory, aliases=aliases)
    )


def _inner(request: httpx.Request, model: str, content: bytes) -> bhttp.Request:
    fields = tuple((name.lower(), value) for name, value in request.headers.raw if name.lower() not in _HOP)
    path = path_of(request.url.raw_path, model)
    return bhttp.Request(method=request.method.encode(), path=path, fields=fields, content=content)


def timeout_of(request: httpx.Request) -> float | None:
    """Seconds for the whole answer: what httpx allows for a read, which comes as one here."""
    allowed: float | None = request.extensions.get("timeout", {}).get("read")
    return allowed


def _response(inner: bhttp.Response, request: httpx.Request) -> httpx.Response:
    return httpx.Response(
        inner.status, headers=list(inner.fields), content=bytes(inner.content), request=request
    )


def raise_lost(error: CloisterError, request: httpx.Request) -> None:
    """Raise httpx's error where nobody answered; what an enclave answers has a status."""
    if error.code == "transport.timeout":
        raise httpx.ReadTimeout(str(error), request=request) from error
    if isinstance(error, TransportError):
        raise httpx.TransportError(str(error), request=request) from error


def _problem(error: CloisterError, request: httpx.Request) -> httpx.Response:
    raise_lost(error, request)
    return httpx.Response(
        problem.status_of(error),
        headers=[(b"content-type", problem.MEDIA_TYPE)],
        content=problem.to_bytes(error),
        request=request,
    )
