"""Listening sockets: made, and accepted from in batches.

uvloop accepts one connection in each turn of its loop. Where turns are long because others are served, 512
clients that connect at once wait for seconds until the last of them is let in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from cloister.errors import UsageError

MAX_UNIX_PATH: Final = 107  # bytes (sun_path of unix(7), less its terminator)
BACKLOG: Final = 512
_BATCH: Final = 64  # connections accepted in one turn
_PAUSE: Final = 0.1  # seconds without accepting, where the process has no more descriptors
_NO_ADDRESS: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_FULL: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """Accepts connections of a listening socket, which is its own from now on, until `close`."""

    def __init__(
        self,
        listener: socket.socket,
        factory: Callable[[], asyncio.BaseProtocol],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._listener = listener
        self._factory = factory
        self._loop = loop
        self._joining: set[asyncio.Task[Any]] = set()
        self._paused: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._resume()

    def close(self) -> None:
        """Accept nothing more."""
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for task in self._joining:
            task.cancel()

    def _resume(self) -> None:
        self._paused = None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                peer, _ = self._listener.accept()
            except OSError as error:
                if error.errno in _FULL:  # else the loop would find the listener readable again and again
                    self._loop.remove_reader(self._listener.fileno())
                    self._paused = self._loop.call_later(_PAUSE, self._resume)
                if error.errno == errno.ECONNABORTED:
                    continue
                return
            peer.setblocking(False)
            if peer.family != socket.AF_UNIX:  # asyncio does it for sockets of its own alone
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._loop.create_task(self._loop.connect_accepted_socket(self._factory, peer))
            self._joining.add(task)
            task.add_done_callback(partial(self._joined, peer))

    def _joined(self, peer: socket.socket, task: asyncio.Task[Any]) -> None:
        self._joining.discard(task)
        if task.cancelled() or task.exception() is not None:  # closing, or the peer is gone already
            peer.close()


def tcp_sockets(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Sockets bound to one port of each address of these names; port 0 picks one.

    IPv6 addresses that this machine doesn't have are passed over.

    Raises:
        OSError: one of them is taken, or none is there.
    """
    made: list[socket.socket] = []
    try:
        for host in hosts:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, address in found:
                each = _bound(family, (address[0], port, *address[2:]))
                if each is not None:
                    made.append(each)
                    port = int(each.getsockname()[1])
        if not made:
            raise OSError(errno.EADDRNOTAVAIL, "no such address here")
    except OSError:
        for each in made:
            each.close()
        raise
    return made


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket | None:
    """A bound socket; None where the machine hasn't that kind of address."""
    try:
        made = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno in _NO_ADDRESS:
            return None
        raise
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        made.setblocking(False)
    except OSError as error:
        made.close()
        if error.errno in _NO_ADDRESS and family == socket.AF_INET6:
            return None
        raise
    return made


def unix_socket(path: Path) -> socket.socket:
    """A bound socket that only its owner can connect to, from its first moment on.

    What a dead process left at the path is removed.

    Raises:
        UsageError: the path is too long.
        OSError: it can't be bound, or somebody listens there.
    """
    raw = os.fsencode(path)
    if len(raw) > MAX_UNIX_PATH:
        raise UsageError(
            "the path of a Unix socket is too long",
            code="net.unix-path",
            claim="path length",
            expected=f"at most {MAX_UNIX_PATH} B",
            actual=len(raw),
            hint="Choose a shorter run directory.",
        )
    if path.is_socket():
        if _listens(raw):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Linux gives the new inode the mode of the unbound socket: no moment in which others could connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(raw)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def unlink(path: Path, inode: int) -> None:
    """Remove a Unix socket's path, unless it is another's by now."""
    with contextlib.suppress(OSError):
        if path.stat().st_ino == inode:
            path.unlink()


def _listens(raw: bytes) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(raw)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
