"""``cloister gateway | keyservice | worker``: a host's launchers and front door."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Annotated, Final

import typer

from cloister.cli.site import Site, reference_policy
from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.core.protocol.pool import require_name
from cloister.errors import Unavailable, UsageError
from cloister.net.link import Peer, Upstream
from cloister.net.loop import run
from cloister.net.messages import Limits

_PR_SET_PDEATHSIG: Final = 1
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
    port: Annotated[int, typer.Option(help="TCP port; 0 picks one.")] = 0,
    capture: Annotated[Path | None, typer.Option(help="Append every byte seen to this file.")] = None,
    max_body: Annotated[int, typer.Option(help="Largest encapsulated request, in bytes.")] = 64 << 20,
    follow: Follow = 0,
) -> None:
    """Run the gateway: the HTTP front door, which sees ciphertext only."""
    from cloister.host.gateway.server import Gateway
    from cloister.host.store.blobs import BlobStore

    site = _prepare(data, follow=follow)

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
            site.write_facts(url=f"http://{host}:{server.port}")
            await _until_told()

    run(main())


def keyservice(
    data: Data = Path("var"),
    settings: Annotated[str, typer.Option(help="JSON object of enclave settings.")] = "{}",
    source: Annotated[Path | None, typer.Option(hidden=True)] = None,
    follow: Follow = 0,
) -> None:
    """Run a key service enclave on this host (simulated TEE)."""
    site = _prepare(data, follow=follow)
    configuration = EnclaveConfiguration(
        role="key-service", anchor_roots=_root(site), settings=_settings(settings)
    )
    _run_enclave(site, "key-service", "key-service", "key-service", configuration, source)


def worker(
    data: Data = Path("var"),
    name: Annotated[str, typer.Option(help="Name of this worker on its host.")] = "worker-1",
    pool: Annotated[str, typer.Option(help="Name of the pool that it joins.")] = "default",
    settings: Annotated[str, typer.Option(help="JSON object of enclave settings.")] = "{}",
    tee: Annotated[str, typer.Option(help="TEE to simulate: sgx, tdx, snp or nitro.")] = "sgx",
    source: Annotated[Path | None, typer.Option(hidden=True)] = None,
    follow: Follow = 0,
) -> None:
    """Run a worker enclave on this host (simulated TEE)."""
    from cloister.sim.measurement import measure

    require_name(name, "worker name")
    site = _prepare(data, follow=follow)
    root, definition = _root(site), site.read_pool(pool)
    configuration = EnclaveConfiguration(
        role="worker",
        anchor_roots=root,
        service=site.service(),
        pool=definition,
        key_service=reference_policy(measure("key-service"), root),
        settings=_settings(settings),
    )
    _run_enclave(site, "worker", name, definition.id.hex(), configuration, source, tee)


def _run_enclave(
    site: Site,
    role: str,
    name: str,
    pool: str,
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
            _registration(admin, name, pool),
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
            await _until_told()

    run(main())


def _registration(admin: Upstream, name: str, pool: str) -> Callable[[Path], Awaitable[None]]:
    async def register(socket: Path) -> None:
        body = json.dumps({"pool": pool, "socket": str(socket)}).encode()
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

    return register


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


def _root(site: Site) -> bytes:
    from cloister.sim.authority import SimulatedAuthority

    return SimulatedAuthority.open_or_create(site.authority, now=int(time.time())).roots_der


def _settings(text: str) -> dict[str, int]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError("the settings are not JSON", code="settings.format", claim="--settings") from error
    if not isinstance(settings, dict):
        raise UsageError("the settings are no JSON object", code="settings.format", claim="--settings")
    return settings


def _prepare(data: Path, *, follow: int) -> Site:
    """Set up one role's process: quiet logs, the data directory, an end together with its parent."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if follow:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != follow:  # it ended while this process was still starting
            sys.exit(1)
    site = Site(data.absolute())
    site.make()
    return site


async def _until_told() -> None:
    """Wait for SIGTERM or SIGINT."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await told.wait()
