"""The key service's inner routes. Each takes one message and gives one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from cloister.core.encoding import encode
from cloister.core.ohttp import bhttp
from cloister.core.protocol import outer
from cloister.core.protocol.exchange import HeadRequest, PoolCreation, Publication, StatementQuery
from cloister.core.protocol.release import ReleaseRequest
from cloister.enclave.keyservice.service import KeyService
from cloister.enclave.server import InnerRequest, cbor_response, route_not_found
from cloister.errors import AccessRefused

_Route = Callable[[KeyService, memoryview], Awaitable[bytes]]


class KeyServiceRoutes:
    """Routes inner requests to a key service."""

    def __init__(self, service: KeyService) -> None:
        self._service = service

    async def __call__(self, request: InnerRequest) -> bhttp.Response:
        """Answer one inner request."""
        route = _ROUTES.get(request.http.path) if request.http.method == b"POST" else None
        if route is None:
            raise route_not_found(request)
        expected = _SENDERS.get(route)
        if expected is not None and request.sender != expected:
            raise AccessRefused(
                "this route is not for everyone",
                code="access.sender",
                claim="sender",
                expected=_WHO[expected],
                actual=_WHO.get(request.sender, "the public"),
            )
        return cbor_response(await route(self._service, memoryview(request.http.content)))


async def _challenge(service: KeyService, content: memoryview) -> bytes:
    return service.challenge(HeadRequest.from_bytes(content)).to_bytes()


async def _possession(service: KeyService, content: memoryview) -> bytes:
    return (await service.possession(HeadRequest.from_bytes(content))).to_bytes()


async def _release(service: KeyService, content: memoryview) -> bytes:
    return (await service.release(ReleaseRequest.from_bytes(content))).to_bytes()


async def _publish(service: KeyService, content: memoryview) -> bytes:
    return (await service.publish(Publication.from_bytes(content))).to_bytes()


async def _create_pool(service: KeyService, content: memoryview) -> bytes:
    return (await service.create_pool(PoolCreation.from_bytes(content))).to_bytes()


async def _current_statement(service: KeyService, content: memoryview) -> bytes:
    found = service.statement_of(StatementQuery.from_bytes(content))
    return encode({"pool": found.pool, "statement": found.signed.to_data()})


_ROUTES: Final[dict[bytes, _Route]] = {
    b"/challenges": _challenge,
    b"/possession": _possession,
    b"/releases": _release,
    b"/statements": _publish,
    b"/statements/current": _current_statement,
    b"/pools": _create_pool,
}

# Only the host can break this, by lying: it keeps strangers from creating pools and from costly appraisals.
_SENDERS: Final[dict[_Route, bytes]] = {
    _challenge: outer.ENCLAVE,
    _release: outer.ENCLAVE,
    _create_pool: outer.OPERATOR,
}
_WHO: Final = {
    outer.ENCLAVE: "an enclave, through its launcher",
    outer.OPERATOR: "the operator, through the gateway's admin socket",
}
