"""``cloister gateway | keyservice | worker``: a host's launchers and front door."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cloister.cli.pool import Tee, require_same_service
from cloister.cli.site import Site, reference_policy
from cloister.core.identity import thumbprint
from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.core.protocol.document import SignedDocument
from cloister.core.protocol.pool import Pool, require_name
from cloister.errors import CloisterError, Unavailable, UsageError
from cloister.net.link import Peer, Upstream
from cloister.net.loop import run
from cloister.net.messages import Limits

_PR_SET_PDEATHSIG: Final = 1
PORT: Final = 8440
_LEFTOVER: Final = 15.0  # seconds that a role of an earlier `cloister up` may take to end
_POLL: Final = 0.2  # seconds
_FORWARD_TIMEOUT: Final = 30.0  # seconds
BASE_MEMORY: Final = 1 << 30  # bytes that an enclave needs beside its models
MAX_BLOBS: Final = 256 << 30  # bytes

Data = Annotated[Path, typer.Option("--data", help="Data directory of the service.")]
Follow = Annotated[
    int, typer.Option("--follow-parent", min=0, hidden=True, help="End when this parent process does.")
]


def gateway(
    data: Data = Path("var"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 picks one.")] = PORT,
    capture: Annotated[Path | None, typer.Option(help="Append every byte seen to this file.")] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Largest encapsulated request, in bytes.")] = 64 << 20,
    follow: Follow = 0,
) -> None:
    """Run the gateway: the HTTP front door, which sees ciphertext only."""
    from cloister.host.gateway.server import Gateway
    from cloister.host.store.blobs import BlobStore

    site = Site(data.absolute())
    if not site.root.exists():  # a refusal leaves no new folder behind
        require_free(host, port)
    _prepare(site, "gateway", follow=follow)
    require_free(host, port)

    async def main() -> None:
        server = Gateway(
            host=host,
            port=port,
            admin=site.admin,
            enclaves=site.enclaves,
            blobs=BlobStore(site.blobs, MAX_BLOBS),
            capture=capture,
            limits=Limits(max_body=max_body),
        )
        async with server:
            url = f"http://{f'[{host}]' if ':' in host else host}:{server.port}"
            site.write_facts(url=url)
            logging.info("gateway ready at %s", url)
            await _until_told()

    run(main())


def keyservice(
    data: Data = Path("var"),
    settings: Annotated[str, typer.Option(help="JSON object of enclave settings.")] = "{}",
    source: Annotated[Path | None, typer.Option(hidden=True)] = None,
    follow: Follow = 0,
) -> None:
    """Run a key service enclave on this host (simulated TEE)."""
    numbers = _settings(settings)
    site = Site(data.absolute())
    _prepare(site, "key-service", follow=follow)
    configuration = EnclaveConfiguration(role="key-service", anchor_roots=site.roots(), settings=numbers)
    _run_enclave(site, "key-service", None, configuration, source)


def worker(
    data: Data = Path("var"),
    name: Annotated[str, typer.Option(help="Name of this worker on its host.")] = "worker-1",
    pool: Annotated[str, typer.Option(help="Name of the pool that it joins.")] = "default",
    settings: Annotated[str, typer.Option(help="JSON object of enclave settings.")] = "{}",
    tee: Annotated[Tee, typer.Option(help="TEE to simulate.")] = "sgx",
    source: Annotated[Path | None, typer.Option(hidden=True)] = None,
    follow: Follow = 0,
) -> None:
    """Run a worker enclave on this host (simulated TEE)."""
    from cloister.sim.measurement import measure

    require_name(name, "worker name")
    numbers = _settings(settings)
    site = Site(data.absolute())
    service, definition = site.service(), site.read_pool(pool)  # before anything is made there
    _prepare(site, name, follow=follow)
    root = site.roots()
    configuration = EnclaveConfiguration(
        role="worker",
        anchor_roots=root,
        service=service,
        pool=definition,
        key_service=reference_policy(measure("key-service"), root),
        settings=numbers,
    )
    _run_enclave(site, name, definition, configuration, source, tee)


def _run_enclave(
    site: Site,
    name: str,
    pool: Pool | None,
    configuration: EnclaveConfiguration,
    source: Path | None,
    tee: str = "sgx",
) -> None:
    from cloister.host.launcher.launcher import Launcher
    from cloister.host.launcher.link import link_app
    from cloister.host.store.app import blob_routes, store_routes
    from cloister.host.store.blobs import BlobStore
    from cloister.host.store.sqlite import SqliteRecords
    from cloister.sim.authority import SimulatedAuthority
    from cloister.sim.platform import SimulatedPlatform
    from cloister.sim.sandbox import Sandbox

    role = configuration.role
    authority = SimulatedAuthority.open_or_create(site.authority, now=int(time.time()))
    platform = SimulatedPlatform(authority, Sandbox.detect(), tee=tee)
    logging.info("%s", platform.announcement)
    for line in platform.sandbox.report():
        logging.info("sandbox: %s", line)

    async def main() -> None:
        admin = Upstream(Peer(unix=site.admin))
        gateway = Upstream(Peer(unix=site.enclaves), limits=Limits(max_body=64 << 20))
        blobs, records = BlobStore(site.blobs, MAX_BLOBS), None
        routes = blob_routes(blobs)
        if role == "key-service":  # a worker has no business with the key service's records
            records = SqliteRecords.open(site.records)
            routes = store_routes(blobs, records)
        launcher = Launcher(
            platform,
            role,
            site.run_dir(name),
            link_app(routes, forward=_forward(gateway), fetch_document=_fetch(gateway)),
            _registration(admin, name, pool, lambda: launcher.start_seconds),
            configuration=configuration.to_bytes(),
            memory_limit=(configuration.settings["memory_mib"] << 20) + BASE_MEMORY,
            source=source,
        )
        async with AsyncExitStack() as stack:
            if records is not None:
                stack.callback(records.close)
            await stack.enter_async_context(aclosing(admin))
            await stack.enter_async_context(aclosing(gateway))
            stack.push_async_callback(launcher.stop)
            await launcher.start()
            if role == "key-service":
                announcing = asyncio.create_task(_announce(site, _fetch(gateway)))
                stack.callback(announcing.cancel)
            await _until_told()

    run(main())


def _registration(
    admin: Upstream, name: str, pool: Pool | None, start_seconds: Callable[[], float]
) -> Callable[[Path], Awaitable[None]]:
    """Registers an enclave at the gateway, and says so once. A key service has no pool.

    Along with a worker goes what it tells of its stages, and how long its start took.
    """
    from cloister.core.protocol.stages import Histogram
    from cloister.host.launcher.serving import figures

    pool_id = "key-service" if pool is None else pool.id.hex()
    said = False

    async def register(enclave: Path) -> None:
        nonlocal said
        registration: dict[str, Any] = {"pool": pool_id, "socket": str(enclave)}
        if pool is not None and (told := await figures(enclave)) is not None:
            start = Histogram()
            start.observe(start_seconds())
            registration["stages"] = replace(told, stages={**told.stages, "start": start}).to_data()
        body = json.dumps(registration).encode()
        fields = ((b"content-type", b"application/json"),)
        answer = await admin.request(b"PUT", f"/workers/{name}".encode(), fields, body, timeout=5.0)
        if answer.status >= 300:
            raise Unavailable(
                "the gateway did not register the enclave",
                code="roles.register",
                claim=f"registration of {name}",
                expected="status 204",
                actual=answer.status,
            )
        if pool is not None and not said:
            logging.info("%s ready: registered in pool %s (%s)", name, pool.name, pool_id)
            said = True

    return register


async def _announce(site: Site, fetch: Callable[[], Awaitable[tuple[int, str, bytes]]]) -> None:
    """Say and keep the service id, as soon as the gateway hands out the first document."""
    while True:
        with contextlib.suppress(CloisterError):  # the gateway may not be there yet
            status, _, body = await fetch()
            if status == 200:
                break
        await asyncio.sleep(_POLL)
    try:
        found = thumbprint(SignedDocument.from_bytes(body).key)
        require_same_service(site.read_facts().get("service"), found)
        site.write_facts(service=found.hex())
        logging.info("key service ready: service %s", found.hex())
    except (CloisterError, OSError) as error:
        logging.error("the service id is not kept: %s", error)


def _forward(gateway: Upstream) -> Callable[[Mapping[str, str], bytes], Awaitable[tuple[int, str, bytes]]]:
    async def forward(fields: Mapping[str, str], body: bytes) -> tuple[int, str, bytes]:
        raw = tuple((name.encode(), value.encode()) for name, value in fields.items())
        answer = await gateway.request(b"POST", b"/ohttp", raw, body, timeout=_FORWARD_TIMEOUT)
        return answer.status, answer.content_type.decode(), bytes(answer.body)

    return forward


def _fetch(gateway: Upstream) -> Callable[[], Awaitable[tuple[int, str, bytes]]]:
    async def fetch() -> tuple[int, str, bytes]:
        answer = await gateway.request(b"GET", b"/.well-known/cloister", (), b"", timeout=_FORWARD_TIMEOUT)
        return answer.status, answer.content_type.decode(), bytes(answer.body)

    return fetch


def _settings(text: str) -> dict[str, int]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError("the settings are not JSON", code="settings.format", claim="--settings") from error
    if not isinstance(settings, dict):
        raise UsageError("the settings are no JSON object", code="settings.format", claim="--settings")
    return EnclaveConfiguration(role="key-service", anchor_roots=None, settings=settings).settings


def require_free(host: str, port: int) -> None:
    """Refuse an address that can't be listened on, before anything starts; raises UsageError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"can't listen on {host}:{port}",
            code="net.listen",
            claim="address",
            expected="an address of this host and a free port",
            actual=_reason(error),
            hint="Stop what listens there, or use --port 0, which picks a free port",
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno:
        return os.strerror(error.errno)  # asyncio and socket add where, which is said already
    return "unknown address"


def _prepare(site: Site, name: str, *, follow: int) -> None:
    """Set up one role's process: quiet logs, the data directory, an end together with its parent."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if follow:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != follow:  # it ended while this process was still starting
            sys.exit(1)
    site.make()
    _claim(site, name, patience=_LEFTOVER if follow else 0.0)


def _claim(site: Site, name: str, *, patience: float) -> None:
    """Be the only process of this role and name here, until this process ends; raises UsageError."""
    descriptor = os.open(site.lock_file(name), os.O_RDWR | os.O_CREAT, 0o600)
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if time.monotonic() < until:
                time.sleep(_POLL)
                continue
            raise UsageError(
                f"{name} runs in this data directory already",
                code="roles.running",
                claim=name,
                expected="one process of this role and name",
                actual=f"another one, which holds {site.lock_file(name)}",
                hint="Stop the other one, name another worker with --name, or another directory with --data",
            ) from error


async def _until_told() -> None:
    """Wait for SIGTERM or SIGINT."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await told.wait()
