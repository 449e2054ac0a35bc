"""``cloister up``: a whole service on one host: gateway, key service enclave, worker enclaves."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.markup import escape

from cloister.cli.output import console, print_json, table
from cloister.cli.pool import (
    Tee,
    create_pool,
    found_pool,
    registered,
    require_same_service,
    write_policies,
)
from cloister.cli.roles import PORT, require_free
from cloister.cli.site import Site, reference_policy
from cloister.core.identity import thumbprint
from cloister.core.protocol.configuration import SETTINGS
from cloister.core.protocol.conversation import WELL_KNOWN, Trust
from cloister.core.protocol.document import SignedDocument
from cloister.core.protocol.exchange import PoolCreation
from cloister.core.protocol.flow import Outgoing
from cloister.core.protocol.pool import Pool, require_name
from cloister.core.protocol.trust import hex_digest
from cloister.errors import TransportError, Unavailable, UsageError

if TYPE_CHECKING:
    from cloister.party.carry import Carrier

__all__ = ["Service", "bring_up", "create_pool", "up"]

SETTING_HELP: Final = {
    "lease_seconds": "Longest a worker serves without the key service.",
    "lease_requests": "Most requests that a worker serves on one lease.",
    "document_seconds": "Seconds that a service document is valid.",
    "epoch_seconds": "Seconds that a pool's keys live.",
    "threads": "Requests that a worker runs at once.",
    "memory_mib": "Models that a worker holds, in MiB.",
}
START_SECONDS: Final = 60.0  # for each process to be ready
POLL: Final = 0.05  # seconds
STOP_SECONDS: Final = 15.0


class Service:
    """The processes of one service. Owns them; `stop` ends them all.

    Args:
        site: The data directory; the processes' logs lie in its ``logs``.
    """

    def __init__(self, site: Site) -> None:
        self.site: Final = site
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, list[str]] = {}
        self._lock: int | None = None

    def lock(self) -> None:
        """Claim the data directory until `stop`; raises UsageError where another service runs in it."""
        self._lock = os.open(self.site.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                "a service runs in this data directory already",
                code="up.running",
                claim=str(self.site.root),
                expected="a directory that no other `cloister up` uses",
                actual="one that is locked",
                hint="Stop the other one, or name another directory with --data",
            ) from error

    def start(self, name: str, *arguments: str) -> None:
        """Start a role's process under a name."""
        command = [
            sys.executable,
            "-m",
            "cloister.cli",
            *arguments,
            "--data",
            str(self.site.root),
            "--follow-parent",
            str(os.getpid()),
        ]
        self._commands[name] = command
        self._spawn(name)

    def pin(self, name: str, option: str, value: str) -> None:
        """Give an option this value whenever the process is started again."""
        command = self._commands[name]
        command[command.index(option) + 1] = value

    def revive(self) -> list[str]:
        """Start again whatever ended; gives the names."""
        ended = [name for name, process in self.processes.items() if process.poll() is not None]
        for name in ended:
            self._spawn(name)
        return ended

    def wait(self, name: str, ready: Callable[[], bool], what: str) -> None:
        """Wait until something is ready that a process brings; raises Unavailable with the end of its log."""
        until = time.monotonic() + START_SECONDS
        while not ready():
            if self.processes[name].poll() is not None or time.monotonic() > until:
                raise Unavailable(
                    f"{what} did not come up",
                    code="up.start",
                    claim=name,
                    expected=f"ready within {START_SECONDS:.0f} s",
                    actual=self._last_line(name),
                    hint=f"See {self._log(name)}",
                )
            time.sleep(POLL)

    def stop(self) -> None:
        """End every process: SIGTERM, then SIGKILL."""
        for process in self.processes.values():
            process.terminate()
        until = time.monotonic() + STOP_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _spawn(self, name: str) -> None:
        with self._log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self._commands[name], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _log(self, name: str) -> Path:
        folder = self.site.root / "logs"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{name}.log"

    def _last_line(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "nothing in its log"


def _setting(name: str) -> Any:
    """The option of one setting of the enclaves, with its range."""
    _, least, most = SETTINGS[name]
    return typer.Option(min=least, max=most, help=SETTING_HELP[name])


def up(
    data: Annotated[Path, typer.Option("--data", help="Data directory; made if it isn't there.")] = Path(
        "var"
    ),
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker enclaves.")] = 2,
    host: Annotated[str, typer.Option(help="Address of the gateway.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port of the gateway; 0 picks one.")] = PORT,
    pool: Annotated[str, typer.Option(help="Name of the pool.")] = "default",
    owner: Annotated[
        str | None,
        typer.Option(help="Owner (thumbprint) of the pool; by default the first to publish."),
    ] = None,
    lease_seconds: Annotated[int, _setting("lease_seconds")] = SETTINGS["lease_seconds"][0],
    lease_requests: Annotated[int, _setting("lease_requests")] = SETTINGS["lease_requests"][0],
    document_seconds: Annotated[int, _setting("document_seconds")] = SETTINGS["document_seconds"][0],
    epoch_seconds: Annotated[int, _setting("epoch_seconds")] = SETTINGS["epoch_seconds"][0],
    threads: Annotated[int, _setting("threads")] = SETTINGS["threads"][0],
    memory_mib: Annotated[int, _setting("memory_mib")] = SETTINGS["memory_mib"][0],
    worker_tee: Annotated[Tee, typer.Option(help="TEE that the workers simulate.")] = "sgx",
    capture: Annotated[Path | None, typer.Option(help="File for every byte that the gateway sees.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the service's facts as one JSON object.")
    ] = False,
) -> None:
    """Start a service on this host with the simulated TEE and keep it running until interrupted."""
    from cloister.sim.platform import ANNOUNCEMENT
    from cloister.sim.sandbox import Sandbox

    if owner is None and not _is_loopback(host):
        raise UsageError(
            "say whose pool it is before others can reach it",
            code="up.owner",
            claim="--owner",
            expected="the owner's thumbprint, on any address but loopback",
            actual="none",
            hint="Otherwise the first stranger who publishes owns the pool",
        )
    require_name(pool, "pool name")
    whose = None if owner is None else hex_digest(owner, "owner")
    site = Site(data.absolute())
    settings = json.dumps(
        {
            "lease_requests": lease_requests,
            "lease_seconds": lease_seconds,
            "document_seconds": document_seconds,
            "epoch_seconds": epoch_seconds,
            "threads": threads,
            "memory_mib": memory_mib,
        }
    )
    service = Service(site)
    try:
        if not as_json:
            console.print(f"[yellow]{ANNOUNCEMENT}[/yellow]")
            for line in Sandbox.detect().report():  # what this machine lacks is done without, and said
                console.print(f"[dim]{escape(line)}[/dim]")
        with console.status("starting") if not as_json else _Quiet() as status:
            facts = bring_up(
                service,
                workers=workers,
                host=host,
                port=port,
                pool=pool,
                owner=whose,
                settings=settings,
                worker_tee=worker_tee,
                capture=capture,
                say=status.update if as_json or console.is_terminal else console.print,
            )
        _show(site, facts, as_json=as_json)
        _watch(service)
        if not as_json:
            console.print("stopping")
    finally:
        service.stop()


def bring_up(
    service: Service,
    *,
    workers: int,
    settings: str,
    host: str = "127.0.0.1",
    port: int = 0,
    pool: str = "default",
    owner: bytes | None = None,
    worker_tee: str = "sgx",
    capture: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, str]:
    """Start everything in order and wait until it serves; gives URL, service id and pool id.

    Raises:
        Unavailable: a process did not come up.
        UsageError: the data directory holds another service.
    """
    from cloister.party.carry import Carrier
    from cloister.sim.measurement import measure

    site = service.site
    if not site.root.exists():  # a refusal leaves no new folder behind
        require_free(host, port)
    site.make()
    service.lock()
    require_free(host, port)
    say("measuring the enclaves")
    root = site.roots()
    key_service = reference_policy(measure("key-service"), root)
    definition = Pool(name=pool, policy=reference_policy(measure("worker"), root, worker_tee))
    say("starting the gateway")
    known = site.read_facts().get("service")
    site.facts.unlink(missing_ok=True)
    if known is not None:
        site.write_facts(service=known)
    captured = ("--capture", str(capture.absolute())) if capture is not None else ()
    service.start("gateway", "gateway", "--host", host, "--port", str(port), *captured)
    service.wait("gateway", lambda: "url" in site.read_facts(), "the gateway")
    url = str(site.read_facts()["url"])
    service.pin("gateway", "--port", url.rpartition(":")[2])
    carrier = Carrier(url)
    try:
        say("starting the key service enclave")
        service.start("key-service", "keyservice", "--settings", settings)
        service.wait("key-service", lambda: _document(carrier) is not None, "the key service")
        service_id = _service_id(carrier, known)
        site.write_facts(service=service_id.hex(), pool=definition.id.hex())
        creation = PoolCreation(pool=definition, owner=owner)
        found_pool(site, carrier, Trust(service=service_id, key_service=key_service), creation)
        for number in range(1, workers + 1):
            say(f"starting worker enclave {number} of {workers}")
            name = f"worker-{number}"
            service.start(
                name, "worker", "--name", name, "--pool", pool, "--settings", settings, "--tee", worker_tee
            )
        for number in range(1, workers + 1):
            service.wait(f"worker-{number}", lambda: len(registered(site)) > workers, f"worker {number}")
    finally:
        carrier.close()
    write_policies(site, service_id, key_service, definition.policy)
    return {"url": url, "service": service_id.hex(), "pool": definition.id.hex()}


def _document(carrier: Carrier) -> bytes | None:
    try:
        answer = carrier.send(Outgoing(method=b"GET", target=WELL_KNOWN))
    except TransportError:
        return None
    return bytes(answer.body) if answer.status == 200 else None


def _service_id(carrier: Carrier, known: object) -> bytes:
    raw = _document(carrier)
    if raw is None:
        raise Unavailable("the key service went away", code="up.start", claim="key service")
    found = thumbprint(SignedDocument.from_bytes(raw).key)
    require_same_service(known, found)
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _show(site: Site, facts: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        print_json({**facts, "data": str(site.root)})
        return
    rows = [
        *facts.items(),
        ("user policy", site.user_policy),
        ("model policy", site.model_policy),
        ("logs", site.root / "logs"),
    ]
    table("Serving; stop with Ctrl-C", ("what", "value"), rows)


def _watch(service: Service) -> None:
    """Keep every process running until interrupted."""
    import signal
    import threading

    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    signal.signal(signal.SIGINT, lambda *_: told.set())
    while not told.wait(0.5):
        for name in service.revive():
            console.print(f"[yellow]{name} ended and was started again[/yellow]")


class _Quiet:
    """Stands in for the status line where nothing may be printed."""

    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, status: str) -> None:
        """Say nothing."""
