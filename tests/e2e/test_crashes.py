"""Enclaves that are killed in the middle of requests, and a store that is put back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloister.core.protocol.document import ServiceDocument, SignedDocument
from cloister.errors import CloisterError, Rollback, Unavailable
from e2e.malicious import DOCUMENT, MaliciousHost, Wire, drop, eventually, health, refusal, substitute
from e2e.world import World, world


@dataclass(slots=True)
class Traffic:
    """Threads of users that send without a pause, and what came of each request."""

    world: World
    users: int = 3
    name: str = "digits"
    right: list[float] = field(default_factory=list)  # when each right answer came
    wrong: list[str] = field(default_factory=list)
    errors: list[CloisterError] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        self._threads = [
            threading.Thread(target=self._send, args=(number,), daemon=True) for number in range(self.users)
        ]
        for thread in self._threads:
            thread.start()
        eventually(lambda: len(self.right) >= self.users, "traffic flows")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def since(self, moment: float) -> int:
        """Right answers after a moment (monotonic)."""
        return sum(1 for at in list(self.right) if at > moment)

    def _send(self, number: int) -> None:
        seed = number * 1_000_000
        with self.world.client() as client:
            while not self._stop.is_set():
                seed += 1
                inputs = self.world.sample(self.name, seed)
                try:
                    outputs = client.infer(self.world.model(self.name), inputs)
                except CloisterError as error:
                    self.errors.append(error)
                    continue
                if self.world.right(self.name, inputs, outputs):
                    self.right.append(time.monotonic())
                else:
                    self.wrong.append(f"user {number}, request {seed}")


@pytest.fixture(scope="module")
def fragile(shared_root: Path) -> Iterator[World]:
    """A service that the tests of this module damage, each leaving it whole.

    Its leases are long, so that nothing here works only because a renewal comes soon.
    """
    with world(shared_root / "f", models=("digits", "diagnosis"), lease_seconds=30) as made:
        yield made


def test_killing_a_worker_enclave_gives_no_wrong_answer_and_it_comes_back(fragile: World) -> None:
    with Traffic(fragile) as traffic:
        killed = fragile.kill_enclave("worker-1")
        at = time.monotonic()
        eventually(lambda: traffic.since(at) > 20, "the other worker answers")
        eventually(lambda: _new_enclave(fragile, "worker-1", killed), "the enclave comes back")
    assert traffic.wrong == []
    assert [error for error in traffic.errors if not error.retryable] == []
    assert _serves_alone(fragile, "worker-1")


def test_killing_the_only_worker_gives_retryable_errors_and_it_comes_back(fragile: World) -> None:
    for number in (1, 2):
        fragile.kill_enclave(f"worker-{number}")
    with fragile.client() as client:
        client.verify()
        error: CloisterError | None = None
        until = time.monotonic() + 40
        while time.monotonic() < until:
            try:
                assert fragile.serves(client)
                break
            except Unavailable as found:  # and nothing else
                error = found
        else:
            raise AssertionError(f"no worker came back: {error}")
        assert error is None or error.retryable
    eventually(lambda: _both_up(fragile), "both workers are back")


def test_killing_the_key_service_loses_nothing_and_workers_serve_meanwhile(fragile: World) -> None:
    before = fragile.verified()
    with Traffic(fragile) as traffic, fragile.client() as client:
        client.verify()
        killed_at = time.monotonic()
        killed = fragile.kill_enclave("key-service")
        eventually(lambda: traffic.since(killed_at) > 20, "workers serve on their leases")
        assert _down_or_new(fragile, killed)
        after = eventually(lambda: _newer_epoch(fragile, before.document.epoch), "a new epoch")
        eventually(lambda: _new_enclave(fragile, "key-service", killed), "the enclave is back")
        back_at = time.monotonic()
        eventually(lambda: traffic.since(back_at) > 50, "traffic flows on")
        # A client that verified before the crash keeps working, and one that looks anew sees the new epoch.
        assert fragile.serves(client)
        client.verify()
        assert client.record.epoch == after.epoch > before.document.epoch
        assert fragile.serves(client)
        with fragile.client() as newcomer:  # whose keys the workers have never heard of
            started = time.monotonic()
            assert fragile.serves(newcomer)
            assert time.monotonic() - started < 5  # not only with the next renewal, after 10 s
    assert traffic.wrong == []
    assert [str(error) for error in traffic.errors] == []  # not one request failed
    assert {entry.pool.id for entry in after.pools} == {entry.pool.id for entry in before.document.pools}
    assert after.pool(fragile.pool).models == before.document.pool(fragile.pool).models
    assert after.head.size > before.document.head.size
    with fragile.publisher() as publisher:  # the owner's chain goes on where it was
        publisher.grant("digits", os.urandom(32), 2_000_000_000)


def test_a_long_lived_client_notices_the_new_document_by_itself(fragile: World, host: MaliciousHost) -> None:
    """The keys it knows die with their epoch; it fetches anew without being told."""
    wire = Wire()
    with fragile.client(host.front(fragile.url, wire)) as client:
        assert fragile.serves(client)
        epoch, fetched = client.record.epoch, len(wire.exchanges(DOCUMENT))
        fragile.kill_enclave("key-service")
        eventually(lambda: _newer_epoch(fragile, epoch), "a new epoch")
        for number in (1, 2):  # new workers hold the new epoch's keys only
            fragile.kill_enclave(f"worker-{number}")
        eventually(lambda: _both_up(fragile), "both workers are back")
        assert fragile.serves(client)
        assert client.record.epoch > epoch
        assert len(wire.exchanges(DOCUMENT)) > fetched


def test_a_document_of_the_epoch_before_a_restart_is_refused(fragile: World, host: MaliciousHost) -> None:
    wire = Wire()
    older = fragile.raw_document()
    epoch = fragile.verified().document.epoch
    fragile.kill_enclave("key-service")
    eventually(lambda: _newer_epoch(fragile, epoch), "a new epoch")
    with fragile.client(host.front(fragile.url, wire)) as client:
        client.verify()
        wire.on(DOCUMENT, "answer", substitute(older), times=99)
        error = refusal(client.verify)
        assert error.code in ("rollback.document", "transport.key")
    with fragile.client(host.front(fragile.url, wire)) as newcomer:
        assert refusal(newcomer.verify).code == "transport.key"  # nobody has that epoch's keys any more
        wire.behave()
        assert fragile.serves(newcomer)


def test_killing_a_workers_launcher_leaves_no_enclave_behind(fragile: World) -> None:
    enclave = fragile.enclave("worker-2")
    fragile.service.processes["worker-2"].kill()
    fragile.service.processes["worker-2"].wait()
    eventually(lambda: not _alive(enclave), "the enclave ends with its launcher")
    assert fragile.service.revive() == ["worker-2"]
    eventually(lambda: _both_up(fragile), "both workers are back")


def test_killing_the_gateway_is_survived(fragile: World) -> None:
    port = fragile.url.rpartition(":")[2]
    fragile.service.processes["gateway"].kill()
    fragile.service.processes["gateway"].wait()
    with fragile.client() as client:
        assert isinstance(refusal(client.verify), Unavailable)
        command = fragile.service._commands["gateway"]
        command[command.index("--port") + 1] = port
        fragile.service.revive()
        eventually(lambda: _tries(lambda: fragile.serves(client)), "the gateway has everything again")


def test_an_older_store_is_refused_by_owner_client_and_worker(
    fragile: World, folder: Callable[[str], Path], host: MaliciousHost
) -> None:
    """Last in this module: the service is worth nothing afterwards.

    Each of the three meets a freshly started key service on the old store, so that each finds out by itself.
    """
    base = folder("rollback")
    memory = base / "memory"
    fragile.halt_key_service()
    fragile.copy_store(base / "old")
    fragile.resume_key_service()
    with fragile.publisher() as publisher:
        publisher.revoke("digits", fragile.user.user_id(fragile.desk.owner))  # what the operator wants undone
    with fragile.client(memory=memory) as client:
        client.verify()
    held = host.worker(fragile.site, "held", registered=False)
    held.start()
    frozen = [fragile.enclave(f"worker-{number}") for number in (1, 2)]

    with ExitStack() as thaw:
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
            thaw.callback(os.kill, pid, signal.SIGKILL)
        held.wire.on(DOCUMENT, "request", drop, times=10**6)

        with _put_back(fragile, base), fragile.client(memory=memory) as client:
            error = refusal(client.verify)
            assert (type(error), error.code) == (Rollback, "rollback.store")
        with _put_back(fragile, base), fragile.publisher() as publisher:
            error = refusal(publisher.verify)
            assert (type(error), error.code) == (Rollback, "rollback.store")
            # From then on it serves nobody, whoever asks.
            with fragile.client() as newcomer:
                assert refusal(newcomer.verify).code == "rollback.store"
        with _put_back(fragile, base):
            said = len(held.said())
            held.wire.behave()
            held.refuses("rollback.store", after=said)
            assert held.health()["problem"] == "rollback.store"


class _put_back:
    """A key service that was started on the old store."""

    def __init__(self, world: World, base: Path) -> None:
        self._world = world
        self._base = base

    def __enter__(self) -> None:
        self._world.halt_key_service()
        self._world.put_back(self._base / "old")
        self._world.resume_key_service()

    def __exit__(self, *_: object) -> None:
        return None


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _tries(call: Callable[[], bool]) -> bool:
    try:
        return call()
    except CloisterError:
        return False


def _new_enclave(world: World, name: str, old: int) -> bool:
    from e2e.world import enclaves_below

    found = enclaves_below(world.service.processes[name].pid)
    return bool(found) and found[0] != old


def _down_or_new(world: World, killed: int) -> bool:
    return not _alive(killed)


def _newer_epoch(world: World, epoch: int) -> ServiceDocument | None:
    document = ServiceDocument.from_bytes(SignedDocument.from_bytes(world.raw_document()).text)
    return document if document.epoch > epoch else None


def _both_up(world: World) -> bool:
    return all(_healthy(world, f"worker-{number}") for number in (1, 2))


def _healthy(world: World, name: str) -> bool:
    found = health(world.site.run_dir(name) / "enclave.sock")
    return bool(found and found["ready"])


def _serves_alone(world: World, name: str) -> bool:
    """Whether one worker answers rightly by itself: requests go straight to its socket."""
    import httpx

    class Direct(httpx.BaseTransport):
        def __init__(self) -> None:
            self.gateway = httpx.HTTPTransport()
            self.worker = httpx.HTTPTransport(uds=str(world.site.run_dir(name) / "enclave.sock"))

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            to_pool = request.headers.get("cloister-pool") == world.pool.hex()
            return (self.worker if to_pool else self.gateway).handle_request(request)

        def close(self) -> None:
            self.gateway.close()
            self.worker.close()

    def once() -> bool:
        with world.client(transport=Direct()) as client:
            return world.serves(client)

    eventually(lambda: _healthy(world, name), f"{name} joins")
    return eventually(lambda: _tries(once), f"{name} serves")
