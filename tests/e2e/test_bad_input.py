"""Bad input gets a clear error with a stable code, and breaks nothing for the next request."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import onnx
import pytest

from cloister.client.client import Client
from cloister.client.identity import Identity
from cloister.client.session import model_path
from cloister.core import oip
from cloister.core.ohttp import bhttp, encapsulation
from cloister.core.ohttp.keyconfig import select
from cloister.core.protocol.trust import UserPolicy
from cloister.errors import AccessRefused, FormatError, InvalidRequest, NotFound, Refused, UsageError
from cloister.owner.desk import Desk
from cloister.owner.policy import ModelPolicy
from e2e.impostor import Impostor
from e2e.malicious import refusal
from e2e.world import MODELS, World

OHTTP = {"content-type": "message/ohttp-req"}


@pytest.fixture
def client(service: World) -> Iterator[Client]:
    """A user's client. Whatever the test did, the next request must be answered rightly."""
    with service.client() as made:
        yield made
        assert service.serves(made)
        assert service.serves(made, "diagnosis")


# Tensors.


@pytest.mark.parametrize(
    ("inputs", "code", "claim"),
    [
        pytest.param(
            {"image": np.zeros((1, 1, 8, 9), np.float32)}, "request.shape", "shape of image", id="shape"
        ),
        pytest.param({"image": np.zeros((8, 8), np.float32)}, "request.shape", "shape of image", id="rank"),
        pytest.param(
            {"image": np.zeros((1, 1, 8, 8), np.float64)}, "request.datatype", "datatype of image", id="dtype"
        ),
        pytest.param({"image": np.array([["a"]])}, "request.datatype", "datatype of image", id="text"),
        pytest.param(
            {"picture": np.zeros((1, 1, 8, 8), np.float32)}, "request.inputs", "input names", id="name"
        ),
        pytest.param(
            {"image": np.zeros((1, 1, 8, 8), np.float32), "more": np.zeros(1, np.float32)},
            "request.inputs",
            "input names",
            id="one-too-many",
        ),
        pytest.param(
            {"image": np.zeros((1, 1, 8, 8), np.complex64)}, "request.datatype", "datatype", id="complex"
        ),
    ],
)
def test_wrong_tensors_are_refused(
    service: World, client: Client, inputs: dict[str, Any], code: str, claim: str
) -> None:
    error = refusal(lambda: client.infer(service.model("digits"), inputs))
    assert (type(error), error.code, error.claim) == (InvalidRequest, code, claim)
    assert error.expected
    assert error.actual


def test_no_tensor_at_all_is_refused(service: World, client: Client) -> None:
    assert refusal(lambda: client.infer(service.model("digits"), {})).code == "request.inputs"


def test_an_empty_batch_is_refused(service: World, client: Client) -> None:
    empty = {"image": np.zeros((0, 1, 8, 8), np.float32)}
    error = refusal(lambda: client.infer(service.model("digits"), empty))
    assert (type(error), error.code) == (InvalidRequest, "request.shape")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_computed_as_onnx_runtime_does(
    service: World, client: Client, value: float
) -> None:
    inputs = {"image": np.full((1, 1, 8, 8), value, np.float32)}
    outputs = client.infer(service.model("digits"), inputs)
    assert outputs["probabilities"].shape == (1, 10)


def test_an_unknown_output_is_refused(service: World, client: Client) -> None:
    inputs = service.sample("digits", 1)
    error = refusal(lambda: client.infer(service.model("digits"), inputs, outputs=("weights",)))
    assert (type(error), error.code) == (InvalidRequest, "request.outputs")


@pytest.mark.parametrize(
    "model", ["", "digits", "../../etc/passwd", "zz" * 32 + "/digits", "ab" * 32 + "/UPPER"]
)
def test_a_model_id_that_is_none_is_refused(client: Client, model: str) -> None:
    assert isinstance(refusal(lambda: client.infer(model, {})), UsageError)


def test_a_model_that_nobody_published_is_refused(service: World, client: Client) -> None:
    absent = service.desk.model_id("absent")
    error = refusal(lambda: client.infer(absent, service.sample("digits", 1)))
    assert (type(error), error.code) == (NotFound, "not-found.model")


