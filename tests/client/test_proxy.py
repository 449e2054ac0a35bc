"""The proxy over REST and gRPC, before a service in this process."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import stat
import zlib
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import httpx
import numpy as np
import onnxruntime as ort
import pytest

from cloister.client.client import AsyncClient
from cloister.client.proxy import page
from cloister.client.proxy.listen import bind
from cloister.client.proxy.messages import SERVICE, message
from cloister.client.proxy.room import Room
from cloister.client.proxy.server import Places, Proxy
from cloister.core import oip
from cloister.core.times import time_text
from cloister.core.verifier.result import Step
from cloister.errors import AppraisalRefused, TransportError, UsageError
from support.realm import STRANGER, policy
from support.stage import DIGITS, IMAGE, USER

pytestmark = pytest.mark.asyncio
ANY = Places(rest=0, grpc=0)


def made_client(theatre, **options):
    return AsyncClient(
        "http://service.test",
        **{
            "policy": theatre.stage.user_policy(),
            "identity": USER,
            "transport": theatre.async_transport(),
            "now": theatre.realm.clock.now,
            **options,
        },
    )


@asynccontextmanager
async def running(theatre, places=ANY, **options):
    """A proxy, an HTTP client of it, and a gRPC channel to it."""
    async with (
        Proxy(made_client(theatre, **options), places, grace=5) as proxy,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.rest_port}", trust_env=False) as rest,
        grpc.aio.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel,
    ):
        yield proxy, rest, channel


async def call(channel, method, **fields):
    made = message(f"{method}Request")(**fields)
    raw = await channel.unary_unary(f"/{SERVICE}/{method}")(made.SerializeToString(), timeout=20)
    return message(f"{method}Response").FromString(raw)


def right():
    session = ort.InferenceSession(DIGITS, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": IMAGE}), strict=True))


def json_body(**more):
    data = IMAGE.reshape(-1).tolist()
    tensor = {"name": "image", "datatype": "FP32", "shape": list(IMAGE.shape), "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


def rpc_request(name):
    made = message("ModelInferRequest")(model_name=name, id="7")
    made.inputs.add(name="image", datatype="FP32", shape=IMAGE.shape)
    made.raw_input_contents.append(IMAGE.tobytes())
    return made


def error_of(response):
    (name, text), *rest = response.json().items()
    assert (name, rest) == ("error", [])
    assert text.startswith(response.headers["cloister-error"] + ": ")
    return response.status_code, response.headers["cloister-error"]


# Refusals.


@pytest.mark.parametrize(
    ("field", "code"),
    [
        ({"host": "evil.example"}, "proxy.host"),
        ({"origin": "https://evil.example"}, "proxy.origin"),
        ({"sec-fetch-site": "cross-site"}, "proxy.origin"),
    ],
)
async def test_a_web_page_gets_nothing_and_sends_nothing(theatre, field, code):
    async with running(theatre) as (_, rest, _):
        before = len(theatre.requests)
        for method, path in (
            ("GET", "/v2"),
            ("GET", "/verification"),
            ("POST", "/v2/models/digits/infer"),
            ("OPTIONS", "/v2/models/digits/infer"),
        ):
            response = await rest.request(method, path, headers=field)
            assert error_of(response) == (403, code)
            assert not any(name.startswith("access-control") for name in response.headers)
        assert len(theatre.requests) == before


async def test_bodies_that_are_too_large_are_refused(theatre):
    async with running(theatre) as (proxy, rest, _):
        proxy.forwarder.room = Room(max_body=1000)
        before = len(theatre.requests)

        async def chunks():
            for _ in range(20):
                yield bytes(100)

        path = "/v2/models/digits/infer"
        assert error_of(await rest.post(path, content=bytes(1001))) == (413, "request.size")
        assert error_of(await rest.post(path, content=chunks())) == (413, "request.size")
        bomb = gzip.compress(bytes(1 << 20))
        assert len(bomb) > 1000
        bomb = zlib.compress(bytes(100_000), 9)
        headers = {"content-encoding": "deflate"}
        assert error_of(await rest.post(path, content=bomb, headers=headers)) == (413, "request.size")
        for coding, body in (("br", b"x"), ("gzip", b"no gzip")):
            response = await rest.post(path, content=body, headers={"content-encoding": coding})
            assert error_of(response) == (415, "proxy.encoding")
        assert len(theatre.requests) == before
        proxy.forwarder.room = Room(max_requests=0)
        assert error_of(await rest.post(path, content=b"x")) == (429, "overloaded.proxy")


async def test_a_length_that_lies_ends_the_connection(theatre):
    async with running(theatre) as (proxy, _, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.rest_port)
        writer.write(
            b"POST /v2/models/digits/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in await reader.readline()
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.rest_port)
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * (70 << 10) + b"\r\n\r\n")
        assert b" 400 " in await reader.readline()
        writer.close()


async def test_a_body_that_does_not_come_takes_no_room_from_others(theatre):
    async with running(theatre) as (proxy, rest, _):
        proxy.forwarder.room = Room(max_bytes=100_000, max_body=100_000)
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.rest_port)
        writer.write(
            b"POST /v2/models/digits/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\nx"
        )
        await writer.drain()
        await asyncio.sleep(0.3)  # its place is taken; were its bytes too, the next would be refused
        assert proxy.forwarder.room._requests == 1
        response = await rest.post("/v2/models/digits/infer", content=b"{" * 50_000)
        assert error_of(response) == (400, "request.header"), (
            "an answer of the enclave's, not the proxy's 429"
        )
        writer.close()


async def test_an_alias_for_a_model_that_is_not_served_stops_the_start(theatre):
    aliases = {"digits": f"{theatre.stage.model}x"}
    proxy = Proxy(made_client(theatre, aliases=aliases), ANY)
    with pytest.raises(UsageError) as refused:
        await proxy.start()
    assert refused.value.code == "proxy.alias"
    assert proxy._listener is None


async def test_extensions_are_those_that_are_served(theatre):
    async with running(theatre) as (_, rest, _):
        assert (await rest.get("/v2")).json()["extensions"] == ["binary_tensor_data"]


@pytest.mark.parametrize("part", ["key_service", "worker"])
async def test_a_proxy_for_which_the_verification_fails_does_not_listen(theatre, part):
    wrong = theatre.stage.user_policy(**{part: policy(STRANGER)})
    sockets, port = bind(("127.0.0.1",), 0)
    for each in sockets:
        each.close()
    proxy = Proxy(made_client(theatre, policy=wrong), Places(rest=port, grpc=0))
    with pytest.raises(AppraisalRefused) as refused:
        await proxy.start()
    assert "mr_enclave" in (refused.value.claim, refused.value.code.partition(".")[2])
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_service_that_is_not_there_stops_the_start(theatre):
    def lost(request):
        raise httpx.ConnectError("gone")

    with pytest.raises(TransportError):
        await Proxy(made_client(theatre, transport=httpx.MockTransport(lost)), ANY).start()


async def test_a_port_that_is_taken_stops_the_start_and_leaves_nothing_open(theatre):
    sockets, port = bind(("127.0.0.1",), 0)
    sockets[0].listen()
    for places in (Places(rest=port, grpc=0), Places(rest=0, grpc=port)):
        proxy = Proxy(made_client(theatre), places)
        with pytest.raises(UsageError) as refused:
            await proxy.start()
        assert refused.value.code == "net.listen"
        if proxy.rest_port:
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", proxy.rest_port)
    sockets[0].close()


async def test_a_user_without_a_grant_gets_the_enclaves_word(theatre):
    from cloister.client.identity import Identity
    from cloister.core.secret import Secret

    async with running(theatre, identity=Identity(Secret(b"s" * 32))) as (_, rest, channel):
        response = await rest.post("/v2/models/digits/infer", content=json_body())
        status, code = error_of(response)
        assert status == 403
        assert code.startswith("access.")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(channel, "ModelMetadata", name="digits")
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert refused.value.details().startswith(f"{code}: ")
        assert dict(refused.value.trailing_metadata())["cloister-error"] == code


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v2/models/nonesuch", (404, "not-found.model")),
        ("GET", "/v2/models/digits/config", (404, "not-found.route")),
        ("GET", "/v2/models/digits/infer", (405, "proxy.method")),
        ("POST", "/v2/models/digits", (405, "proxy.method")),
        ("GET", "/v2/models/digits/versions/2", (404, "not-found.version")),
        ("POST", "/v2/models/digits/versions/x/infer", (404, "not-found.version")),
        ("POST", "/v2/models/digits/infer", (400, "request.header")),
    ],
)
async def test_errors_have_the_protocols_form(theatre, method, path, expected):
    async with running(theatre) as (_, rest, _):
        response = await rest.request(method, path)
        assert error_of(response) == expected


@pytest.mark.parametrize("path", ["/", "/v2/repository/index", "/x", "/v2/models", "/metrics", "/ohttp"])
async def test_there_are_no_other_paths(theatre, path):
    async with running(theatre) as (_, rest, _):
        response = await rest.post(path)
        assert response.status_code in (404, 405)
        assert list(response.json()) == ["error"]


async def test_what_nobody_foresaw_is_neither_told_nor_logged(theatre, monkeypatch, caplog):
    async with running(theatre) as (proxy, rest, channel):

        async def fail(*args):
            raise RuntimeError("SECRET")

        monkeypatch.setattr(type(proxy.forwarder), "send", fail)
        with caplog.at_level(logging.DEBUG):
            response = await rest.post("/v2/models/digits/infer", content=json_body())
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(channel, "ServerMetadata")
        assert response.status_code == 500
        assert refused.value.code() == grpc.StatusCode.INTERNAL
        for text in (response.text, refused.value.details(), caplog.text):
            assert "SECRET" not in text
        assert "RuntimeError" in caplog.text


async def test_a_service_that_is_lost_is_unavailable_and_no_longer_ready(theatre):
    inner = theatre.async_transport()
    up = True

    async def handle(request):
        if not up:
            raise httpx.ConnectError("gone")
        return await inner.handle_async_request(request)

    skew = 0

    def now():
        return theatre.realm.clock.now() + skew

    async with running(theatre, transport=httpx.MockTransport(handle), now=now) as (proxy, rest, channel):
        up = False
        assert (await rest.get("/v2/health/ready")).status_code == 200  # the document still holds
        response = await rest.get("/v2/models/digits")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        session = proxy.forwarder.client.session
        skew = session.conversation.current().not_after - theatre.realm.clock.now() + 1
        response = await rest.get("/v2/health/ready")
        assert (response.status_code, response.json()) == (400, {"ready": False})
        assert not (await call(channel, "ServerReady")).ready
        assert (await call(channel, "ServerLive")).live
        assert (await rest.get("/v2/health/live")).status_code == 200
        assert "Nothing is sent" in (await rest.get("/verification")).text
        assert (await rest.get("/verification.json")).json()["fresh"] is False


# What works.


async def test_json_and_binary_by_every_name(theatre):
    wanted = right()
    model = theatre.stage.model
    async with running(theatre, aliases={"short": model}) as (_, rest, _):
        for name in (model, model.replace("/", "%2F"), "short", "digits", "digits/versions/1"):
            response = await rest.post(f"/v2/models/{name}/infer", content=json_body(id="7"))
            assert response.status_code == 200, response.text
            assert response.json()["id"] == "7"
            found = oip.decode_response(memoryview(response.content), header_of(response))
            same(found, wanted)
            assert "run;dur=" in response.headers["server-timing"]
            for action in ("", "/ready"):
                answer = (await rest.get(f"/v2/models/{name}{action}")).json()
                assert answer["name"] == model
        head, buffers = oip.encode_request({"image": IMAGE})
        headers = {"inference-header-content-length": str(len(head)), "expect": "100-continue"}
        body = b"".join((head, *buffers))
        response = await rest.post("/v2/models/digits/infer", content=body, headers=headers)
        same(oip.decode_response(memoryview(response.content), header_of(response)), wanted)
        for coding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
            coded = {**headers, "content-encoding": coding, "accept-encoding": coding}
            response = await rest.post("/v2/models/digits/infer", content=pack(body), headers=coded)
            assert response.headers["content-encoding"] == coding
            same(oip.decode_response(memoryview(response.content), header_of(response)), wanted)
        assert (await rest.get("/v2")).json()["name"] == "cloister"


def header_of(response):
    value = response.headers.get("inference-header-content-length")
    return value.encode() if value else None


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.array_equal(found[name], array)


async def test_fields_of_the_local_hop_stay_outside(theatre, monkeypatch):
    """Cookies, credentials and addresses of the local program are nobody's business."""
    seen = []
    async with running(theatre) as (proxy, rest, _):
        send = proxy.forwarder.client.send

        async def spy(model, inner):
            seen.append(inner)
            return await send(model, inner)

        monkeypatch.setattr(proxy.forwarder.client, "send", spy)
        headers = {
            "cookie": "a=b",
            "authorization": "Bearer x",
            "cloister-authorization": "x",
            "x-forwarded-for": "1",
            "content-type": "application/json",
            "cloister-deadline-ms": "5000",
        }
        response = await rest.post("/v2/models/digits/infer?x=y", content=json_body(), headers=headers)
        assert response.status_code == 200
        assert dict(seen[-1].fields) == {
            b"content-type": b"application/json",
            b"cloister-deadline-ms": b"5000",
        }
        assert b"?" not in seen[-1].path


