"""The malicious host: everything between a user, an owner or a worker and the gateway, told to misbehave.

A `Wire` decides what happens to each message of one party. `MaliciousHost` owns a thread in which its
proxies and workers live: `front` opens an HTTP proxy to a gateway for users and owners, `worker` launches a
real worker enclave whose host link leads through a wire. Tests tell a wire what to do and then look at what
came of it, from their own thread, without asyncio.

A host sees routes, pools and ciphertext. So does a wire: a route is ``document``, ``key-service``, a pool id
in hex, or ``other``; which message of an encapsulated conversation it holds, it knows by its order only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import httpx

from cloister.cli.site import Site, reference_policy
from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.core.protocol.pool import Pool
from cloister.errors import CloisterError
from cloister.host.launcher.launcher import Launcher, Timing
from cloister.host.launcher.link import link_app
from cloister.host.store.app import store_routes
from cloister.host.store.blobs import BlobStore
from cloister.host.store.sqlite import SqliteRecords
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.measurement import measure
from cloister.sim.platform import SimulatedPlatform
from cloister.sim.sandbox import Sandbox

T = TypeVar("T")
Direction = Literal["request", "answer"]
DOCUMENT: Final = "document"
KEY_SERVICE: Final = "key-service"
OTHER: Final = "other"
OHTTP: Final = "message/ohttp-req"
WELL_KNOWN: Final = "/.well-known/cloister"
PATIENCE: Final = 40.0  # seconds for anything that a test waits for


class Dropped(Exception):
    """The message is lost: whoever waits for an answer gets a closed connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One outer message. A request has status 0; one with a status is answered without being sent on."""

    body: bytes
    fields: Mapping[str, str] = field(default_factory=dict)
    status: int = 0

    @property
    def code(self) -> str:
        """The code in an outer problem document, or nothing."""
        with contextlib.suppress(ValueError):
            problem = json.loads(self.body)
            return str(problem.get("code") or problem.get("error") or "") if isinstance(problem, dict) else ""
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What passed: the request as it was made and as it went on, the answer as it came and as it returned."""

    route: str
    request: Message
    sent: Message
    answer: Message
    returned: Message


Deed = Callable[[Message], "Message | Awaitable[Message]"]
Onward = Callable[[Message], Awaitable[Message]]


@dataclass(slots=True)
class _Order:
    route: str
    direction: Direction
    deed: Deed
    skip: int
    times: int
    after: str | None  # waits for a request on this route first


class Wire:
    """What the host does with the messages of one party. `on` may be called from any thread."""

    def __init__(self) -> None:
        self.log: list[Exchange] = []
        self.touched = False  # whether anything was asked of this wire
        self.broken: list[Exception] = []  # deeds that failed: mistakes of a test, not of the service
        self._orders: list[_Order] = []
        self._lock = threading.Lock()

    def on(
        self,
        route: str,
        direction: Direction,
        deed: Deed,
        *,
        skip: int = 0,
        times: int = 1,
        after: str | None = None,
    ) -> None:
        """Do ``deed`` to ``times`` messages of a route and direction, after ``skip`` that pass untouched.

        With ``after``, all of that begins with the next request on that other route.
        """
        with self._lock:
            self.touched = True
            self._orders.append(_Order(route, direction, deed, skip, times, after))

    def behave(self) -> None:
        """Pass everything from now on."""
        with self._lock:
            self._orders.clear()

    def exchanges(self, route: str) -> list[Exchange]:
        """What passed on one route so far, oldest first."""
        return [each for each in list(self.log) if each.route == route]

    @property
    def done(self) -> bool:
        """Whether every order was carried out."""
        with self._lock:
            return not self._orders

    async def carry(self, route: str, request: Message, onward: Onward) -> Message:
        """Take one request, and bring back an answer, or raise `Dropped`."""
        sent = await self._apply(route, "request", request)
        answer = sent if sent.status else await onward(sent)
        returned = await self._apply(route, "answer", answer)
        self.log.append(Exchange(route=route, request=request, sent=sent, answer=answer, returned=returned))
        return returned

    async def _apply(self, route: str, direction: Direction, message: Message) -> Message:
        for deed in self._due(route, direction):
            try:
                result = deed(message)
                message = result if isinstance(result, Message) else await result
            except Dropped:
                raise
            except Exception as error:
                self.broken.append(error)
                raise Dropped from error
        return message

    def _due(self, route: str, direction: Direction) -> list[Deed]:
        due = []
        with self._lock:
            for order in list(self._orders):
                if order.after is not None:
                    if (order.after, "request") == (route, direction):
                        order.after = None
                    continue
                if (order.route, order.direction) != (route, direction):
                    continue
                if order.skip:
                    order.skip -= 1
                    continue
                due.append(order.deed)
                order.times -= 1
                if not order.times:
                    self._orders.remove(order)
        return due


