"""The compact HTTP/1.1 server of every enclave and of the gateway, for one route: ``POST /ohttp``.

Bodies of hundreds of kilobytes are read straight into the buffer that the handler owns. A few outer GETs can
be added; all else goes to another protocol (uvicorn's, in the gateway) or is answered 404.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from cloister.errors import UsageError
from cloister.net.accept import Acceptor, tcp_sockets, unix_socket, unlink
from cloister.net.connection import Connection, Get, Handler, Shared
from cloister.net.messages import Answer, Buffer, Fields, Head, Limits, Tap

__all__ = ["Answer", "Buffer", "Fields", "FrontServer", "Get", "Handler", "Head", "Limits", "Tap", "serve"]

_NONE: Final[Mapping[bytes, Get]] = MappingProxyType({})


class FrontServer:
    """A running server; `serve` makes it.

    Attributes:
        port: TCP port; 0 where the server listens on a Unix socket.
    """

    def __init__(self, listeners: list[socket.socket], shared: Shared, *, unix: Path | None) -> None:
        self.port = 0 if unix is not None else int(listeners[0].getsockname()[1])
        self._unix = None if unix is None else (unix, unix.stat().st_ino)
        self._acceptors: list[Acceptor] = []
        try:
            for each in listeners:
                self._acceptors.append(Acceptor(each, lambda: Connection(shared), shared.loop))
        except OSError:
            for acceptor in self._acceptors:
                acceptor.close()
            raise
        self._shared = shared
        limits = shared.limits
        shortest = min(
            limits.head_timeout,
            limits.body_timeout,
            limits.stall_timeout,
            limits.idle_timeout,
            limits.guest_timeout,
        )
        self._interval = min(1.0, max(0.02, shortest / 4))
        self._timer = shared.loop.call_later(self._interval, self._sweep)

    @property
    def connections(self) -> int:
        """Connections that are open now, handed-over ones included."""
        return len(self._shared.members)

    def _sweep(self) -> None:
        """One timer for all connections; one per request would cost more than the checks."""
        now = self._shared.loop.time()
        for member in list(self._shared.members):
            member.tick(now)
        self._timer = self._shared.loop.call_later(self._interval, self._sweep)

    async def close(self, grace: float = 5.0) -> None:
        """Accept nothing more, let requests in progress finish for ``grace`` seconds, then drop the rest."""
        shared = self._shared
        if shared.closing:
            return
        shared.closing = True
        for acceptor in self._acceptors:
            acceptor.close()
        if self._unix is not None:
            unlink(*self._unix)
        for member in list(shared.members):
            member.shut()
        try:
            await self._emptied(grace)
        finally:
            for member in list(shared.members):
                member.abort()
            for task in list(shared.tasks):
                task.cancel()
            await self._emptied(1.0)
            self._timer.cancel()

    async def _emptied(self, grace: float) -> None:
        shared, end = self._shared, self._shared.loop.time() + grace
        # Connections leave from several places; only a closing server looks, so it looks again and again.
        while (shared.members or shared.tasks) and shared.loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def serve(
    handler: Handler,
    *,
    unix: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: Limits | None = None,
    gets: Mapping[bytes, Get] = _NONE,
    other: Callable[[], asyncio.Protocol] | None = None,
    tap: Tap | None = None,
    cancel: bool = False,
) -> FrontServer:
    """Start a server in the running loop.

    Args:
        handler: Answers ``POST /ohttp``. It owns the body it is given; what it raises becomes a bare 500.
        unix: Path of a Unix socket (made with mode 0600) to listen on instead of ``host`` and ``port``.
        host: Address to listen on.
        port: TCP port; 0 picks a free one.
        limits: What peers may send.
        gets: Answers by target, for GET and HEAD.
        other: Makes the protocol that a connection is handed over to, with all bytes read so far, at its
            first request for another target. It stays there.
        tap: Sees every byte.
        cancel: Whether a handler is cancelled when its peer is gone. Else it runs to its end, and may look at
            `Body.abandoned`.

    Raises:
        UsageError: the socket can't be listened on.
    """
    loop = asyncio.get_running_loop()
    shared = Shared(
        handler=handler,
        gets=gets,
        other=other,
        limits=limits or Limits(),
        tap=tap,
        loop=loop,
        cancel=cancel,
    )
    listeners: list[socket.socket] = []
    try:
        listeners = [unix_socket(unix)] if unix is not None else tcp_sockets((host,), port)
        return FrontServer(listeners, shared, unix=unix)
    except OSError as error:
        for each in listeners:
            each.close()
        where = str(unix) if unix is not None else f"{host}:{port}"
        raise UsageError(f"can't listen on {where}: {error.strerror}", code="net.listen") from error
