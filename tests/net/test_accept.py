"""Accepting: nobody waits because others are served, nothing spins, and a socket in use is left alone."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import UsageError
from cloister.net import accept
from cloister.net.accept import Acceptor, tcp_sockets
from cloister.net.front import Answer, serve
from support.fronts import whole

from .conftest import Go


@whole
async def hello(head: Any, body: memoryview) -> Answer:
    return Answer(body=b"hello")


class Counted(asyncio.Protocol):
    """Counts connections."""

    made: list[asyncio.BaseTransport]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.made.append(transport)


def counting() -> type[Counted]:
    return type("Each", (Counted,), {"made": []})


class Failing(socket.socket):
    """A listener whose first calls fail."""

    errors: list[int]
    calls = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.calls += 1
        if self.errors:
            raise OSError(self.errors.pop(0), "as told")
        return super().accept()


def test_many_are_let_in_though_each_turn_is_long(go: Go) -> None:
    """uvloop alone takes one in each turn: 512 clients of a busy worker waited for seconds."""

    async def main() -> int:
        protocol = counting()
        (listener,) = tcp_sockets(("127.0.0.1",), 0)
        acceptor = Acceptor(listener, protocol, asyncio.get_running_loop())
        peers = [socket.create_connection(listener.getsockname()) for _ in range(100)]
        for _ in range(8):
            time.sleep(0.002)  # noqa: ASYNC251  (a turn in which others are served)
            await asyncio.sleep(0)
        acceptor.close()
        for each in (*peers, *protocol.made):
            each.close()
        await asyncio.sleep(0.01)
        return len(protocol.made)

    assert go(main()) == 100


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED])
def test_a_failure_to_accept_neither_spins_nor_ends_it(
    go: Go, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept, "_PAUSE", 0.05)

    async def main() -> tuple[int, int]:
        protocol = counting()
        listener = Failing()
        listener.errors = [error]
        listener.bind(("127.0.0.1", 0))
        acceptor = Acceptor(listener, protocol, asyncio.get_running_loop())
        peer = socket.create_connection(listener.getsockname())
        async with asyncio.timeout(5):
            while not protocol.made:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        calls = listener.calls
        acceptor.close()
        for each in (peer, *protocol.made):
            each.close()
        await asyncio.sleep(0.01)
        return len(protocol.made), calls

    made, calls = go(main())
    assert made == 1
    assert calls <= 4, "it failed, and then waited"


def test_closed_while_it_pauses(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept, "_PAUSE", 0.02)

    async def main() -> int:
        listener = Failing()
        listener.errors = [errno.EMFILE]
        listener.bind(("127.0.0.1", 0))
        acceptor = Acceptor(listener, counting(), asyncio.get_running_loop())
        with socket.create_connection(listener.getsockname()):
            await asyncio.sleep(0.005)
            acceptor.close()
            await asyncio.sleep(0.05)
        return listener.calls

    assert go(main()) == 1


def test_a_socket_in_use_is_left_alone(go: Go, tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def main() -> None:
        first = await serve(hello, unix=path)
        with pytest.raises(UsageError) as caught:
            await serve(hello, unix=path)
        assert caught.value.code == "net.listen"
        _, writer = await asyncio.open_unix_connection(path)
        writer.close()
        await first.close(0)
        assert not path.exists()

    go(main())


def test_what_a_dead_process_left_is_replaced_and_another_s_is_not_removed(go: Go, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fsencode(path))

    async def main() -> None:
        front = await serve(hello, unix=path)
        path.unlink()
        other = await serve(hello, unix=path)
        await front.close(0)
        assert path.exists(), "it is the other's"
        await other.close(0)
        assert not path.exists()

    go(main())


def test_tcp_connections_do_not_wait_for_more_to_send(go: Go) -> None:
    async def main() -> int:
        protocol = counting()
        (listener,) = tcp_sockets(("127.0.0.1",), 0)
        acceptor = Acceptor(listener, protocol, asyncio.get_running_loop())
        peer = socket.create_connection(listener.getsockname())
        while not protocol.made:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        option = protocol.made[0].get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        acceptor.close()
        for each in (peer, *protocol.made):
            each.close()
        await asyncio.sleep(0.01)
        return int(option)

    assert go(main()) != 0