def flip(at: int) -> Deed:
    """Flip one bit of the byte at ``at`` (negative: from the end)."""

    def deed(message: Message) -> Message:
        body = bytearray(message.body)
        body[at] ^= 0x10
        return replace(message, body=bytes(body))

    return deed


def truncate(by: int) -> Deed:
    """Cut ``by`` bytes off the end."""
    return lambda message: replace(message, body=message.body[:-by])


def extend(by: bytes = b"\0") -> Deed:
    """Append bytes."""
    return lambda message: replace(message, body=message.body + by)


def substitute(body: bytes) -> Deed:
    """Put another body in its place: an earlier one, or one from elsewhere."""
    return lambda message: replace(message, body=body)


def answer(status: int, body: bytes = b"", content_type: str = "application/problem+json") -> Deed:
    """Answer so, whatever was asked or answered."""
    return lambda message: Message(status=status, body=body, fields={"content-type": content_type})


def redirect(pool: str) -> Deed:
    """Send it to another pool than its sender named."""
    return lambda message: replace(message, fields={**message.fields, "cloister-pool": pool})


def drop(message: Message) -> Message:
    """Lose it."""
    raise Dropped


def delay(seconds: float) -> Deed:
    """Hold it back for a while."""

    async def deed(message: Message) -> Message:
        await asyncio.sleep(seconds)
        return message

    return deed


class Swap:
    """A deed for two messages: each leaves with the other's body. Give it to both wires, or twice to one."""

    def __init__(self) -> None:
        self._first: tuple[bytes, asyncio.Future[bytes]] | None = None

    async def __call__(self, message: Message) -> Message:
        """Wait for the other message, then take its body."""
        if self._first is None:
            other: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            self._first = (message.body, other)
            async with asyncio.timeout(PATIENCE):
                return replace(message, body=await other)
        body, other = self._first
        self._first = None
        other.set_result(message.body)
        return replace(message, body=body)


