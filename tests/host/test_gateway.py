from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from cloister.core.protocol.stages import Figures, Histogram
from cloister.errors import (
    CloisterError,
    FormatError,
    NotFound,
    Overloaded,
    TransportError,
    Unavailable,
    UsageError,
)
from cloister.host.gateway.capture import Capture, read_capture
from cloister.host.gateway.metrics import Metrics
from cloister.host.gateway.registry import KEY_SERVICE, Registry, Worker
from cloister.host.gateway.server import Gateway
from cloister.host.store.blobs import BlobStore
from cloister.net.body import Body
from cloister.net.front import Answer, FrontServer, Head, Limits, serve
from cloister.net.link import Peer, Upstream
from support.fronts import whole

POOL = "ab" * 32
OTHER = "cd" * 32
FIELDS = ((b"content-type", b"message/ohttp-req"), (b"cloister-pool", POOL.encode()))


@pytest.fixture(params=["asyncio", "uvloop"])
def go(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    factory = asyncio.new_event_loop if request.param == "asyncio" else uvloop.new_event_loop

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(asyncio.wait_for(main, 15))

    return run


Go = Callable[[Coroutine[Any, Any, Any]], Any]


class House:
    """A gateway with as many workers as a test starts, and a client for each door."""

    def __init__(self, gateway: Gateway, stack: AsyncExitStack, path: Path) -> None:
        self.gateway, self.stack, self.path = gateway, stack, path
        self.public = Upstream(Peer(host="127.0.0.1", port=gateway.port))
        self.admin = Upstream(Peer(unix=path / "run" / "admin.sock"))
        stack.push_async_callback(self.public.aclose)
        stack.push_async_callback(self.admin.aclose)

    async def worker(self, name: str, handler: Any = None, pool: str = POOL, **options: Any) -> FrontServer:
        @whole
        async def named(head: Head, body: memoryview) -> Answer:
            return Answer(body=name.encode() + b":" + body, content_type=b"message/ohttp-res")

        front = await serve(handler or named, unix=self.path / name, **options)
        self.stack.push_async_callback(front.close, 0.1)
        await self.register(name, pool)
        return front

    async def register(self, name: str, pool: str = POOL, **more: Any) -> None:
        body = json.dumps({"pool": pool, "socket": str(self.path / name), **more}).encode()
        assert (
            await self.admin.request(b"PUT", b"/workers/" + name.encode(), (), body, timeout=5)
        ).status == 204

    async def post(self, body: bytes = b"x", fields: Any = FIELDS) -> Answer:
        return await self.public.request(b"POST", b"/ohttp", fields, body, timeout=10)

    async def get(self, target: bytes, fields: Any = ()) -> Answer:
        return await self.public.request(b"GET", target, fields, timeout=10)


@asynccontextmanager
async def house(path: Path, **options: Any) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        gateway = Gateway(
            admin=path / "run" / "admin.sock", enclaves=path / "run" / "enclaves.sock", **options
        )
        await gateway.start()
        stack.push_async_callback(gateway.stop, 0.2)
        yield House(gateway, stack, path)


def code(answer: Answer) -> tuple[int, str]:
    assert answer.content_type == b"application/problem+json"
    problem = json.loads(bytes(answer.body))
    assert problem["status"] == answer.status
    assert set(problem) == {"type", "title", "status", "code"}
    return answer.status, problem["code"]


# --- forwarding ---

REFUSED = {
    "another content type": (((b"content-type", b"text/plain"), FIELDS[1]), 415, "gateway.content-type"),
    "no content type": ((FIELDS[1],), 415, "gateway.content-type"),
    "no pool": ((FIELDS[0],), 400, "gateway.pool"),
    "unknown pool": ((FIELDS[0], (b"cloister-pool", OTHER.encode())), 404, "gateway.no-pool"),
    "not a pool": ((FIELDS[0], (b"cloister-pool", b"../../etc")), 404, "gateway.no-pool"),
    "no key service": ((FIELDS[0], (b"cloister-pool", b"key-service")), 503, "gateway.no-worker"),
}


@pytest.mark.parametrize(("fields", "status", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(go: Go, tmp_path: Path, fields: Any, status: int, expected: str) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            await home.worker("w")
            answer = await home.post(fields=fields)
            assert code(answer) == (status, expected)
            assert answer.field(b"retry-after") == (b"1" if status == 503 else None)

    go(main())


def test_no_worker_left_is_503_with_retry_after(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            await home.worker("w")
            assert (await home.admin.request(b"DELETE", b"/workers/w", timeout=5)).status == 204
            answer = await home.post()
            assert code(answer) == (503, "gateway.no-worker")
            assert answer.field(b"retry-after") == b"1"

    go(main())


def test_a_worker_without_heartbeat_expires(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, lifetime=0.1) as home:
            await home.worker("w")
            await asyncio.sleep(0.15)
            assert code(await home.post()) == (503, "gateway.no-worker")
            await home.register("w")
            assert (await home.post()).body == b"w:x"

    go(main())


def test_a_refused_connection_goes_to_another_worker(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            await home.register("dead")
            await home.register("gone")
            await home.worker("w")
            for _ in range(3):
                assert (await home.post()).body == b"w:x"

    go(main())


def test_all_connections_refused_is_503(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            await home.register("dead")
            await home.register("gone")
            assert code(await home.post()) == (503, "gateway.no-worker")

    go(main())


@pytest.mark.parametrize("reads", [100, 300_000])
def test_a_worker_killed_in_the_middle_is_502_and_nothing_is_sent_again(
    go: Go, tmp_path: Path, reads: int
) -> None:
    async def main() -> None:
        seen = bytearray()

        class Dying(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = transport

            def data_received(self, data: bytes) -> None:
                seen.extend(data)
                if len(seen) >= reads:
                    self.transport.abort()  # type: ignore[attr-defined]

        async with house(tmp_path) as home:
            loop = asyncio.get_running_loop()
            servers = []
            for name in ("a", "b", "c"):
                servers.append(await loop.create_unix_server(Dying, str(tmp_path / name)))
                await home.register(name)
            answer = await home.post(b"MARK" + bytes(600_000))
            assert code(answer) == (502, "transport.closed")
            await asyncio.sleep(0.05)
            assert seen.count(b"MARK") == 1
            assert seen.count(b"POST /ohttp") == 1
            for server in servers:
                server.close()

    go(main())


def test_a_worker_that_takes_too_long_is_504_and_nothing_is_sent_again(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        calls = 0

        @whole
        async def slow(head: Head, body: memoryview) -> Answer:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0.5)
            return Answer()

        async with house(tmp_path, timeout=0.1) as home:
            await home.worker("a", slow)
            await home.worker("b", slow)
            assert code(await home.post()) == (504, "transport.timeout")
            assert calls == 1
            assert [each.in_flight for each in home.gateway.registry.workers(0)] == [0, 0]

    go(main())


def test_a_client_that_leaves_in_the_middle_leaves_nothing_at_the_worker(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        failures: list[str] = []

        async def handler(head: Head, body: Body) -> Answer:
            try:
                return Answer(body=bytes(await body.whole()))
            except TransportError as error:
                failures.append(error.code)
                raise

        async with house(tmp_path) as home:
            worker = await home.worker("w", handler)
            leaving = Body(1_000_000)
            leaving.advance(300_000)
            asyncio.get_running_loop().call_later(0.05, leaving.fail)
            with pytest.raises(TransportError):
                await home.public.request(b"POST", b"/ohttp", FIELDS, leaving, timeout=5)
            await asyncio.sleep(0.05)
            assert failures == ["transport.closed"]
            assert [each.in_flight for each in home.gateway.registry.workers(0)] == [0]
            assert (await home.post(b"next")).body == b"next"
            assert worker._shared.buffered == 0

    go(main())


def test_a_body_is_passed_on_while_it_arrives_once_enough_of_it_is_there(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        came: list[int] = []

        async def handler(head: Head, body: Body) -> Answer:
            came.append(await body.more(0))
            return Answer(body=bytes(await body.whole()))

        async with house(tmp_path) as home:
            await home.worker("w", handler)
            body = Body(200_000)
            body.view[:] = os.urandom(200_000)
            asking = asyncio.ensure_future(home.public.request(b"POST", b"/ohttp", FIELDS, body, timeout=5))
            body.advance(1000)
            await asyncio.sleep(0.05)
            assert came == [], "who sent next to nothing occupies no worker"
            body.advance(99_000)
            await asyncio.sleep(0.05)
            assert len(came) == 1
            body.advance(100_000)
            assert (await asking).body == bytes(body.view)

    go(main())


def test_uploads_that_halt_occupy_few_connections_to_workers_and_keep_nobody_out(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.host.gateway.forward.MAX_EARLY", 3)

    async def main() -> None:
        began = 0

        async def handler(head: Head, body: Body) -> Answer:
            nonlocal began
            await body.more(0)
            began += 1
            return Answer(body=bytes((await body.whole())[:4]))

        async with house(tmp_path) as home:
            await home.worker("w", handler)
            stalled = [Body(600_000) for _ in range(10)]
            asking = []
            for body in stalled:
                body.view[:] = b"late" + bytes(599_996)
                body.advance(300_000)
                asking.append(
                    asyncio.ensure_future(home.public.request(b"POST", b"/ohttp", FIELDS, body, timeout=10))
                )
            await asyncio.sleep(0.1)
            assert began == 3
            for _ in range(3):
                assert (await home.post(b"okay" + bytes(600_000))).body == b"okay"
            assert began == 6
            for body in stalled:
                body.advance(300_000)
            assert {bytes(each.body) for each in await asyncio.gather(*asking)} == {b"late"}
            assert home.gateway._forwarder is not None
            assert home.gateway._forwarder._early == set()

    go(main())


def test_an_upload_that_halts_gives_its_connection_to_a_worker_back(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        failures: list[str] = []

        async def handler(head: Head, body: Body) -> Answer:
            try:
                await body.whole()
            except TransportError as error:
                failures.append(error.code)
                raise
            return Answer()

        async with house(tmp_path, limits=Limits(stall_timeout=0.1)) as home:
            front = await home.worker("w", handler)
            body = Body(600_000)
            body.advance(300_000)
            answer = await home.public.request(b"POST", b"/ohttp", FIELDS, body, timeout=5)
            assert answer.status == 408
            await asyncio.sleep(0.05)
            assert failures == ["transport.closed"]
            assert front.connections == 0
            assert [each.in_flight for each in home.gateway.registry.workers(0)] == [0]

    go(main())


@pytest.mark.parametrize("status", [400, 413, 503])
def test_a_refusal_is_passed_on_before_the_upload_ends(go: Go, tmp_path: Path, status: int) -> None:
    async def main() -> None:
        async def refuse(head: Head, body: Body) -> Answer:
            return Answer(status=status, body=b"no", fields=[(b"retry-after", b"3")])

        async with house(tmp_path) as home:
            await home.worker("w", refuse)
            body = Body(600_000)
            body.advance(300_000)
            asking = home.public.request(b"POST", b"/ohttp", FIELDS, body, timeout=30)
            answer = await asyncio.wait_for(asking, 2)
            assert (answer.status, answer.body) == (status, b"no")
            assert answer.field(b"retry-after") == b"3"
            assert home.public._idle == []

    go(main())


def test_a_worker_that_dies_ends_a_request_whose_upload_halts(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        class Dying(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = transport

            def data_received(self, data: bytes) -> None:
                self.transport.abort()  # type: ignore[attr-defined]

        async with house(tmp_path) as home:
            server = await asyncio.get_running_loop().create_unix_server(Dying, str(tmp_path / "w"))
            await home.register("w")
            body = Body(600_000)
            body.advance(300_000)
            asking = home.public.request(b"POST", b"/ohttp", FIELDS, body, timeout=30)
            assert code(await asyncio.wait_for(asking, 2)) == (502, "transport.closed")
            server.close()

    go(main())


def test_what_a_worker_answers_passes_through(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        @whole
        async def busy(head: Head, body: memoryview) -> Answer:
            assert head.fields[b"cloister-model"] == b"m"
            assert b"authorization" not in head.fields
            fields = [(b"retry-after", b"7"), (b"x-internal", b"1")]
            return Answer(status=429, body=b"no", content_type=b"a/b", fields=fields)

        async with house(tmp_path) as home:
            await home.worker("w", busy)
            fields = [*FIELDS, (b"cloister-model", b"m"), (b"authorization", b"secret")]
            answer = await home.post(fields=fields)
            assert (answer.status, answer.body, answer.content_type) == (429, b"no", b"a/b")
            assert answer.field(b"retry-after") == b"7"
            assert answer.field(b"x-internal") is None

    go(main())


def test_pools_are_kept_apart_and_requests_spread(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            await home.worker("a")
            await home.worker("b")
            await home.worker("k", pool=KEY_SERVICE)
            bodies = {bytes((await home.post()).body) for _ in range(4)}
            assert bodies == {b"a:x", b"b:x"}
            fields = (FIELDS[0], (b"cloister-pool", b"key-service"))
            assert (await home.post(fields=fields)).body == b"k:x"

    go(main())


def test_large_bodies_and_handover_on_one_connection(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            await home.worker("w")
            data = os.urandom(1_000_000)
            assert (await home.post(data)).body == b"w:" + data
            assert (await home.get(b"/healthz")).status == 200
            # uvicorn has the connection now, and the same request gets the same answer there.
            assert (await home.post(data)).body == b"w:" + data
            assert code(await home.post(fields=FIELDS[:1])) == (400, "gateway.pool")
            assert len(home.public._idle) == 1

    go(main())


def test_limits_hold_on_either_path(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, limits=Limits(max_body=1000)) as home:
            await home.worker("w")
            assert (await home.post(bytes(1001))).status == 413
            await home.get(b"/healthz")
            assert code(await home.post(bytes(1001))) == (413, "http.too-large")

    go(main())


# --- the other routes ---


def test_unknown_routes_and_methods_are_problems(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            assert code(await home.get(b"/none")) == (404, "http.404")
            answer = await home.public.request(b"POST", b"/healthz", (), b"", timeout=5)
            assert code(answer) == (405, "http.405")
            assert code(await home.get(b"/workers")) == (404, "http.404")  # the admin's routes are not public
            assert code(await home.get(b"/records/t")) == (404, "http.404")

    go(main())


def test_a_failing_route_shows_nothing(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Metrics, pools: object) -> bytes:
        raise RuntimeError("internal detail")

    async def main() -> None:
        async with house(tmp_path) as home:
            monkeypatch.setattr(Metrics, "render", broken)
            answer = await home.get(b"/metrics")
            assert code(answer) == (500, "internal")
            assert b"detail" not in bytes(answer.body)

    go(main())
    assert "detail" not in caplog.text
    assert "RuntimeError" in caplog.text


def test_the_service_document_is_cached_and_outlives_the_key_service(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        fetched = 0
        target = b"/.well-known/cloister"

        def document() -> Answer:
            nonlocal fetched
            fetched += 1
            return Answer(body=b"document %d" % fetched, content_type=b"application/cbor")

        async with house(tmp_path) as home:
            assert code(await home.get(target)) == (503, "gateway.no-worker")
            await asyncio.sleep(0)
            front = await home.worker("k", pool=KEY_SERVICE, gets={target: document})
            answers = await asyncio.gather(*(home.get(target) for _ in range(5)))
            assert {bytes(each.body) for each in answers} == {b"document 1"}
            assert fetched == 1
            etag = answers[0].field(b"etag")
            assert etag == b'"' + hashlib.sha256(b"document 1").hexdigest().encode() + b'"'
            assert answers[0].content_type == b"application/cbor"
            again = await home.get(target, [(b"if-none-match", etag)])
            assert (again.status, again.body) == (304, b"")
            await front.close(0)
            await asyncio.sleep(1.05)
            assert (await home.get(target)).body == b"document 1"

    go(main())


def test_metrics_count_by_pool_and_outcome(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            await home.worker("w")
            await home.post()
            await home.post(fields=(FIELDS[0], (b"cloister-pool", b"invented")))
            text = bytes((await home.get(b"/metrics")).body).decode()
            assert f'cloister_gateway_requests_total{{outcome="ok",pool="{POOL}"}} 1.0' in text
            assert 'cloister_gateway_requests_total{outcome="gateway.no-pool",pool="unknown"} 1.0' in text
            assert f'cloister_gateway_workers{{pool="{POOL}"}} 1.0' in text
            assert "invented" not in text

    go(main())


def told(age: float = 1.0, **seconds: float) -> Figures:
    """Figures in which each stage was counted once."""
    made = {name: Histogram() for name in seconds}
    for name, each in seconds.items():
        made[name].observe(each)
    return Figures(age=age, stages=made)


def test_stages_that_workers_tell_of_are_summed_by_pool(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            for name, seconds in (("a", 0.002), ("b", 0.02)):
                await home.worker(name)
                for _ in range(2):  # heartbeats repeat what was said
                    await home.register(name, stages=told(age=0.001, run=seconds, open=1.5).to_data())
            text = bytes((await home.get(b"/metrics")).body).decode()
            run = f'cloister_stage_seconds_bucket{{le="%s",pool="{POOL}",stage="run"}} %s'
            for bound, count in (("0.001", 0.0), ("0.003", 1.0), ("0.03", 2.0), ("+Inf", 2.0)):
                assert run % (bound, count) in text
            assert f'cloister_stage_seconds_sum{{pool="{POOL}",stage="open"}} 3.0' in text

    go(main())


def sums(metrics: Metrics) -> dict[str, float]:
    lines = metrics.render([]).decode().splitlines()
    found = [line.split(" ") for line in lines if line.startswith("cloister_stage_seconds_count")]
    return {line[0].partition('stage="')[2].partition('"')[0]: float(line[1]) for line in found}


def test_sums_only_grow_whatever_workers_do() -> None:
    metrics = Metrics()
    metrics.take("w", POOL, told(age=1e-6, run=1, open=1))
    metrics.take("w", POOL, told(age=5, run=1, open=1))
    assert sums(metrics) == {"run": 1, "open": 1}
    metrics.take("w", POOL, told(age=1, run=1))  # started again
    assert sums(metrics) == {"run": 2, "open": 1}
    metrics.take("w", POOL, told(age=2, run=1, build=1))
    assert sums(metrics) == {"run": 2, "open": 1, "build": 1}


def test_the_past_of_a_worker_that_is_older_than_the_gateway_is_not_counted() -> None:
    metrics = Metrics()
    metrics.take("w", POOL, told(age=1000, run=1))
    assert sums(metrics) == {}
    later = told(age=1002, run=1)
    later.stages["run"].observe(0.5)
    metrics.take("w", POOL, later)
    assert sums(metrics) == {"run": 1}


def test_remembered_workers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.host.gateway.metrics.MAX_WORKERS", 3)
    metrics = Metrics()
    for number in range(10):
        metrics.take(f"w{number}", POOL, told(age=1e-6, run=1))
    assert len(metrics._stages._before) == 3
    assert sums(metrics) == {"run": 10}


def test_blobs_are_uploaded_and_read(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, blobs=BlobStore(tmp_path / "blobs", 10_000_000)) as home:
            data = os.urandom(3_000_000)
            target = b"/blobs/" + hashlib.sha256(data).hexdigest().encode()
            assert (await home.public.request(b"PUT", target, (), data, timeout=5)).status == 201
            parts = [bytes(piece) async for piece in home.public.stream(target)]
            assert b"".join(parts) == data
            part = await home.get(target, [(b"range", b"bytes=10-19")])
            assert (part.status, part.body) == (206, data[10:20])
            wrong = await home.public.request(b"PUT", target, (), data + b"x", timeout=5)
            assert code(wrong) == (422, "blob.digest")

    go(main())


# --- the admin socket ---


def test_the_admin_socket_is_private_and_lists_workers(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            path = tmp_path / "run" / "admin.sock"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            await home.worker("w")
            listed = json.loads(bytes((await home.admin.request(b"GET", b"/workers", timeout=5)).body))
            assert [(each["id"], each["pool"], each["in_flight"]) for each in listed] == [("w", POOL, 0)]
            missing = await home.admin.request(b"DELETE", b"/workers/none", timeout=5)
            assert code(missing) == (404, "gateway.no-worker")
            assert code(await home.admin.request(b"POST", b"/ohttp", (), b"", timeout=5)) == (404, "http.404")

    go(main())


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"pool": "x", "socket": "/a"}', b'{"pool": 1, "socket": "/a"}',
     b'{"pool": "key-service", "socket": "a"}', b'{"pool": "key-service", "socket": "/a", "more": 1}',
     b'{"pool": "key-service", "socket": "/a\\u0000b"}', b"[" * 4000,
     b'{"pool": "key-service", "socket": "/' + b"a" * 107 + b'"}'],
)  # fmt: skip
def test_refused_registration(go: Go, tmp_path: Path, body: bytes) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            answer = await home.admin.request(b"PUT", b"/workers/w", (), body, timeout=5)
            assert code(answer) == (400, "gateway.worker")
            raw = b'{"pool": "key-service", "socket": "/a", "stages": {"age_s": 1, "stages": {"x": []}}}'
            answer = await home.admin.request(b"PUT", b"/workers/w", (), raw, timeout=5)
            assert code(answer) == (400, "format.stages")
            assert home.gateway.registry.workers(0) == []
            large = await home.admin.request(b"PUT", b"/workers/w", (), bytes(5000), timeout=5)
            assert code(large) == (413, "http.too-large")

    go(main())


def test_a_gateway_that_cannot_listen_leaves_nothing(go: Go, tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            second = Gateway(
                admin=tmp_path / "two" / "a", enclaves=tmp_path / "two" / "e", port=home.gateway.port
            )
            with pytest.raises(UsageError):
                await second.start()
            assert not (tmp_path / "two" / "admin.sock").exists()

    go(main())


# --- capture ---


def test_the_capture_holds_every_byte(go: Go, tmp_path: Path) -> None:
    path = tmp_path / "capture"

    async def main() -> None:
        async with house(tmp_path, capture=path) as home:
            await home.worker("w")
            await home.post(b"ASKED" + bytes(100_000))
            await home.get(b"/healthz")
            await home.post(b"AGAIN")

    go(main())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    flows: dict[tuple[str, bool], bytes] = {}
    for frame in read_capture(path):
        key = (frame.label, frame.received)
        flows[key] = flows.get(key, b"") + frame.data
    for key in (("front", True), ("upstream", False), ("upstream", True), ("front", False)):
        assert flows[key].count(b"ASKED") == 1, key
        assert flows[key].count(b"AGAIN") == 1, key
    assert b"GET /healthz" in flows["front", True]
    assert b'{"status":"ok"}' in flows["front", False]  # what uvicorn wrote is there too
    assert len(flows["front", True]) > 100_000


@pytest.mark.parametrize(
    "raw", [b"x\n", b"# 1 front received 5\nabc", b"# 1 front received 1\nab", b"# 1 front\n"]
)
def test_refused_capture(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "c"
    path.write_bytes(raw)
    with pytest.raises(FormatError):
        list(read_capture(path))


def test_a_capture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Capture(tmp_path / "no" / "c").open()


# --- the registry ---


def worker(name: str, pool: str = POOL) -> Worker:
    return Worker(id=name, pool=pool, socket=Path("/run") / name)


@pytest.mark.parametrize(
    "fields",
    [{"id": ""}, {"id": "a/b"}, {"id": "-a"}, {"id": "a" * 65}, {"pool": "AB" * 32}, {"pool": "ab" * 31},
     {"pool": ""}, {"socket": Path("a")}],
)  # fmt: skip
def test_refused_worker(fields: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        Worker(**({"id": "a", "pool": POOL, "socket": Path("/a")} | fields))


def test_registry_refuses_what_is_not_there() -> None:
    registry = Registry()
    with pytest.raises(NotFound):
        registry.choose(POOL, 0.0)
    with pytest.raises(NotFound):
        registry.remove("a")
    registry.register(worker("a"), 0.0)
    for error, call in (
        (Unavailable, lambda: registry.choose(POOL, 6.0)),
        (Unavailable, lambda: registry.choose(POOL, 0.0, tried=frozenset({"a"}))),
    ):
        with pytest.raises(error):
            call()


def test_registry_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.host.gateway.registry.MAX_WORKERS", 2)
    registry = Registry()
    registry.register(worker("a"), 0.0)
    registry.register(worker("b"), 0.0)
    with pytest.raises(Overloaded):
        registry.register(worker("c"), 0.0)
    registry.register(worker("a"), 1.0)
    monkeypatch.setattr("cloister.host.gateway.registry.MAX_POOLS", 2)
    with pytest.raises(CloisterError):
        registry.register(worker("a", OTHER), 1.0)


def test_registry_chooses_the_least_busy_then_in_turn() -> None:
    registry = Registry()
    for name in "abc":
        registry.register(worker(name), 0.0)
    assert {registry.choose(POOL, 0.0).worker.id for _ in range(3)} == {"a", "b", "c"}
    busy = registry.choose(POOL, 0.0)
    busy.in_flight += 1
    assert busy.worker.id not in {registry.choose(POOL, 0.0).worker.id for _ in range(6)}
    suspect = registry.choose(POOL, 0.0)
    suspect.suspect = True
    assert suspect.worker.id not in {registry.choose(POOL, 0.0).worker.id for _ in range(6)}
    registry.register(suspect.worker, 1.0)
    assert not suspect.suspect


def test_heartbeats_keep_a_worker_and_its_count() -> None:
    registry = Registry()
    registry.register(worker("a"), 0.0)
    entry = registry.choose(POOL, 0.0)
    entry.in_flight = 3
    registry.register(worker("a"), 5.0)
    assert registry.expire(10.0) == []
    assert registry.choose(POOL, 10.0) is entry
    assert registry.expire(11.0) == [worker("a")]
    assert registry.knows(POOL)
    registry.register(worker("a", OTHER), 12.0)
    assert registry.choose(OTHER, 12.0).in_flight == 0


def test_metric_labels_are_bounded() -> None:
    metrics = Metrics()
    for n in range(100):
        metrics.observe(f"pool {n}", "ok", 0.1, 1, 1)
    text = metrics.render([])
    assert b'pool="pool 63"' in text
    assert b'pool="pool 64"' not in text
    assert b'pool="other"} 36.0' in text
