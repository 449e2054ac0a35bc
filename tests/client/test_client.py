"""The client over httpx, synchronous and asynchronous, and the transports for other SDKs."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator

import httpx
import numpy as np
import onnxruntime as ort
import pytest

from cloister.client.client import AsyncClient, Client, parse_batch, parse_stages
from cloister.client.identity import Identity
from cloister.client.transport import (
    AsyncCloisterTransport,
    CloisterTransport,
    async_httpx_transport,
    httpx_transport,
)
from cloister.core.protocol.flow import Flow, Outgoing, Pause
from cloister.core.protocol.limits import MAX_INNER_REQUEST
from cloister.core.secret import Secret
from cloister.core.times import time_text
from cloister.errors import (
    AccessRefused,
    AppraisalRefused,
    CloisterError,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    TransportError,
    UsageError,
)
from cloister.party.carry import AsyncCarrier, Carrier
from support.realm import STRANGER, policy
from support.stage import DIGITS, IMAGE, USER, Theatre

URL = "http://service.test"


def client(theatre: Theatre, **options: object) -> Client:
    return Client(
        URL,
        **{
            "policy": theatre.stage.user_policy(),
            "identity": USER,
            "transport": theatre.transport(),
            "now": theatre.realm.clock.now,
            **options,
        },  # type: ignore[arg-type]
    )


def right() -> dict[str, np.ndarray]:
    session = ort.InferenceSession(DIGITS, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": IMAGE}), strict=True))


def test_arrays_in_arrays_out(theatre):
    with client(theatre) as made:
        with pytest.raises(NotFound):
            _ = made.record
        outputs = made.infer(theatre.stage.model, {"image": IMAGE})
        wanted = right()
        assert outputs.keys() == wanted.keys()
        for name, array in wanted.items():
            assert outputs[name].tobytes() == array.tobytes()
        record = made.record
        assert (record.service, record.simulated, record.epoch) == (theatre.realm.id, True, 1)
        assert record.stages["run"] >= 0
        assert "[ok] possession" in str(record)
        shown = json.loads(json.dumps(record.to_dict()))
        assert shown["service"] == theatre.realm.id.hex()
        name = next(iter(wanted))
        assert list(made.infer(theatre.stage.model, {"image": IMAGE}, outputs=(name,))) == [name]
        assert made.metadata(theatre.stage.model)["inputs"][0]["name"] == "image"
        assert made.verify().document.service == theatre.realm.id


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        ({"wrong": IMAGE}, "request.inputs"),
        ({}, "request.inputs"),
        ({"image": IMAGE.astype(np.float64)}, "request.datatype"),
        ({"image": IMAGE[0]}, "request.shape"),
        ({"image": [1.0, 2.0]}, "request.datatype"),
        ({"image": np.array([None])}, "request.data"),
    ],
    ids=["name", "none", "datatype", "shape", "list", "objects"],
)
def test_bad_inputs_get_a_clear_error_and_break_nothing(theatre, inputs, code):
    with client(theatre) as made:
        with pytest.raises(InvalidRequest) as caught:
            made.infer(theatre.stage.model, inputs)
        assert caught.value.code == code
        made.infer(theatre.stage.model, {"image": IMAGE})


def test_a_list_gets_a_hint(theatre):
    with client(theatre) as made:
        with pytest.raises(InvalidRequest) as caught:
            made.infer(theatre.stage.model, {"image": [1.0]})
        assert (caught.value.code, caught.value.actual) == ("request.datatype", "list")
        assert "numpy.asarray" in caught.value.hint


def test_a_record_is_told_with_dates(theatre):
    with client(theatre) as made:
        made.verify()
        record = made.record
        text = str(record)
        assert record.evidence is not None
        assert f"[ok] valid until: {time_text(record.evidence.not_after)}" in text
        assert "expired" not in text
        assert not re.search(r"\b\d{10}\b|0x", text)
        assert "[note] 11: nothing to show for SGX" in text
        assert f"[ok] attributes: {record.evidence.measurements['attributes'].hex()}" in text
        assert [each["name"] for each in record.to_dict()["steps"]] == [each.name for each in record.steps]
        assert "expired" in [each.name for each in record.steps]


def test_inputs_that_are_too_large_do_not_leave(theatre):
    with client(theatre) as made:
        with pytest.raises(InvalidRequest) as caught:
            made.infer(
                theatre.stage.model, {"image": np.broadcast_to(np.float32(0), (MAX_INNER_REQUEST // 4 + 1,))}
            )
        assert caught.value.code == "request.size"
        assert theatre.requests == []


def test_a_deadline(theatre):
    with client(theatre) as made:
        made.infer(theatre.stage.model, {"image": IMAGE}, deadline_ms=60_000)


def test_a_deadline_that_passed_is_not_tried_again(theatre):
    """Another attempt would have a deadline of its own: 1 ms became an answer after 0.8 s."""
    with client(theatre) as made:
        made.infer(theatre.stage.model, {"image": IMAGE})
        before = len(theatre.requests)
        with pytest.raises(DeadlineExceeded):
            made.infer(theatre.stage.model, {"image": IMAGE}, deadline_ms=0)
        assert len(theatre.requests) == before + 1


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that takes everything and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("target", [b"/ohttp", b"/.well-known/cloister"])
def test_nobody_waits_for_longer_than_allowed(silent, target):
    def ask() -> Flow[None]:
        try:
            yield Outgoing(method=b"POST", target=target, content=b"x" * 100_000)
        except TransportError:
            yield Pause(60)  # as a retry would, and the time is over

    async def asynchronously() -> None:
        other = AsyncCarrier(silent)
        try:
            await other.run(ask(), 0.3)
        finally:
            await other.aclose()

    carrier, began = Carrier(silent), time.monotonic()
    for run in (lambda: carrier.run(ask(), 0.3), lambda: asyncio.run(asynchronously())):
        with pytest.raises(TransportError) as caught:
            run()
        assert caught.value.code == "transport.timeout"
    assert 0.6 <= time.monotonic() - began < 5
    carrier.close()


def test_httpx_s_own_timeout_holds(theatre, silent):
    made = Client(silent, policy=theatre.stage.user_policy(), identity=USER)
    began = time.monotonic()
    plain = httpx.Client(transport=CloisterTransport(made), base_url="http://x", timeout=0.2)
    with plain, pytest.raises(httpx.ReadTimeout):
        plain.get(f"/v2/models/{theatre.stage.model}")
    assert time.monotonic() - began < 5


def test_refused_before_anything_is_sent_to_a_worker(theatre):
    with client(theatre, policy=theatre.stage.user_policy(worker=policy(STRANGER))) as made:
        with pytest.raises(AppraisalRefused):
            made.infer(theatre.stage.model, {"image": IMAGE})
        assert len(theatre.requests) == 2


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("no"),
        httpx.ReadTimeout("late"),
        httpx.RemoteProtocolError("odd"),
        RuntimeError("x"),
    ],
)
def test_foreign_errors_become_ours(theatre, error):
    def handle(request: httpx.Request) -> httpx.Response:
        raise error

    with (
        client(theatre, transport=httpx.MockTransport(handle)) as made,
        pytest.raises(TransportError) as caught,
    ):
        made.verify()
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("url", ["", "service", "ftp://service", "http://", "http://x:0", "http://[::1"])
def test_urls_that_are_none(theatre, url):
    with pytest.raises(UsageError):
        Client(url, policy=theatre.stage.user_policy())


def test_nobody_listens(theatre):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with Client(url, policy=theatre.stage.user_policy()) as made, pytest.raises(TransportError):
            made.verify()


@pytest.mark.asyncio
async def test_asynchronously(theatre):
    async with AsyncClient(
        URL,
        policy=theatre.stage.user_policy(),
        identity=USER,
        transport=theatre.async_transport(),
        now=theatre.realm.clock.now,
        aliases={"d": theatre.stage.model},
    ) as made:
        outputs = await made.infer("d", {"image": IMAGE})
        assert all(outputs[name].tobytes() == array.tobytes() for name, array in right().items())
        assert (await made.metadata("d"))["name"] == theatre.stage.model
        assert (await made.verify()).document.service == theatre.realm.id
        transport = AsyncCloisterTransport(made)
        async with httpx.AsyncClient(transport=transport, base_url="http://models") as sdk:
            answer = await sdk.post("/v2/models/d/infer", json=as_json())
            assert answer.status_code == 200, answer.text


def as_json() -> dict[str, object]:
    tensor = {"name": "image", "datatype": "FP32", "shape": list(IMAGE.shape), "data": IMAGE.tolist()}
    return {"inputs": [tensor]}


@pytest.mark.parametrize("inputs", [None, [IMAGE], IMAGE, {1: IMAGE}])
def test_inputs_that_are_no_arrays_by_name(theatre, inputs):
    with client(theatre) as made, pytest.raises(UsageError) as caught:
        made.infer(theatre.stage.model, inputs)
    assert caught.value.code == "request.inputs"


def test_another_datatype_is_named_as_numpy_does(theatre):
    with client(theatre) as made, pytest.raises(InvalidRequest) as caught:
        made.infer(theatre.stage.model, {"image": IMAGE.astype(np.float64)})
    assert (caught.value.expected, caught.value.actual) == ("float32 (FP32)", "float64")
    assert caught.value.hint == 'Convert the array with .astype("float32")'
    with client(theatre) as made, pytest.raises(InvalidRequest) as caught:
        made.infer(theatre.stage.model, {"image": IMAGE.astype(np.complex64)})
    assert "float32" in caught.value.expected
    assert ".astype(" in caught.value.hint


def sdk(theatre: Theatre, **options: object) -> httpx.Client:
    return httpx.Client(transport=CloisterTransport(client(theatre, **options)), base_url="http://models")


def test_any_sdk_that_takes_a_transport(theatre):
    with sdk(theatre) as made:
        answer = made.post(f"/v2/models/{theatre.stage.model}/infer", json=as_json())
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        wanted = next(iter(right().values()))
        assert np.allclose(answer.json()["outputs"][0]["data"], wanted.reshape(-1))
        assert made.get(f"/v2/models/{theatre.stage.model}").json()["name"] == theatre.stage.model


def test_aliases_through_a_transport(theatre):
    with sdk(theatre, aliases={"digits": theatre.stage.model}) as made:
        answer = made.post("/v2/models/digits/infer", json=as_json())
        assert answer.status_code == 200, answer.text
        assert made.get("/v2/models/digits/ready").json()["ready"] is True


def test_errors_through_a_transport(theatre):
    with sdk(theatre) as made:
        assert made.get("/other").status_code == 400
        assert made.get("/v2/models/nonesuch").status_code == 400
        answer = made.post(f"/v2/models/{theatre.stage.model}/infer", json={"inputs": []})
        assert (answer.status_code, answer.json()["code"]) == (400, "request.inputs")
        answer = made.get(f"/v2/models/{'0' * 64}/m")
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found.model")


def test_unavailability_through_a_transport_is_a_transport_error(theatre):
    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503)

    with sdk(theatre, transport=httpx.MockTransport(handle)) as made, pytest.raises(httpx.TransportError):
        made.get(f"/v2/models/{theatre.stage.model}")


def test_what_an_enclave_answers_has_its_status(theatre):
    """Only where nobody answered is there a transport error; the SDK knows what to do with a 429."""
    from cloister.errors import DeadlineExceeded, Overloaded

    for error, status in ((Overloaded("full"), 429), (DeadlineExceeded("late"), 504)):

        async def refuse(request, error=error):
            raise error

        theatre.stage.worker.server._handler = refuse
        with sdk(theatre) as made:
            answer = made.get(f"/v2/models/{theatre.stage.model}")
        assert (answer.status_code, answer.json()["error"]) == (status, error.message)


def test_a_transport_with_a_client_of_its_own(theatre, monkeypatch):
    closed = []
    monkeypatch.setattr(Client, "close", lambda self: closed.append(self))
    policy_ = theatre.stage.user_policy()
    transport = httpx_transport(URL, policy=policy_, identity=USER, aliases={"d": theatre.stage.model})
    assert isinstance(transport, CloisterTransport)
    with httpx.Client(transport=transport, base_url="http://models") as made:
        own = transport._client
        assert own.session.resolve("d") == theatre.stage.model
        assert made.get("/other").status_code == 400
    assert closed == [own]
    with pytest.raises(UsageError):
        httpx_transport("ftp://x", policy=policy_, identity=USER)


@pytest.mark.asyncio
async def test_an_asynchronous_transport_with_a_client_of_its_own(theatre, monkeypatch):
    closed = []
    real = AsyncClient.aclose

    async def closing(self):
        closed.append(self)
        await real(self)

    monkeypatch.setattr(AsyncClient, "aclose", closing)
    transport = async_httpx_transport(URL, policy=theatre.stage.user_policy(), identity=USER)
    async with httpx.AsyncClient(transport=transport, base_url="http://models") as made:
        assert (await made.get("/other")).status_code == 400
    assert closed == [transport._client]


def test_the_index_of_models(theatre):
    with client(theatre, aliases={"d": theatre.stage.model}) as made:
        assert [each["state"] for each in made.index("d")] == ["UNAVAILABLE"]
        made.infer("d", {"image": IMAGE})
        assert made.index("d") == [
            {"name": theatre.stage.model, "version": "1", "state": "READY", "reason": ""}
        ]
    stranger = Identity(Secret(b"s" * 32))
    with client(theatre, identity=stranger) as made, pytest.raises(AccessRefused) as caught:
        made.index(theatre.stage.model)
    assert caught.value.code == "access.grant"


def test_fields_of_the_outer_hop_stay_outside(theatre):
    seen = []
    routes = theatre.stage.routes

    async def seeing(request):
        seen.append(request.http)
        return await routes(request)

    theatre.stage.worker.server._handler = seeing
    with sdk(theatre) as made:
        made.post(f"/v2/models/{theatre.stage.model}/infer", json=as_json(), headers={"x-mine": "1"})
    names = {name for name, _ in seen[0].fields}
    assert b"x-mine" in names
    assert names.isdisjoint({b"host", b"user-agent", b"connection", b"accept-encoding", b"content-length"})
    for request in theatre.requests:
        assert "x-mine" not in request.headers
        assert b"x-mine" not in request.content


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        (None, {}),
        (b"", {}),
        (b"run;dur=1.5, open;dur=0", {"run": 1.5, "open": 0.0}),
        (b"run, x;dur=, y;dur=a, z;dur", {}),
        (b"\xff;dur=1", {"\ufffd": 1.0}),
    ],
)
def test_stages(field, wanted):
    assert parse_stages(field) == wanted


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        (None, 0),
        (b"", 0),
        (b"run;dur=1.5, batch;desc=4", 4),
        (b"batch;desc=12,run;dur=1", 12),
        (b"batch;desc=-1", 0),
        (b"batch;desc=", 0),
        (b"batch;desc=1000000", 0),
        ("batch;desc=\u0664".encode(), 0),
        (b"batches;desc=4", 0),
    ],
)
def test_requests_that_ran_together(field, wanted):
    assert parse_batch(field) == wanted


def test_errors_are_ours():
    assert issubclass(TransportError, CloisterError)