class MaliciousHost:
    """Owner of the thread in which everything of this module runs. A context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="malicious-host", daemon=True)
        self._closing: list[Callable[[], Coroutine[Any, Any, None]]] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the host's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin a coroutine in the host's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def front(self, gateway: str, wire: Wire) -> str:
        """Open a proxy to a gateway; gives its URL."""
        proxy = _Proxy(gateway, wire)
        self.run(proxy.start())
        self._closing.append(proxy.stop)
        return proxy.url

    def worker(self, site: Site, name: str, **options: Any) -> MaliciousWorker:
        """A worker of this host; see `MaliciousWorker`."""
        worker = MaliciousWorker(self, site, name, **options)
        self._closing.append(worker.aclose)
        return worker

    def __enter__(self) -> MaliciousHost:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for close in reversed(self._closing):
                self.run(close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class MaliciousWorker:
    """A real worker enclave in the hands of a malicious host.

    Args:
        host: Whose thread runs its launcher.
        site: Data directory of the service.
        name: Of its run folder.
        pool: Name of the pool that it is told to join.
        configuration: What the host starts it with, instead of the honest configuration.
        registered: Whether the gateway may send it requests.
    """

    def __init__(
        self,
        host: MaliciousHost,
        site: Site,
        name: str,
        *,
        pool: str = "default",
        configuration: EnclaveConfiguration | None = None,
        registered: bool = True,
        settings: dict[str, int] | None = None,
    ) -> None:
        self.wire: Final = Wire()
        self.name: Final = name
        self._host = host
        self._starting: Future[None] | None = None
        self._gateway = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(site.enclaves)), base_url="http://gateway", timeout=30
        )
        self._admin = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(site.admin)), base_url="http://gateway"
        )
        authority = SimulatedAuthority.open_or_create(site.authority, now=int(time.time()))
        definition = site.read_pool(pool)
        configuration = configuration or honest_configuration(site, definition, settings)
        self._pool = definition.id.hex()
        self._launcher = Launcher(
            SimulatedPlatform(authority, Sandbox.detect()),
            "worker",
            site.run_dir(name),
            link_app(
                store_routes(BlobStore(site.blobs, 1 << 30), SqliteRecords.open(site.records)),
                forward=self._forward,
                fetch_document=self._fetch,
            ),
            self._register if registered else _nowhere,
            configuration=configuration.to_bytes(),
            memory_limit=2 << 30,
            timing=Timing(ready=PATIENCE),
        )

    def start(self) -> None:
        """Launch it and wait until it has joined; raises Unavailable with its last log lines."""
        self._host.run(self._launcher.start())

    def launch(self) -> None:
        """Launch it, and don't wait."""
        self._starting = self._host.begin(self._launcher.start())

    @property
    def socket(self) -> Path:
        """Where the enclave listens."""
        return self._launcher.socket

    def said(self) -> list[str]:
        """Lines that the enclave has printed so far."""
        log = self._launcher.log
        return log.read_text(errors="replace").splitlines() if log.exists() else []

    def refuses(self, code: str, *, after: int) -> str:
        """Wait for the enclave to say that it refused something with ``code``; gives that line.

        Args:
            code: Code of the error.
            after: How many lines it had `said` before.
        """
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            lines = self.said()[after:]
            found = [line for line in lines if f" {code}: " in line]
            if found:
                return found[0]
            time.sleep(0.02)
        raise AssertionError(f"no {code}, but: {self.said()[after:]}")

    def renews(self) -> None:
        """Wait for one whole exchange with the key service that succeeds, begun from now on."""
        seen = len(self.wire.exchanges(DOCUMENT))
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            tail = [each for each in list(self.wire.log) if each.route in (DOCUMENT, KEY_SERVICE)]
            documents = [index for index, each in enumerate(tail) if each.route == DOCUMENT]
            for index in documents[seen:]:
                after = tail[index + 1 : index + 3]
                if len(after) == 2 and all(each.route == KEY_SERVICE for each in after) and self.healthy():
                    return
            time.sleep(0.02)
        raise AssertionError(f"the worker did not renew its lease: {self.said()[-5:]}")

    def health(self) -> dict[str, Any]:
        """What the enclave tells its host: ``ready``, and the code of the ``problem`` that it has."""
        return health(self.socket) or {"ready": False}

    def healthy(self) -> bool:
        """Whether it can serve, and nothing keeps it from renewing."""
        health = self.health()
        return bool(health["ready"]) and not health["problem"]

    async def aclose(self) -> None:
        """End it and close its connections."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.sleep(0)  # the launcher tidies up what it had begun
        await self._launcher.stop()
        await self._gateway.aclose()
        await self._admin.aclose()

    async def _forward(self, fields: Mapping[str, str], body: bytes) -> tuple[int, str, bytes]:
        async def onward(message: Message) -> Message:
            return _message(
                await self._gateway.post("/ohttp", content=message.body, headers=dict(message.fields))
            )

        request = Message(body=body, fields=fields)
        return _reply(await self.wire.carry(fields["cloister-pool"], request, onward))

    async def _fetch(self) -> tuple[int, str, bytes]:
        async def onward(message: Message) -> Message:
            return _message(await self._gateway.get(WELL_KNOWN))

        return _reply(await self.wire.carry(DOCUMENT, Message(body=b""), onward))

    async def _register(self, path: Path) -> None:
        registration = {"pool": self._pool, "socket": str(path)}
        (await self._admin.put(f"/workers/{self.name}", json=registration)).raise_for_status()


class _Proxy:
    """An HTTP/1.1 server that hands every request to a wire, and what is left of it to a gateway."""

    def __init__(self, gateway: str, wire: Wire) -> None:
        self.url = ""
        self._gateway = httpx.AsyncClient(base_url=gateway, timeout=30, trust_env=False)
        self._wire = wire
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 16)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._gateway.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            async for method, target, message in _requests(reader):
                returned = await self._wire.carry(
                    _route(method, target, message), message, self._onward(method, target)
                )
                writer.write(_response(method, returned))
                await writer.drain()
        except (Dropped, httpx.HTTPError, ConnectionError, TimeoutError):
            writer.transport.abort()
        except asyncio.CancelledError:
            writer.transport.abort()  # the host stops; there is nobody to tell
        finally:
            self._connections.discard(task)
            writer.close()

    def _onward(self, method: str, target: str) -> Onward:
        async def onward(message: Message) -> Message:
            fields = dict(message.fields)
            return _message(await self._gateway.request(method, target, content=message.body, headers=fields))

        return onward


def honest_configuration(
    site: Site, pool: Pool, settings: dict[str, int] | None = None
) -> EnclaveConfiguration:
    """The configuration that ``cloister worker`` would start a worker of this pool with."""
    root = SimulatedAuthority.open_or_create(site.authority, now=int(time.time())).roots_der
    return EnclaveConfiguration(
        role="worker",
        anchor_roots=root,
        service=site.service(),
        pool=pool,
        key_service=reference_policy(measure("key-service"), root),
        settings={"threads": 1, "memory_mib": 256, **(settings or {})},
    )


def health(path: Path) -> dict[str, Any] | None:
    """What the enclave that listens at ``path`` tells its host; None where none does.

    Without httpx, which forgets to close a Unix socket that nobody listens on.
    """
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(5)
        try:
            link.connect(str(path))
            link.sendall(b"GET /healthz HTTP/1.1\r\nHost: enclave\r\nConnection: close\r\n\r\n")
            with link.makefile("rb") as answer:
                raw = answer.read()
        except OSError:
            return None
    try:
        return dict(json.loads(raw.partition(b"\r\n\r\n")[2]))
    except ValueError:
        return None


def refusal(call: Callable[[], object]) -> CloisterError:
    """The error that a call raises; fails where it raises none, or another kind."""
    try:
        call()
    except CloisterError as error:
        return error
    raise AssertionError("nothing was refused")


def eventually(condition: Callable[[], T], what: str, *, seconds: float = PATIENCE) -> T:
    """Wait until a condition holds; gives its value."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"it never happened: {what}")