@pytest.mark.parametrize(
    ("content", "length", "code"),
    [
        pytest.param(b"", None, "request.header", id="empty"),
        pytest.param(b"\xff\xfe garbage", None, "request.header", id="garbage"),
        pytest.param(b"[]", None, "request.header", id="a-list"),
        pytest.param(b"{}", None, "request.inputs", id="no-inputs"),
        pytest.param(b"{}", b"999", "request.header", id="header-too-long"),
        pytest.param(b"{}", b"-1", "request.header", id="header-negative"),
        pytest.param(b"[" * 200_000, None, "request.header", id="deep"),
        pytest.param(
            b'{"inputs":[{"name":"image","shape":[1,1,8,8],"datatype":"FP32","data":[NaN]}]}',
            None,
            "request.shape",
            id="too-few",
        ),
        pytest.param(
            b'{"inputs":[{"name":"image","shape":[1099511627776,1099511627776],"datatype":"FP32","data":[1]}]}',
            None,
            "request.",
            id="huge-shape",
        ),
        pytest.param(
            b'{"inputs":[{"name":"image","shape":[1,1,8,8],"datatype":"FP99","data":[1]}]}',
            None,
            "request.datatype",
            id="unknown-datatype",
        ),
    ],
)
def test_a_body_that_is_no_inference_request_is_refused(
    service: World, client: Client, content: bytes, length: bytes | None, code: str
) -> None:
    model = service.model("digits")
    fields = () if length is None else ((oip.HEADER_LENGTH, length),)
    inner = bhttp.Request(method=b"POST", path=model_path(model, "infer"), fields=fields, content=content)
    error = refusal(lambda: client.send(model, inner))
    assert isinstance(error, InvalidRequest)
    assert error.code.startswith(code)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        (b"GET", b"/"),
        (b"DELETE", b"/v2/models/x"),
        (b"POST", b"/v2/models//infer"),
        (b"GET", b"/v2/models/%ff"),
    ],
)
def test_a_route_that_is_none_is_refused(service: World, client: Client, method: bytes, path: bytes) -> None:
    inner = bhttp.Request(method=method, path=path)
    error = refusal(lambda: client.send(service.model("digits"), inner))
    assert isinstance(error, NotFound | Refused | FormatError)
    assert error.code != "internal"


def test_an_inner_request_that_is_none_is_refused_inside(service: World, client: Client) -> None:
    configuration, suite = select(service.verified().document.pool(service.pool).keys)
    for plaintext in (b"", b"\xff" * 100, bytes(64)):
        sealer = encapsulation.begin(configuration, suite)
        got = post(service, bytes(sealer.seal(plaintext)))
        assert got.status_code == 200
        response = bhttp.Response.from_bytes(sealer.open(got.content))
        assert response.status == 400
        assert json.loads(bytes(response.content))["code"] != "internal"


# Outer bodies.


def post(service: World, body: bytes, **fields: str) -> httpx.Response:
    headers = {**OHTTP, "cloister-pool": service.pool.hex(), **fields}
    return httpx.post(f"{service.url}/ohttp", content=body, headers=headers, trust_env=False)


@pytest.mark.parametrize("size", [0, 1, 6, 7, 100, 1142])
@pytest.mark.parametrize("pool", ["pool", "key-service"])
def test_a_body_that_is_no_encapsulation_is_refused(
    service: World, client: Client, size: int, pool: str
) -> None:
    name = service.pool.hex() if pool == "pool" else pool
    got = post(service, os.urandom(size), **{"cloister-pool": name})
    assert got.status_code == 400
    assert got.json()["code"].startswith("ohttp.")


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"content-type": "application/json"}, 415, "gateway.content-type"),
        ({"cloister-pool": "00" * 32}, 404, "gateway.no-pool"),
        ({"cloister-pool": "../../x"}, 404, "gateway.no-pool"),
        ({"cloister-pool": ""}, 400, "gateway.pool"),
    ],
)
def test_an_outer_request_that_fits_nothing_is_refused(
    service: World, client: Client, fields: dict[str, str], status: int, code: str
) -> None:
    got = post(service, b"x" * 2000, **fields)
    assert got.status_code == status
    assert code in got.text


