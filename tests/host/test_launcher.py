"""The launcher with real processes: a fake program in the simulated platform."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cloister.errors import NotFound, Overloaded, TransportError, Unavailable, UsageError
from cloister.host.launcher import EnclaveProcess, Launcher, Platform, Timing, link_app
from cloister.sim.platform import SimulatedPlatform
from cloister.sim.sandbox import Sandbox
from sim.fakes import SERVER, FakeAuthority, fake_source

FAST = Timing(ready=10.0, poll=0.01, heartbeat=0.1, backoff_least=0.05, backoff_most=0.2, stop=3.0)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Platform:
    source = fake_source(tmp_path_factory.mktemp("source"))
    return SimulatedPlatform(FakeAuthority(), Sandbox.detect(), source=source)


async def answer(*_: object) -> tuple[int, str, bytes]:
    return 200, "text/plain", b"from the gateway"


class Registry:
    """Stands for the gateway's registration; it is away while `away`."""

    def __init__(self) -> None:
        self.seen: list[Path] = []
        self.away = False

    async def __call__(self, socket: Path) -> None:
        if self.away:
            raise TransportError("no gateway")
        self.seen.append(socket)


def launcher(
    platform: Platform,
    run_dir: Path,
    program: str = SERVER,
    registry: Registry | None = None,
    app: Starlette | None = None,
    **options: object,
) -> Launcher:
    return Launcher(
        platform,
        "worker",
        run_dir,
        app or link_app([], forward=answer, fetch_document=answer),
        registry or Registry(),
        configuration=program.encode(),
        **{"timing": FAST, **options},
    )


async def eventually(condition: Callable[[], object]) -> None:
    for _ in range(800):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


def processes_in(run_dir: Path) -> list[bytes]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(run_dir) in line:
                found.append(line)
    return found


# Refusals.


@pytest.mark.asyncio
async def test_an_enclave_that_ends_at_once_is_reported_with_its_last_lines(
    platform: Platform, tmp_path: Path
) -> None:
    owned = launcher(platform, tmp_path / "run", "print('the reason', flush=True); sys.exit(3)")
    with pytest.raises(Unavailable, match=r"status 3(.|\n)*the reason") as refusal:
        await owned.start()
    assert refusal.value.code == "launcher.not-ready"
    assert os.listdir(tmp_path / "run") == ["enclave.log"]


@pytest.mark.asyncio
async def test_an_enclave_that_never_answers_is_ended(platform: Platform, tmp_path: Path) -> None:
    program = "import time\nprint('thinking', flush=True)\ntime.sleep(60)"
    owned = launcher(platform, tmp_path / "run", program, timing=Timing(ready=0.5, poll=0.01, stop=0.2))
    with pytest.raises(Unavailable, match=r"did not answer(.|\n)*thinking"):
        await owned.start()
    await eventually(lambda: not processes_in(tmp_path))


@pytest.mark.asyncio
async def test_an_enclave_that_says_it_is_not_well_is_not_ready(platform: Platform, tmp_path: Path) -> None:
    program = SERVER.replace("200 OK", "503 No")
    owned = launcher(platform, tmp_path / "run", program, timing=Timing(ready=0.5, poll=0.01))
    with pytest.raises(Unavailable, match="did not answer"):
        await owned.start()


@pytest.mark.asyncio
async def test_a_launcher_starts_once(platform: Platform, tmp_path: Path) -> None:
    owned = launcher(platform, tmp_path / "run")
    await owned.start()
    try:
        with pytest.raises(UsageError, match="already"):
            await owned.start()
        assert owned.ready
    finally:
        await owned.stop()