async def _requests(reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, str, Message]]:
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        line, *lines = head.decode("latin-1").rstrip().split("\r\n")
        method, target, _ = line.split(" ")
        fields = {name.lower(): value for name, _, value in (each.partition(": ") for each in lines)}
        body = await reader.readexactly(int(fields.get("content-length", "0")))
        kept = {
            name: value
            for name, value in fields.items()
            if name == "content-type" or name.startswith("cloister-")
        }
        yield method, target, Message(body=body, fields=kept)


def _route(method: str, target: str, message: Message) -> str:
    if (method, target) == ("POST", "/ohttp"):
        return message.fields.get("cloister-pool", OTHER)
    return DOCUMENT if target == WELL_KNOWN else OTHER


def _message(response: httpx.Response) -> Message:
    fields = {"content-type": response.headers.get("content-type", "")}
    return Message(status=response.status_code, body=response.content, fields=fields)


def _response(method: str, message: Message) -> bytes:
    head = (
        f"HTTP/1.1 {message.status} X\r\ncontent-type: {message.fields.get('content-type', '')}\r\n"
        f"content-length: {len(message.body)}\r\n\r\n"
    )
    return head.encode("latin-1") + (b"" if method == "HEAD" or message.status == 204 else message.body)


def _reply(message: Message) -> tuple[int, str, bytes]:
    return message.status, message.fields.get("content-type", ""), message.body


async def _nowhere(path: Path) -> None:
    return None