def test_a_declared_gibibyte_is_refused_before_it_is_sent(service: World, client: Client) -> None:
    head = (
        f"POST /ohttp HTTP/1.1\r\nhost: x\r\ncontent-type: message/ohttp-req\r\n"
        f"cloister-pool: {service.pool.hex()}\r\ncontent-length: {1 << 30}\r\n\r\n"
    )
    parts = urlsplit(service.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as link:
        link.sendall(head.encode())
        answer = link.recv(4096)
    assert answer.split(b" ")[1] == b"413"


def test_an_input_of_a_gibibyte_is_refused_by_the_clients_own_hand(service: World, client: Client) -> None:
    huge = np.zeros((1 << 22, 1, 8, 8), np.float32)  # 1 GiB, of which nothing is touched
    error = refusal(lambda: client.infer(service.model("digits"), {"image": huge}))
    assert (type(error), error.code) == (InvalidRequest, "request.size")


def test_a_slow_head_and_a_body_that_never_comes_hold_nobody_up(service: World, client: Client) -> None:
    parts = urlsplit(service.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as link:
        link.sendall(b"POST /ohttp HTTP/1.1\r\nhost: x\r\ncontent-le")
        assert service.serves(client)
        link.sendall(b"ngth: 100\r\ncontent-type: message/ohttp-req\r\n\r\n12345")
        assert service.serves(client)


@pytest.mark.parametrize("path", [b"/challenges", b"/possession", b"/releases", b"/statements", b"/pools"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"\xa0", b"\xbf\xff", b"\x9f" * 3000, b"\x1b" + b"\xff" * 8]
)
def test_garbage_messages_to_the_key_service_are_refused(
    service: World, client: Client, path: bytes, content: bytes
) -> None:
    error = refusal(lambda: Impostor(service).ask(path, content))
    assert isinstance(error, FormatError | AccessRefused | NotFound)
    assert error.code != "internal"


# Model files.


def model_file(folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(MODELS / "digits.onnx")
    change(model)
    path = folder / "changed.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_a_file_that_is_no_onnx_model_is_refused(service: World, tmp_path: Path) -> None:
    for content in (b"", b"not a model", os.urandom(4096), b"\x08\x07"):
        path = tmp_path / "x.onnx"
        path.write_bytes(content)
        error = refusal(lambda path=path: service.seal("broken", path))  # type: ignore[misc]
        assert isinstance(error, UsageError)
        assert error.code.startswith("model.")
    assert "broken" not in service.desk.models()


def test_an_unknown_operator_is_refused(service: World, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "Frobnicate"

    error = refusal(lambda: service.seal("broken", model_file(tmp_path, change)))
    assert isinstance(error, UsageError)
    assert error.code.startswith("model.")
    assert "Frobnicate" in str(error)


def test_a_custom_operator_domain_is_refused(service: World, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].domain = "evil.example"
        model.opset_import.append(onnx.helper.make_opsetid("evil.example", 1))

    error = refusal(lambda: service.seal("broken", model_file(tmp_path, change)))
    assert error.code.startswith("model.")


def test_external_data_is_refused(service: World, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="/etc/passwd")

    assert refusal(lambda: service.seal("broken", model_file(tmp_path, change))).code.startswith("model.")


def test_a_model_file_that_is_not_there_is_refused(service: World, tmp_path: Path) -> None:
    error = refusal(lambda: service.seal("broken", tmp_path / "absent.onnx"))
    assert isinstance(error, UsageError)


# Policy files and key files.


@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param(lambda text: text.replace("max_age = ", "max_age = nan # "), "policy.max_age", id="nan"),
        pytest.param(
            lambda text: text.replace("isv_prod_id = ", "isv_prod_id = inf # "),
            "policy.isv_prod_id",
            id="inf",
        ),
        pytest.param(
            lambda text: text.replace("max_age = ", "max_age = 1.5 # "), "policy.max_age", id="fraction"
        ),
        pytest.param(lambda text: text[: len(text) // 2], "policy.", id="truncated"),
        pytest.param(lambda text: "= = =", "policy.format", id="no-toml"),
        pytest.param(lambda text: text + "\nextra = 1\n", "policy.", id="unknown-key"),
        pytest.param(lambda text: "a = [" * 10_000, "policy.format", id="deep"),
        pytest.param(lambda text: "", "policy.keys", id="empty"),
        pytest.param(lambda text: text.replace('tee = "sgx"', 'tee = "any"'), "policy.tee", id="unknown-tee"),
        pytest.param(
            lambda text: text.replace("mr_enclave = [", 'mr_enclave = ["00", '),
            "policy.mr_enclave",
            id="short",
        ),
    ],
)
def test_a_malformed_policy_is_refused(service: World, change: Callable[[str], str], code: str) -> None:
    for text, kind in (
        (service.site.user_policy.read_text(), UserPolicy),
        (service.site.model_policy.read_text(), ModelPolicy),
    ):
        error = refusal(lambda text=text, kind=kind: kind.from_toml(change(text)))  # type: ignore[misc]
        assert isinstance(error, UsageError)
        assert error.code.startswith(code)


@pytest.mark.parametrize(
    "content", [None, b"", b"nonsense", b"\xff\xfe\0", b"cloister-user-secret-v1 AAAA\n"]
)
def test_an_unreadable_identity_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "user.identity"
    if content is not None:
        path.write_bytes(content)
    error = refusal(lambda: Identity.load(path))
    code = "identity.file" if content is None else "identity.format"
    assert (type(error), error.code) == (UsageError, code)


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"\xff\xfe\0", b"cloister-owner-key-v1 AAAA\n"])
def test_an_unreadable_owner_key_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "owner.key").write_bytes(content)
    error = refusal(lambda: Desk.open(tmp_path))
    assert (type(error), error.code) == (UsageError, "owner.key")


def test_a_damaged_memory_is_refused(service: World, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    with service.client(memory=path) as made:
        made.verify()
    kept = path.read_bytes()
    for content in (b"", b"nonsense", kept[:-1], kept[:40] + bytes([kept[40] ^ 1]) + kept[41:]):
        path.write_bytes(content)
        error = refusal(lambda: service.client(memory=path))
        assert error.code != "error"
    path.write_bytes(kept)
    with service.client(memory=path) as made:
        assert service.serves(made)


def test_a_policy_for_another_service_is_refused(service: World) -> None:
    policy = replace(service.user_policy, service=os.urandom(32))
    with service.client(policy=policy) as made:
        assert refusal(made.verify).code == "binding.service"
