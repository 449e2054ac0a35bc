"""A worker's routes: nobody without a grant, nothing twice, nothing that belongs elsewhere, no bad tensor."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cloister.client.client import parse_reuse, parse_stages
from cloister.core import oip
from cloister.core.ohttp import bhttp
from cloister.core.protocol.authorization import FIELD, RequestAuthorization, RequestContext
from cloister.core.protocol.statement import ServingOptions
from cloister.enclave.clock import HintedClock
from cloister.enclave.server import InnerRequest
from cloister.enclave.worker.membership import LiveKey, LiveModel
from cloister.enclave.worker.models import LoadedModel, ModelCache, slot_name
from cloister.enclave.worker.routes import MAX_WAITING, WorkerRoutes
from cloister.enclave.worker.scheduler import Scheduler
from cloister.errors import (
    AccessRefused,
    BindingRefused,
    CloisterError,
    DeadlineExceeded,
    FormatError,
    InvalidRequest,
    LeaseExpired,
    NotFound,
    Overloaded,
    Replayed,
)
from enclave.conftest import SERVICE, Sealed, hosting, seal_model
from support.realm import DAY, NOW, Clock, kem_key, owner_key

pytestmark = pytest.mark.asyncio
POOL = b"P" * 32
USER, STRANGER = owner_key("user"), owner_key("stranger")
USERS = [owner_key(f"user-{number}") for number in range(8)]
NO_INPUTS = b'{"inputs": []}'
X = np.arange(8, dtype=np.float32).reshape(2, 4)


class Membership:
    """What the routes look at of a worker's membership."""

    def __init__(self, *models: Sealed) -> None:
        self.service, self.pool_id = SERVICE, POOL
        self.keys = {
            7: LiveKey(epoch=3, not_after=NOW + 100, dies=math.inf, private_key=kem_key(0x20)),
            6: LiveKey(epoch=2, not_after=NOW, dies=math.inf, private_key=kem_key(0x20)),
        }
        self.models = {model.model: model.live for model in models}
        self.active = True
        self.spent = 0
        self.steps: dict[str, float] = {}

    def spend(self) -> None:
        if not self.active:
            raise LeaseExpired(claim="lease")
        self.spent += 1


class Bench:
    """Routes over one model, and a way to ask them."""

    def __init__(self, model: Sealed, *, queue: int = 8, threads: int = 2) -> None:
        self.model = model
        self.clock = Clock()
        self.membership = Membership(model)
        self.scheduler = Scheduler(threads=threads, queue=queue)
        self.refreshed = 0
        self.on_refresh = lambda: None
        self.cache = ModelCache(hosting(model), budget=1 << 20)  # type: ignore[arg-type]
        self.routes = WorkerRoutes(
            self.membership,  # type: ignore[arg-type]
            self.cache,
            HintedClock(self.clock),
            self.scheduler,
            refresh=self.refresh,
        )

    async def refresh(self) -> None:
        self.refreshed += 1
        await asyncio.sleep(0)
        self.on_refresh()

    def request(
        self,
        *,
        method: bytes = b"POST",
        path: bytes | None = None,
        model: str | None = None,
        content: bytes | None = None,
        header: bytes | None = None,
        fields: tuple[tuple[bytes, bytes], ...] = (),
        key_id: int = 7,
        enc: bytes | None = None,
        authorization: RequestAuthorization | bytes | None = None,
        key: Any = USER,
        sign: dict[str, Any] | None = None,
        arrived: float = 0.0,
        **signed: Any,
    ) -> InnerRequest:
        """One inner request, right but for what is said."""
        model = model or self.model.model
        enc = enc or os.urandom(32)
        context = RequestContext(
            **{"service": SERVICE, "pool": POOL, "epoch": 3, "model": model, "enc": enc, **(sign or {})}
        )
        if authorization is None:
            live = self.membership.models.get(model)
            authorization = RequestAuthorization.sign(
                key,
                context,
                **{
                    "statement": live.digest if live else bytes(32),
                    "request_id": os.urandom(16),
                    "expiry": NOW + 60,
                    **signed,
                },
            )
        if content is None:
            raw, buffers = oip.encode_request({"x": X}, outputs=("y",), request_id="mine")
            content, header = b"".join((raw, *buffers)), b"%d" % len(raw)
        lines = list(fields)
        if header is not None:
            lines.append((oip.HEADER_LENGTH, header))
        if authorization:
            value = authorization if isinstance(authorization, bytes) else authorization.to_field()
            lines.append((FIELD, value))
        http = bhttp.Request(
            method=method,
            path=path or f"/v2/models/{model}/infer".encode(),
            fields=tuple(lines),
            content=content,
        )
        return InnerRequest(http=http, enc=enc, key_id=key_id, arrived=arrived, opened=arrived)

    async def ask(self, **options: Any) -> bhttp.Response:
        return await self.routes(self.request(**options))

    async def refused(self, kind: type[CloisterError], code: str, **options: Any) -> CloisterError:
        spent = self.membership.spent
        with pytest.raises(kind) as caught:
            await self.ask(**options)
        assert caught.value.code == code, str(caught.value)
        if kind in (AccessRefused, BindingRefused, Replayed, FormatError, NotFound):
            assert self.membership.spent == spent
        return caught.value


