"""The proxy as a whole: it verifies, then listens, and ends what it started."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cloister.client.client import AsyncClient
from cloister.client.proxy.forward import Forwarder
from cloister.client.proxy.listen import LOOPBACK, Listener, bind, bind_rpc
from cloister.client.proxy.rest import rest_app
from cloister.client.session import Session
from cloister.errors import CloisterError, UsageError

REST_PORT: Final = 8500
GRPC_PORT: Final = 8501
GRACE: Final = 10.0  # seconds that requests may take to finish when the proxy ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the proxy listens.

    Attributes:
        rest: TCP port of REST; 0 picks one.
        grpc: TCP port of gRPC; 0 picks one, None leaves gRPC out.
        unix: Path of a Unix socket that takes REST instead of a port.
        dangerous_listen: A host instead of this machine's own loopback addresses: requests and answers then
            cross the network to the proxy in the clear.
    """

    rest: int = REST_PORT
    grpc: int | None = GRPC_PORT
    unix: Path | None = None
    dangerous_listen: str | None = None


class Proxy:
    """A local endpoint of one service. ``async with`` starts and stops it.

    Args:
        client: Verifies, seals and signs. It is this object's: it is closed with it.
        places: Where to listen.
        grace: Seconds that requests may take to finish at the end.
    """

    def __init__(self, client: AsyncClient, places: Places, *, grace: float = GRACE) -> None:
        self.forwarder: Final = Forwarder(client=client)
        self.places: Final = places
        self.rest_port = 0
        self.grpc_port = 0
        self._grace = grace
        self._listener: Listener | None = None
        self._rpc: Any = None

    async def start(self) -> None:
        """Verify the service, then listen.

        Raises:
            Refused: the service, or every pool of it, is not what the policy demands; nothing listens then.
            UsageError: an address is taken, or an alias stands for a model that the service hasn't.
            Unavailable: the service can't be reached.
        """
        try:
            await self.forwarder.ensure()
            require_a_pool(self.forwarder.client.session)
            require_aliases(self.forwarder.client.session)
            await self._listen()
        except BaseException:
            await self.stop(grace=0)
            raise

    async def _listen(self) -> None:
        places = self.places
        hosts = LOOPBACK if places.dangerous_listen is None else (places.dangerous_listen,)
        self._listener = Listener(rest_app(self.forwarder, listen=places.dangerous_listen))
        if places.unix is not None:
            await self._listener.unix(places.unix)
        else:
            sockets, self.rest_port = bind(hosts, places.rest)
            await self._listener.tcp(sockets)
        if places.grpc is not None:
            from cloister.client.proxy.rpc import rpc_server

            self._rpc = rpc_server(self.forwarder)
            self.grpc_port = bind_rpc(self._rpc, hosts, places.grpc)
            await self._rpc.start()

    async def stop(self, grace: float | None = None) -> None:
        """Accept nothing more, let requests finish, close everything."""
        grace = self._grace if grace is None else grace
        ends = []
        if self._listener is not None:
            ends.append(self._listener.close(grace))
        if self._rpc is not None:
            ends.append(self._rpc.stop(grace))
        self._listener = self._rpc = None
        await asyncio.gather(*ends)
        await self.forwarder.client.aclose()

    async def __aenter__(self) -> Proxy:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


def require_aliases(session: Session) -> None:
    """Refuse an alias for a model that isn't served: it would hide the one that has its name."""
    document = session.conversation.current().document
    served = {each.model for entry in document.pools for each in entry.models}
    for short, model in session.aliases.items():
        if model not in served:
            raise UsageError(
                "the alias stands for a model that the service hasn't",
                code="proxy.alias",
                claim="--alias",
                expected="a model that `cloister verify URL` lists",
                actual=f"{short}={model}"[:200],
            )


def require_a_pool(session: Session) -> None:
    """Refuse a service of which the policy accepts no pool; raises what the policy says of the first."""
    refusal: CloisterError | None = None
    for entry in session.conversation.current().document.pools:
        try:
            session.policy.require_pool(entry)
        except CloisterError as error:
            refusal = refusal or error
        else:
            return
    if refusal is not None:
        raise refusal