def test_the_socket_of_a_launcher_that_is_not_started_is_refused(platform: Platform, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not started"):
        _ = launcher(platform, tmp_path).socket


@pytest.mark.asyncio
async def test_paths_too_long_for_sockets_are_refused(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("d" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(UsageError, match="shorter path") as refusal:
        await launcher(platform, long / "run").start()
    assert refusal.value.code == "launcher.path"
    assert os.listdir(long) == ["run"]


@pytest.mark.asyncio
async def test_a_run_folder_that_cannot_be_made_is_refused(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable) as refusal:
        await launcher(platform, tmp_path / "file" / "run").start()
    assert refusal.value.code == "launcher.run-dir"


# Life and death.


@pytest.mark.asyncio
async def test_a_long_data_directory_gets_a_short_run_folder(platform: Platform, tmp_path: Path) -> None:
    run_dir = tmp_path / ("d" * 120) / "run"
    owned = launcher(platform, run_dir)
    await owned.start()
    socket = owned.socket
    assert len(os.fsencode(socket)) <= 107
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    await owned.stop()
    assert not socket.parent.exists()
    assert owned.log == run_dir / "enclave.log"
    assert "ended in order" in owned.log.read_text()


@pytest.mark.asyncio
async def test_stop_leaves_nothing_behind(platform: Platform, tmp_path: Path) -> None:
    run_dir, before = tmp_path / "run", asyncio.all_tasks()
    owned = launcher(platform, run_dir)
    await owned.start()
    assert {"configuration", "link.sock", "enclave.sock"} <= set(os.listdir(run_dir))
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((run_dir / "link.sock").stat().st_mode) == 0o600
    assert processes_in(run_dir)
    await owned.stop()
    assert os.listdir(run_dir) == ["enclave.log"]
    assert "ended in order" in owned.log.read_text()
    assert asyncio.all_tasks() == before
    await eventually(lambda: not processes_in(run_dir))
    await owned.stop()


@pytest.mark.asyncio
async def test_a_deaf_enclave_is_killed(platform: Platform, tmp_path: Path) -> None:
    program = SERVER.replace("end.set)", "lambda: None)")
    owned = launcher(platform, tmp_path / "run", program, timing=Timing(poll=0.01, stop=0.3))
    await owned.start()
    await owned.stop()
    await eventually(lambda: not processes_in(tmp_path))


@pytest.mark.asyncio
async def test_a_killed_enclave_is_started_again(platform: Platform, tmp_path: Path) -> None:
    registry = Registry()
    owned = launcher(platform, tmp_path / "run", registry=registry)
    await owned.start()
    try:
        for count in (1, 2):
            process: EnclaveProcess | None = owned.process
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            await eventually(lambda expected=count: owned.restarts == expected and owned.ready)
            await owned.wait_ready()
            assert owned.process is not None
            assert owned.process.pid != process.pid
            assert owned.process.measurement.mr_enclave == process.measurement.mr_enclave
        assert len(registry.seen) >= 3
    finally:
        await owned.stop()


def test_pauses_between_starts_grow_up_to_a_bound() -> None:
    timing = Timing()
    assert [timing.pause(crashes) for crashes in range(1, 8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0]
    assert timing.pause(100_000) == 10.0


@pytest.mark.asyncio
async def test_an_enclave_that_keeps_crashing_is_tried_again_and_again(
    platform: Platform, tmp_path: Path
) -> None:
    program = """
if (run_dir / "broken").exists():
    sys.exit(4)
"""
    owned = launcher(platform, tmp_path / "run", program + SERVER)
    await owned.start()
    try:
        (tmp_path / "run" / "broken").touch()
        assert owned.process is not None
        owned.process.kill()
        await eventually(lambda: owned.restarts >= 3)
        assert not owned.ready
        (tmp_path / "run" / "broken").unlink()
        async with asyncio.timeout(5):
            await owned.wait_ready()
    finally:
        await owned.stop()


@pytest.mark.asyncio
async def test_stop_during_the_pause_after_a_crash(platform: Platform, tmp_path: Path) -> None:
    timing = Timing(poll=0.01, backoff_least=60.0, backoff_most=60.0)
    owned = launcher(platform, tmp_path / "run", timing=timing)
    await owned.start()
    assert owned.process is not None
    owned.process.kill()
    await eventually(lambda: owned.process is None)
    assert not owned.ready
    await owned.stop()
    assert os.listdir(tmp_path / "run") == ["enclave.log"]


@pytest.mark.asyncio
async def test_heartbeats_go_on_while_the_gateway_is_away(platform: Platform, tmp_path: Path) -> None:
    registry = Registry()
    registry.away = True
    owned = launcher(platform, tmp_path / "run", registry=registry)
    await owned.start()
    try:
        assert registry.seen == []
        registry.away = False
        await eventually(lambda: len(registry.seen) >= 2)
        assert set(registry.seen) == {owned.socket}
    finally:
        await owned.stop()


@pytest.mark.asyncio
async def test_the_enclave_reaches_the_host_link_and_nothing_is_changed(
    platform: Platform, tmp_path: Path
) -> None:
    program = """
import socket
link = socket.socket(socket.AF_UNIX)
link.connect(str(run_dir / "link.sock"))
link.sendall(b"GET /.well-known/cloister HTTP/1.1\\r\\nHost: host\\r\\nConnection: close\\r\\n\\r\\n")
print(link.makefile("rb").read().decode(), flush=True)
link.close()
"""
    owned = launcher(platform, tmp_path / "run", program + SERVER)
    await owned.start()
    await owned.stop()
    assert "from the gateway" in owned.log.read_text()


# The host link.


class Gateway:
    def __init__(self) -> None:
        self.seen: list[tuple[Mapping[str, str], bytes]] = []
        self.error: Exception | None = None

    async def __call__(self, fields: Mapping[str, str], body: bytes) -> tuple[int, str, bytes]:
        if self.error is not None:
            raise self.error
        self.seen.append((fields, body))
        return 200, "message/ohttp-res", body[::-1]


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


def client(gateway: Gateway) -> httpx.AsyncClient:
    async def stored(_: Request) -> PlainTextResponse:
        return PlainTextResponse("a record")

    app = link_app([Route("/records", stored)], forward=gateway, fetch_document=answer, max_body=1000)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://host")


OHTTP = {"content-type": "message/ohttp-req", "cloister-pool": "ab" * 32}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (415, {**OHTTP, "content-type": "application/json"}, b"x"),
        (415, {"cloister-pool": "ab"}, b"x"),
        (400, {"content-type": "message/ohttp-req"}, b"x"),
        (431, {**OHTTP, "cloister-model": "m" * 2000}, b"x"),
        (413, OHTTP, bytes(1001)),
        (413, {**OHTTP, "content-length": str(1 << 40)}, b"x"),
        (413, {**OHTTP, "content-length": "-1"}, b"x"),
    ],
)
async def test_link_refuses(gateway: Gateway, status: int, headers: dict[str, str], body: bytes) -> None:
    async with client(gateway) as enclave:
        found = await enclave.post("/ohttp", headers=headers, content=body)
    assert found.status_code == status
    assert found.headers["content-type"] == "application/problem+json"
    assert gateway.seen == []


@pytest.mark.asyncio
async def test_link_refuses_a_stream_that_grows_too_long(gateway: Gateway) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield bytes(100)

    async with client(gateway) as enclave:
        found = await enclave.post("/ohttp", headers=OHTTP, content=parts())
    assert found.status_code == 413
    assert gateway.seen == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (TransportError("gone"), 502, "transport"),
        (Overloaded("full"), 503, "overloaded"),
        (NotFound("no pool"), 404, "not-found"),
        (UsageError("no"), 400, "usage"),
        (RuntimeError("internal words"), 500, "link"),
    ],
)
async def test_link_answers_a_failed_gateway_with_a_problem(
    gateway: Gateway, error: Exception, status: int, code: str
) -> None:
    gateway.error = error
    async with client(gateway) as enclave:
        found = await enclave.post("/ohttp", headers=OHTTP, content=b"x")
    assert (found.status_code, found.json()["error"]) == (status, code)
    assert "internal words" not in found.text