async def test_grpc(theatre):
    async with running(theatre) as (_, _, channel):
        assert (await call(channel, "ServerLive")).live
        assert (await call(channel, "ServerReady")).ready
        found = await call(channel, "ServerMetadata")
        assert (found.name, list(found.extensions)) == ("cloister", ["binary_tensor_data"])
        assert (await call(channel, "ModelReady", name="digits", version="1")).ready
        assert not (await call(channel, "ModelReady", name="nonesuch")).ready
        found = await call(channel, "ModelMetadata", name=theatre.stage.model)
        assert (found.name, found.inputs[0].name) == (theatre.stage.model, "image")
        raw = await channel.unary_unary(f"/{SERVICE}/ModelInfer")(rpc_request("digits").SerializeToString())
        answer = message("ModelInferResponse").FromString(raw)
        wanted = right()
        assert answer.id == "7"
        assert [each.name for each in answer.outputs] == list(wanted)
        for raw, array in zip(answer.raw_output_contents, wanted.values(), strict=True):
            assert raw == array.tobytes()


@pytest.mark.parametrize(
    ("method", "raw", "code"),
    [
        ("ModelInfer", b"\xff", "INVALID_ARGUMENT"),
        ("ModelInfer", b"", "NOT_FOUND"),
        ("ModelMetadata", message("ModelMetadataRequest")(name="nonesuch").SerializeToString(), "NOT_FOUND"),
        (
            "ModelMetadata",
            message("ModelMetadataRequest")(name="digits", version="../x").SerializeToString(),
            "NOT_FOUND",
        ),
        ("RepositoryIndex", b"", "UNIMPLEMENTED"),
        ("ModelStreamInfer", b"", "UNIMPLEMENTED"),
        ("ModelConfig", b"", "UNIMPLEMENTED"),
    ],
)
async def test_grpc_errors(theatre, method, raw, code):
    async with running(theatre) as (_, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(f"/{SERVICE}/{method}")(raw)
        assert refused.value.code().name == code


async def test_a_compressed_bomb_over_grpc_is_refused(theatre, monkeypatch):
    from cloister.client.proxy import rpc

    monkeypatch.setattr(rpc, "MAX_INNER_REQUEST", 0)  # 1 MiB is left
    async with running(theatre) as (proxy, _, _):
        made = message("ModelInferRequest")(model_name="digits", raw_input_contents=[bytes(8 << 20)])
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{proxy.grpc_port}", compression=grpc.Compression.Gzip
        ) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(f"/{SERVICE}/ModelInfer")(made.SerializeToString())
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_the_record_as_page_and_as_json(theatre):
    async with running(theatre) as (proxy, rest, _):
        await rest.post("/v2/models/digits/infer", content=json_body())
        conversation = proxy.forwarder.client.session.conversation
        evil = Step(name="<script>alert(1)</script>", outcome='"&', detail="\x1b[31m\u202e")
        conversation.steps = (*conversation.steps, evil)
        response = await rest.get("/verification")
        text = response.text
        assert response.headers["content-type"].startswith("text/html")
        assert response.headers["content-security-policy"].startswith(
            "default-src 'none'; style-src 'sha256-"
        )
        assert "<script>" not in text
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert not re.search(r"(src|href|url|import)\s*[=(]|https?:", text)
        session = proxy.forwarder.client.session
        evidence = conversation.current().attested.evidence
        assert f"<td>valid until</td><td>ok</td><td>{time_text(evidence.not_after)}</td>" in text
        assert not re.search(r"\b\d{10}\b", text)
        for shown in (theatre.realm.id.hex(), evidence.measurement.hex(), theatre.stage.model, "possession"):
            assert shown in text
        found = (await rest.get("/verification.json")).json()
        assert found == (await rest.get("/verification", headers={"accept": "application/json"})).json()
        assert found == json.loads(json.dumps(page.facts(proxy.forwarder)))
        assert (found["fresh"], found["verified_at"]) == (True, session.now())
        assert found["pools"][0]["accepted"]
        assert found["aliases"] == {"digits": theatre.stage.model}
        assert "run" in found["stages_ms"]