@pytest.fixture
def bench_of() -> Iterator[Any]:
    made: list[Bench] = []

    def make(serving: ServingOptions | None = None, **options: Any) -> Bench:
        users = (USER, *USERS)
        grants = {user.thumbprint: NOW + DAY for user in users} | {b"late".ljust(32): NOW}
        model = seal_model(grants=grants, serving=serving)
        made.append(Bench(model, **options))
        return made[-1]

    yield make
    for bench in made:
        bench.scheduler.close()


@pytest.fixture
def bench(bench_of) -> Bench:
    return bench_of()


def outputs(response: bhttp.Response) -> dict[str, oip.Array]:
    return oip.decode_response(memoryview(response.content), response.field(oip.HEADER_LENGTH))


# -- what holds ----------------------------------------------------------------


async def test_an_answer_in_both_forms(bench):
    response = await bench.ask()
    assert (response.status, response.field(b"content-type")) == (200, b"application/octet-stream")
    assert list(outputs(response)) == ["y"]
    np.testing.assert_array_equal(outputs(response)["y"], X * 2)
    stages = response.field(b"server-timing").decode()
    for stage in ("decrypt", "open", "build", "queue", "run", "encode", "enclave"):
        assert f"{stage};dur=" in stages
    content = json.dumps(
        {"id": "a", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
    )
    response = await bench.ask(content=content.encode())
    assert response.field(b"content-type") == b"application/json"
    answer = json.loads(bytes(response.content))
    assert (answer["id"], answer["model_version"]) == ("a", "1")
    assert [each["name"] for each in answer["outputs"]] == ["y", "copy"]
    assert answer["outputs"][0]["data"] == [2, 4, 6, 8]
    assert b"open;" not in response.field(b"server-timing")
    assert stages.endswith(", batch;desc=1")
    assert "batch" not in parse_stages(stages.encode())
    assert bench.membership.spent == 2
    assert bench.refreshed == 0


async def test_metadata_and_readiness_need_authorization_too(bench):
    path = f"/v2/models/{bench.model.model}".encode()
    await bench.refused(AccessRefused, "access.authorization", method=b"GET", path=path, authorization=b"")
    response = await bench.ask(method=b"GET", path=path)
    metadata = json.loads(bytes(response.content))
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert metadata["name"] == bench.model.model
    response = await bench.ask(method=b"GET", path=path + b"/ready")
    assert json.loads(bytes(response.content)) == {"name": bench.model.model, "ready": True}
    versioned = path + b"/versions/1/infer"
    assert (await bench.ask(path=versioned)).status == 200
    assert bench.membership.spent == 3


async def test_health_needs_none(bench):
    for path, wanted in (
        (b"/v2/health/live", {"live": True}),
        (b"/v2/health/ready", {"ready": True}),
        (
            b"/v2",
            {"name": "cloister", "version": "1", "extensions": ["binary_tensor_data", "model_repository"]},
        ),
    ):
        response = await bench.ask(method=b"GET", path=path, authorization=b"")
        assert json.loads(bytes(response.content)) == wanted
    bench.membership.active = False
    await bench.refused(
        LeaseExpired, "lease-expired", method=b"GET", path=b"/v2/health/ready", authorization=b""
    )


@pytest.mark.parametrize(
    ("method", "path"),
    [
        (b"GET", b"/"),
        (b"POST", b"/v2"),
        (b"GET", b"/v2/models"),
        (b"DELETE", b"/v2/models/x"),
        (b"GET", b"/v2/models/x/infer"),
        (b"POST", b"/v2/models/x"),
        (b"POST", b"/v2/models/x/ready"),
        (b"POST", b"/v2/health/live"),
        (b"POST", b"/releases"),
    ],
)
async def test_other_routes(bench, method, path):
    await bench.refused(NotFound, "not-found.route", method=method, path=path)


@pytest.mark.parametrize("version", ["2", "", "01", "1/versions/1", "latest"])
@pytest.mark.parametrize("action", ["", "/ready", "/infer"])
async def test_another_version(bench, version, action):
    path = f"/v2/models/{bench.model.model}/versions/{version}{action}".encode()
    method = b"POST" if action == "/infer" else b"GET"
    await bench.refused(NotFound, "not-found.version", method=method, path=path)


async def test_every_route_with_and_without_a_version(bench):
    path = f"/v2/models/{bench.model.model}".encode()
    for versioned in (path, path + b"/versions/1"):
        for method, action in ((b"GET", b""), (b"GET", b"/ready"), (b"POST", b"/infer")):
            assert (await bench.ask(method=method, path=versioned + action)).status == 200


async def test_a_path_of_other_bytes(bench):
    await bench.refused(FormatError, "format", path=b"/v2/models/%ff/infer")


# -- authorization -------------------------------------------------------------


async def test_no_authorization(bench):
    await bench.refused(AccessRefused, "access.authorization", authorization=b"")


@pytest.mark.parametrize("field", [b"x", b"AAAA", b"A" * 2000])
async def test_an_authorization_that_is_none(bench, field):
    with pytest.raises(FormatError):
        await bench.ask(authorization=field)


@pytest.mark.parametrize(
    "change",
    [
        {"service": b"T" * 32},
        {"pool": b"Q" * 32},
        {"epoch": 2},
        {"epoch": 4},
        {"model": "another"},
        {"enc": b"e" * 32},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_a_signature_for_something_else(bench, change):
    await bench.refused(BindingRefused, "binding.request", sign=change)


async def test_a_signature_taken_from_another_request(bench):
    first = bench.request()
    await bench.routes(first)
    stolen = first.http.field(FIELD)
    await bench.refused(BindingRefused, "binding.request", authorization=stolen)
    with pytest.raises(Replayed):
        await bench.routes(first)


async def test_a_replayed_request(bench):
    request = bench.request()
    await bench.routes(request)
    for _ in range(3):
        with pytest.raises(Replayed):
            await bench.routes(request)
    assert bench.membership.spent == 1


async def test_copies_that_arrive_at_once_are_answered_once(bench):
    request = bench.request()
    results = await asyncio.gather(*(bench.routes(request) for _ in range(5)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Replayed"] * 4 + ["Response"]


async def test_the_same_request_id_in_another_encapsulation(bench):
    await bench.ask(request_id=b"r" * 16)
    await bench.refused(Replayed, "replayed.request", request_id=b"r" * 16)


@pytest.mark.parametrize("expiry", [NOW - 1, NOW + 10_000])
async def test_expired_or_valid_for_too_long(bench, expiry):
    await bench.refused(AccessRefused, "access.request-expiry", expiry=expiry)


async def test_a_user_without_a_grant_leaves_nothing_behind(bench):
    await bench.refused(AccessRefused, "access.grant", key=STRANGER)
    assert len(bench.routes._replays) == 0
    assert len(bench.cache._slots) == 0


async def test_a_grant_that_expired(bench):
    said = bench.model.live.statement
    assert said.grants[USER.thumbprint] == NOW + DAY
    bench.clock.time = NOW + DAY
    bench.membership.keys[7] = dataclasses.replace(bench.membership.keys[7], not_after=NOW + 2 * DAY)
    await bench.refused(AccessRefused, "access.expired", expiry=NOW + DAY + 5)


@pytest.mark.parametrize("key_id", [6, 8])
async def test_a_key_that_died_or_is_not_here(bench, key_id):
    await bench.refused(BindingRefused, "binding.epoch", key_id=key_id, sign={"epoch": 2})


async def test_a_key_dies_by_the_clock(bench):
    await bench.ask()
    bench.clock.time = NOW + 100
    await bench.refused(BindingRefused, "binding.epoch", expiry=NOW + 150)
    bench.clock.time = NOW  # the host turns its clock back
    await bench.refused(BindingRefused, "binding.epoch")


# -- statements and leases -----------------------------------------------------


async def test_another_statement_than_the_current_one_leads_to_one_refresh(bench):
    await bench.refused(AccessRefused, "access.statement", statement=b"s" * 32)
    assert bench.refreshed == 1
    await bench.ask()
    assert bench.refreshed == 1


async def test_a_statement_that_the_worker_learns_of_by_the_refresh(bench):
    live = bench.model.live
    newer = dataclasses.replace(live.statement, version=2, previous=live.digest)
    accepted = LiveModel(statement=newer, digest=newer.digest, key=live.key)
    bench.on_refresh = lambda: bench.membership.models.update({newer.model: accepted})
    response = await bench.ask(statement=newer.digest)
    assert response.status == 200
    assert bench.refreshed == 1
    await bench.refused(AccessRefused, "access.statement", statement=live.digest)


async def test_a_revoked_user_is_refused_under_the_new_statement(bench):
    live = bench.model.live
    newer = dataclasses.replace(live.statement, version=2, previous=live.digest, grants={})
    revoked = LiveModel(statement=newer, digest=newer.digest, key=live.key)
    bench.on_refresh = lambda: bench.membership.models.update({newer.model: revoked})
    await bench.refused(AccessRefused, "access.grant", statement=newer.digest)


async def test_a_model_that_the_pool_does_not_serve(bench):
    other = f"{owner_key().thumbprint.hex()}/other"
    await bench.refused(NotFound, "not-found.model", model=other)
    assert bench.refreshed == 1


async def test_without_a_lease(bench):
    bench.membership.active = False
    await bench.refused(LeaseExpired, "lease-expired")
    assert bench.refreshed == 1
    bench.on_refresh = lambda: setattr(bench.membership, "active", True)
    assert (await bench.ask()).status == 200


# -- load ----------------------------------------------------------------------


async def test_the_queue_is_bounded(bench_of, monkeypatch):
    bench = bench_of(queue=2, threads=1)
    gate = threading.Event()
    run = LoadedModel.run

    def slow(self: LoadedModel, *given: Any) -> Any:
        gate.wait(5)
        return run(self, *given)

    monkeypatch.setattr(LoadedModel, "run", slow)
    tasks = [asyncio.ensure_future(bench.ask()) for _ in range(2)]
    await asyncio.sleep(0.05)
    spent = bench.membership.spent
    error = await bench.refused(Overloaded, "overloaded")
    assert error.retryable
    assert bench.membership.spent == spent  # what is refused for load costs nothing of the lease
    gate.set()
    assert [response.status for response in await asyncio.gather(*tasks)] == [200, 200]
    assert (await bench.ask()).status == 200


async def test_places_in_the_queue_are_given_back_after_a_refusal(bench_of):
    bench = bench_of(queue=1)
    for _ in range(5):
        await bench.refused(AccessRefused, "access.authorization", authorization=b"")
    assert (await bench.ask()).status == 200


async def test_a_deadline_that_passed(bench):
    import time

    await bench.ask()
    late = time.monotonic() - 1.0
    await bench.refused(
        DeadlineExceeded, "deadline", fields=((b"cloister-deadline-ms", b"500"),), arrived=late
    )
    response = await bench.ask(fields=((b"cloister-deadline-ms", b"60000"),), arrived=late)
    assert response.status == 200


@pytest.mark.parametrize("field", [b"-1", b"x", b"1.5", b"1" * 10, b"", b"1e3"])
async def test_a_deadline_that_is_none(bench, field):
    await bench.refused(InvalidRequest, "request.deadline", fields=((b"cloister-deadline-ms", field),))


# -- tensors -------------------------------------------------------------------


def body(inputs: dict[str, oip.Array], *wanted: str) -> dict[str, bytes]:
    raw, buffers = oip.encode_request(inputs, outputs=wanted)
    return {"content": b"".join((raw, *buffers)), "header": b"%d" % len(raw)}


@pytest.mark.parametrize(
    ("inputs", "wanted", "code"),
    [
        ({"z": X}, (), "request.inputs"),
        ({"x": X, "z": X}, (), "request.inputs"),
        ({"x": X}, ("z",), "request.outputs"),
        ({"x": X.astype(np.float64)}, (), "request.datatype"),
        ({"x": X[:, :3]}, (), "request.shape"),
        ({"x": X[0]}, (), "request.shape"),
    ],
    ids=["name", "one too many", "output", "datatype", "side", "rank"],
)
async def test_bad_tensors(bench, inputs, wanted, code):
    await bench.refused(InvalidRequest, code, **body(inputs, *wanted))
    assert (await bench.ask()).status == 200


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff" * 50, b'{"inputs": []}', b'{"inputs": [1]}', b"[" * 5000]
)
async def test_a_body_that_is_no_inference(bench, content):
    with pytest.raises(InvalidRequest):
        await bench.ask(content=content)
    assert (await bench.ask()).status == 200


async def test_numbers_that_are_none_are_the_model_s_business(bench):
    odd = np.array([[np.nan, np.inf, -np.inf, -0.0]], np.float32)
    response = await bench.ask(**body({"x": odd}, "copy"))
    assert outputs(response)["copy"].tobytes() == odd.tobytes()


async def test_no_rows(bench):
    await bench.refused(InvalidRequest, "request.shape", **body({"x": X[:0]}, "y"))


async def test_many_at_once_get_their_own_answers(bench):
    async def one(seed: int) -> bool:
        x = np.full((3, 4), seed, np.float32)
        response = await bench.ask(**body({"x": x}, "y"))
        return bool((outputs(response)["y"] == 2 * seed).all())

    for start in range(0, 40, 8):
        assert all(await asyncio.gather(*(one(seed) for seed in range(start, start + 8))))


async def test_strangers_who_wait_for_a_renewal_leave_the_queue_alone(bench):
    """Anybody can sign for a model that isn't there, and so make the worker ask the key service."""
    gate = asyncio.Event()
    bench.routes._refresh = gate.wait
    ghost = f"{STRANGER.thumbprint.hex()}/nothing"
    asked = [
        asyncio.ensure_future(bench.routes(bench.request(key=STRANGER, model=ghost)))
        for _ in range(MAX_WAITING + 20)
    ]
    await asyncio.sleep(0.05)
    assert (await bench.routes(bench.request())).status == 200
    gate.set()
    codes = [error.code for error in await asyncio.gather(*asked, return_exceptions=True)]
    assert codes.count("overloaded") == 20
    assert codes.count("not-found.model") == MAX_WAITING
    assert bench.routes._waiting == bench.scheduler.inside == 0


async def test_a_few_bytes_do_not_become_a_large_tensor(bench):
    """A side of zero makes an empty tensor of any other sides; a model may turn it into another number."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1 << 23, 0, 8], "data": []}
    content = json.dumps({"inputs": [tensor]}).encode()
    await bench.refused(InvalidRequest, "request.shape", content=content, header=None)


async def refused_after_spending(bench, kind, code):
    with pytest.raises(kind) as caught:
        await bench.routes(bench.request())
    assert caught.value.code == code
    assert bench.membership.spent == 1
    assert bench.scheduler.inside == 0


async def test_a_statement_that_is_replaced_while_the_model_loads(bench):
    """The host can make a load last as long as it likes."""
    real = bench.cache.use

    def slow(live):
        bench.membership.models = {}
        return real(live)

    bench.cache.use = slow
    await refused_after_spending(bench, AccessRefused, "access.statement")


async def test_a_lease_that_ends_while_the_model_loads(bench):
    real = bench.cache.use

    def slow(live):
        bench.membership.active = False
        return real(live)

    bench.cache.use = slow
    await refused_after_spending(bench, LeaseExpired, "lease-expired")


async def test_a_lease_that_ends_in_the_queue(bench):
    real = bench.scheduler.run

    def slow(place, call):
        bench.membership.active = False
        return real(place, call)

    bench.scheduler.run = slow
    await refused_after_spending(bench, LeaseExpired, "lease-expired")


# -- the reuse ladder ----------------------------------------------------------


def ladder(response: bhttp.Response) -> tuple[str, set[str]]:
    """The step, and the stages that only some answers have."""
    field = response.field(b"server-timing")
    return parse_reuse(field), parse_stages(field).keys() - {"decrypt", "queue", "run", "encode", "enclave"}


async def test_cold_then_hot_then_warm(bench):
    bench.membership.steps.update(began=1.0, attested=2.0, released=3.0)
    assert ladder(await bench.ask()) == ("cold", {"launch", "attest", "release", "open", "build"})
    assert ladder(await bench.ask()) == ("hot", set())
    assert bench.cache.drop(slot_name(bench.model.live.statement))
    assert ladder(await bench.ask()) == ("warm", {"open", "build"})
    assert ladder(await bench.ask()) == ("hot", set())


async def test_who_waits_for_another_s_load_is_warm(bench):
    await bench.ask()
    bench.cache.drop(slot_name(bench.model.live.statement))
    found = [ladder(each) for each in await asyncio.gather(bench.ask(), bench.ask(), bench.ask())]
    assert sorted(found, key=lambda each: len(each[1])) == [
        ("warm", {"wait"}), ("warm", {"wait"}), ("warm", {"open", "build"})
    ]  # fmt: skip


async def test_who_waits_for_newer_keys_is_warm(bench):
    await bench.ask()
    live = bench.membership.models.pop(bench.model.model)

    def publish() -> None:
        bench.membership.models[bench.model.model] = live

    bench.on_refresh = publish
    request = bench.request(statement=live.digest)
    assert ladder(await bench.routes(request)) == ("warm", {"release"})
    assert bench.refreshed == 1


async def test_refused_requests_are_no_steps(bench):
    await bench.refused(InvalidRequest, "request.inputs", content=NO_INPUTS, header=None)
    assert ladder(await bench.ask())[0] == "cold"


# -- batches and strict models -------------------------------------------------


def batch_of(response: bhttp.Response) -> int:
    return int(response.field(b"server-timing").rpartition(b"batch;desc=")[2])


@pytest.mark.parametrize("batching", ["none", "same-user", "cross-user"])
async def test_a_thousand_requests_of_eight_users_get_their_own_answers(bench_of, monkeypatch, batching):
    bench = bench_of(serving=ServingOptions(batching=batching), queue=300)
    monkeypatch.setattr("cloister.enclave.worker.batching.GAIN", 2.0)  # so that a model this small is batched
    random = np.random.default_rng(1)
    seen: set[int] = set()

    async def one(number: int) -> None:
        x = random.standard_normal((int(random.integers(1, 5)), 4)).astype(np.float32)
        request = bench.request(
            key=USERS[number % 8], allow_cross_user_batching=number % 8 != 3, **body({"x": x}, "y")
        )
        response = await bench.routes(request)
        seen.add(batch_of(response))
        wiped = x.copy()
        assert outputs(response)["y"].tobytes() == (wiped * 2).tobytes()

    for start in range(0, 1000, 250):
        await asyncio.gather(*(one(number) for number in range(start, start + 250)))
    assert bench.scheduler.inside == 0
    assert (seen == {1}) is (batching == "none")


async def test_users_are_told_apart_by_their_signatures(bench_of):
    """A user fills the queue; another's request finds a place, and its turn."""
    bench = bench_of(queue=8, threads=1)
    await bench.ask()
    real, gate, order = LoadedModel.run, threading.Event(), []

    def slow(self: LoadedModel, inputs: Any, wanted: Any) -> Any:
        gate.wait(5)
        order.append(float(inputs["x"][0, 0]))
        return real(self, inputs, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "run", slow)
        many = [
            asyncio.ensure_future(bench.ask(**body({"x": np.full((1, 4), mark, np.float32)}, "y")))
            for mark in range(8)
        ]
        await asyncio.sleep(0.05)
        one = asyncio.ensure_future(
            bench.ask(key=USERS[0], **body({"x": np.full((1, 4), 100, np.float32)}, "y"))
        )
        await asyncio.sleep(0.05)
        gate.set()
        results = await asyncio.gather(*many, one, return_exceptions=True)
    assert [type(each).__name__ for each in results] == ["Response"] * 7 + ["Overloaded", "Response"]
    assert order.index(100) <= 2


async def test_a_strict_model_answers(bench_of):
    bench = bench_of(serving=ServingOptions(isolation="strict"), queue=64, threads=4)
    running, most, lock = 0, 0, threading.Lock()
    real = LoadedModel.run

    def watched(self: LoadedModel, *given: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return real(self, *given)
        finally:
            with lock:
                running -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "run", watched)
        responses = await asyncio.gather(*(bench.ask(key=USERS[number % 8]) for number in range(60)))
    assert most == 1
    assert all((outputs(each)["y"] == X * 2).all() for each in responses)
    assert {batch_of(each) for each in responses} == {1}


async def test_a_model_that_becomes_strict_gets_another_session(bench_of):
    bench = bench_of()
    await bench.ask()
    live = bench.model.live
    said = dataclasses.replace(live.statement, options=ServingOptions(isolation="strict"))
    bench.membership.models = {said.model: LiveModel(statement=said, digest=said.digest, key=live.key)}
    assert (await bench.ask()).status == 200
    assert len(bench.cache._slots) == 2


async def test_outputs_are_wiped_when_they_are_encoded(bench, monkeypatch):
    made: list[Any] = []
    real = LoadedModel.run

    def kept(self: LoadedModel, *given: Any) -> Any:
        made.append(real(self, *given))
        return made[-1]

    monkeypatch.setattr(LoadedModel, "run", kept)
    response = await bench.ask()
    assert (outputs(response)["y"] == X * 2).all()
    assert not made[0]["y"].any()
    assert isinstance(response.content, bytearray)
