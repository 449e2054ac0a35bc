"""Where the proxy listens: loopback or a Unix socket, served by uvicorn's protocol without its server."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path
from typing import Any, Final

from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from cloister.asgi import configuration
from cloister.errors import UsageError
from cloister.net.accept import Acceptor, tcp_sockets, unix_socket, unlink

LOOPBACK: Final = ("127.0.0.1", "::1")
MAX_HEAD: Final = 64 << 10  # bytes of a request's target and fields
_KEEP_ALIVE: Final = 75  # seconds
_NO_ADDRESS: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_POLL: Final = 0.005  # seconds


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol with a bound on heads; it has none of its own with httptools."""

    def on_message_begin(self) -> None:
        """Start to count."""
        self._head = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count the target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a field."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > MAX_HEAD:
            raise ValueError  # httptools stops there, and uvicorn answers 400


class Listener:
    """Open listening sockets of one REST app. `close` ends everything that came through them."""

    def __init__(self, app: ASGIApp) -> None:
        config = configuration(app, timeout_keep_alive=_KEEP_ALIVE)
        config.load()
        self._config = config
        self._state = ServerState()
        self._acceptors: list[Acceptor] = []
        self._unix: tuple[Path, int] | None = None  # and its inode

    def _protocol(self) -> asyncio.Protocol:
        return Protocol(config=self._config, server_state=self._state, app_state={})

    async def tcp(self, sockets: list[socket.socket]) -> None:
        """Serve bound sockets, which are this object's from now on."""
        for each in sockets:
            self._acceptors.append(Acceptor(each, self._protocol, asyncio.get_running_loop()))

    async def unix(self, path: Path) -> None:
        """Serve a Unix socket that only this user may connect to; raises UsageError."""
        try:
            listening = unix_socket(path)
        except OSError as error:
            raise _refused(str(path), error.strerror) from error
        self._unix = (path, path.stat().st_ino)  # noqa: ASYNC240
        self._acceptors.append(Acceptor(listening, self._protocol, asyncio.get_running_loop()))

    async def close(self, grace: float) -> None:
        """Accept nothing more, let requests finish for ``grace`` seconds, then drop the rest."""
        for acceptor in self._acceptors:
            acceptor.close()
        if self._unix is not None:
            unlink(*self._unix)
        connections: set[Any] = self._state.connections
        for each in list(connections):
            each.shutdown()
        await self._emptied(grace)
        for each in list(connections):
            each.transport.abort()
        for task in list(self._state.tasks):
            task.cancel()
        await self._emptied(1.0)

    async def _emptied(self, grace: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        # Connections end in several places; only a closing server looks, so it looks again and again.
        while (self._state.connections or self._state.tasks) and loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(_POLL)


def bind(hosts: tuple[str, ...], port: int) -> tuple[list[socket.socket], int]:
    """Sockets bound to one port of each address that this machine has, and the port; 0 picks one.

    Raises:
        UsageError: ``net.listen``, where one of them is taken. On a port that another program has on ``::1``,
            that program would get what is sent to ``localhost``.
    """
    try:
        sockets = tcp_sockets(hosts, port)
    except OSError as error:
        raise _refused(f"{hosts[0]}:{port}", error.strerror) from error
    return sockets, int(sockets[0].getsockname()[1])


def _refused(where: str, reason: str | None) -> UsageError:
    return UsageError(
        f"can't listen on {where}",
        code="net.listen",
        claim="address",
        expected="one of this machine that nothing listens on",
        actual=reason or "an error",
        hint="Stop what listens there, or name another; port 0 picks a free one",
    )


def bind_rpc(server: Any, hosts: tuple[str, ...], port: int) -> int:
    """Have a gRPC server listen on one port of each address that this machine has; gives the port.

    Raises:
        UsageError: ``net.listen``.
    """
    sockets, port = bind(hosts, port)  # finds the port, and which addresses there are
    addresses = [each.getsockname()[0] for each in sockets]
    for each in sockets:
        each.close()
    for address in addresses:
        shown = f"[{address}]" if ":" in address else address
        try:
            server.add_insecure_port(f"{shown}:{port}")
        except RuntimeError as error:
            raise _refused(f"{shown}:{port}", "the address can't be bound") from error
    return port