@pytest.mark.asyncio
@pytest.mark.parametrize(("method", "path"), [("GET", "/workers"), ("GET", "/ohttp"), ("PUT", "/records")])
async def test_link_offers_nothing_else(gateway: Gateway, method: str, path: str) -> None:
    async with client(gateway) as enclave:
        found = await enclave.request(method, path)
    assert found.status_code in (404, 405)
    assert found.headers["content-type"] == "application/problem+json"


@pytest.mark.asyncio
async def test_link_forwards_the_request_and_its_known_fields_only(gateway: Gateway) -> None:
    headers = {**OHTTP, "cloister-model": "o/m", "cloister-deadline": "50", "cookie": "c", "x-other": "o"}
    async with client(gateway) as enclave:
        found = await enclave.post("/ohttp", headers=headers, content=b"sealed")
    assert (found.status_code, found.content) == (200, b"delaes")
    assert found.headers["content-type"] == "message/ohttp-res"
    fields, body = gateway.seen[0]
    assert body == b"sealed"
    assert fields == {**OHTTP, "cloister-model": "o/m", "cloister-deadline": "50"}


@pytest.mark.asyncio
async def test_link_serves_the_store_and_the_service_document(gateway: Gateway) -> None:
    async with client(gateway) as enclave:
        assert (await enclave.get("/records")).text == "a record"
        assert (await enclave.get("/.well-known/cloister")).content == b"from the gateway"
