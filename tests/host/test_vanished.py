"""Clients that go away: what they asked for leaves the worker's queue, over real sockets all the way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloister.core.ohttp import bhttp, encapsulation
from cloister.core.ohttp.hpke import WIRE_SUITES
from cloister.core.ohttp.kem import generate_private_key
from cloister.core.ohttp.keyconfig import KeyConfiguration
from cloister.core.protocol.statement import ServingOptions
from cloister.enclave.server import EnclaveServer, InnerRequest
from cloister.enclave.worker.jobs import Call
from cloister.enclave.worker.scheduler import Scheduler
from enclave.test_scheduler import FakeModel, until
from host.test_gateway import POOL, Go, House, go, house

__all__ = ["go"]  # a fixture


@dataclass
class Enclave:
    """A worker's server and scheduler with a model that a test holds, behind a real front."""

    scheduler: Scheduler
    model: FakeModel = field(default_factory=FakeModel)
    contents: list[Any] = field(default_factory=list)  # decrypted requests, as the server will wipe them

    def __post_init__(self) -> None:
        self.key = generate_private_key(WIRE_SUITES[0].kem_id)
        self.server = EnclaveServer(self.answer, [(1, self.key)])

    async def answer(self, request: InnerRequest) -> bhttp.Response:
        self.contents.append(request.http.content)
        call = Call(
            name="m",
            model=self.model,
            options=ServingOptions(),
            inputs={"x": np.frombuffer(request.http.content, np.float32).reshape(1, 4)},
        )
        with self.scheduler.enter(b"user", request.body) as place:
            outcome = await self.scheduler.run(place, call)
        return bhttp.Response(status=200, content=outcome.outputs["y"].tobytes())

    def ask(self, mark: float) -> bytes:
        configuration = KeyConfiguration.for_key(1, self.key)
        content = np.full(4, mark, np.float32).tobytes()
        inner = bhttp.Request(method=b"POST", path=b"/x", content=content)
        sealer = encapsulation.begin(configuration, WIRE_SUITES[0])
        body = bytes(sealer.seal(inner.to_bytes(pad=True)))
        fields = f"content-type: message/ohttp-req\r\ncloister-pool: {POOL}\r\n"
        return (
            f"POST /ohttp HTTP/1.1\r\nhost: a\r\n{fields}content-length: {len(body)}\r\n\r\n".encode() + body
        )


@asynccontextmanager
async def scene(path: Path) -> AsyncIterator[tuple[House, Enclave]]:
    async with house(path) as home:
        with Scheduler(threads=1, queue=16) as scheduler:
            enclave = Enclave(scheduler)
            await home.worker("w", enclave.server.handle)
            try:
                yield home, enclave
            finally:
                enclave.model.gate.set()


async def leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@pytest.mark.parametrize("guest", [False, True], ids=["the compact front", "a connection handed over"])
def test_a_client_that_leaves_takes_its_request_out_of_the_worker_s_queue(
    go: Go, tmp_path: Path, guest: bool
) -> None:
    async def main() -> None:
        async with scene(tmp_path) as (home, enclave):
            enclave.model.gate.clear()
            clients = []
            for mark in range(4):
                reader, writer = await asyncio.open_connection("127.0.0.1", home.gateway.port)
                if guest:
                    writer.write(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
                    assert b"200" in await reader.readuntil(b"\r\n\r\n")
                    await reader.readuntil(b"}")
                writer.write(enclave.ask(mark))
                clients.append((reader, writer))
                await until(lambda count=mark + 1: enclave.scheduler.inside == count)  # type: ignore[misc]
            await until(lambda: enclave.model.running == 1)
            await leave(clients[1][1])
            await leave(clients[2][1])
            await until(lambda: enclave.scheduler.inside == 2)
            await until(lambda: not any(bytes(enclave.contents[1]) + bytes(enclave.contents[2])))
            assert [each.in_flight for each in home.gateway.registry.workers(0)] == [2]
            enclave.model.gate.set()
            for mark in (0, 3):
                assert b"200 OK" in await clients[mark][0].readuntil(b"\r\n\r\n")
            assert enclave.model.marks == [0, 3]
            text = bytes((await home.get(b"/metrics")).body).decode()
            assert f'cloister_gateway_requests_total{{outcome="gone",pool="{POOL}"}} 2.0' in text
            for _, writer in (clients[0], clients[3]):
                await leave(writer)

    go(main())


def test_a_client_that_leaves_while_its_request_runs(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as (home, enclave):
            enclave.model.gate.clear()
            _, writer = await asyncio.open_connection("127.0.0.1", home.gateway.port)
            writer.write(enclave.ask(5))
            await until(lambda: enclave.model.running == 1)
            await leave(writer)
            await until(lambda: [each.in_flight for each in home.gateway.registry.workers(0)] == [0])
            assert enclave.scheduler.inside == 1
            enclave.model.gate.set()
            await until(lambda: enclave.scheduler.inside == 0)
            assert enclave.model.marks == [5]
            await until(lambda: not any(bytes(enclave.contents[0])))

    go(main())


def test_a_gateway_that_dies_empties_the_queue(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as (home, enclave):
            enclave.model.gate.clear()
            clients = [await asyncio.open_connection("127.0.0.1", home.gateway.port) for _ in range(3)]
            for mark, (_, writer) in enumerate(clients):
                writer.write(enclave.ask(mark))
                await until(lambda count=mark + 1: enclave.scheduler.inside == count)  # type: ignore[misc]
            await until(lambda: enclave.model.running == 1)
            (link,) = home.gateway._forwarder._links.values()  # type: ignore[union-attr]
            await link.aclose()
            await until(lambda: enclave.scheduler.inside == 1)
            enclave.model.gate.set()
            await until(lambda: enclave.scheduler.inside == 0)
            assert enclave.model.marks == [0]
            for _, writer in clients:
                await leave(writer)

    go(main())