async def test_requests_in_progress_finish_and_others_are_not_taken(theatre, monkeypatch):
    proxy = Proxy(made_client(theatre), ANY, grace=5)
    await proxy.start()
    entered, go = asyncio.Event(), asyncio.Event()
    send = proxy.forwarder.client.send

    async def slow(model, inner):
        entered.set()
        await go.wait()
        return await send(model, inner)

    monkeypatch.setattr(proxy.forwarder.client, "send", slow)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.rest_port}", trust_env=False) as rest:
        asking = asyncio.create_task(rest.get("/v2/models/digits"))
        await entered.wait()
        ending = asyncio.create_task(proxy.stop())
        await asyncio.sleep(0.05)
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", proxy.rest_port)
        assert not ending.done()
        go.set()
        assert (await asking).status_code == 200
        await ending


async def test_the_end_is_bounded(theatre, monkeypatch):
    proxy = Proxy(made_client(theatre), ANY, grace=0.1)
    await proxy.start()
    entered = asyncio.Event()

    async def never(model, inner):
        entered.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(proxy.forwarder.client, "send", never)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.rest_port}", trust_env=False) as rest:
        asking = asyncio.create_task(rest.get("/v2/models/digits"))
        await entered.wait()
        async with asyncio.timeout(5):
            await proxy.stop()
        with pytest.raises(httpx.HTTPError):
            await asking


async def test_a_unix_socket_that_only_this_user_can_reach(theatre, tmp_path):
    path = tmp_path / "p.sock"
    async with Proxy(made_client(theatre), Places(unix=path, grpc=None), grace=5) as proxy:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (proxy.rest_port, proxy.grpc_port) == (0, 0)
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as rest:
            assert (await rest.get("/v2/models/digits/ready")).json()["ready"] is True
    assert not path.exists()


async def test_only_loopback_is_bound(theatre):
    async with running(theatre) as (proxy, _, _):
        assert proxy._listener is not None
        names = {each._listener.getsockname()[0] for each in proxy._listener._acceptors}
        assert "127.0.0.1" in names
        assert names <= {"127.0.0.1", "::1"}
