"""Unmodified Open Inference Protocol clients through ``cloister proxy``, before a real service.

One model per datatype gives back what it takes, so any change on the way shows.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cloister.core import oip
from e2e.world import DAY, World, world

triton_http: Any = pytest.importorskip("tritonclient.http")
triton_grpc: Any = pytest.importorskip("tritonclient.grpc")
ml_dtypes: Any = pytest.importorskip("ml_dtypes")

TYPES: Final[dict[str, tuple[int, Any]]] = {
    "BOOL": (TensorProto.BOOL, np.array([[True, False, True], [False, False, True]])),
    "UINT8": (TensorProto.UINT8, np.array([[0, 1, 2], [253, 254, 255]], np.uint8)),
    "UINT16": (TensorProto.UINT16, np.array([[0, 1, 2], [3, 65534, 65535]], np.uint16)),
    "UINT32": (TensorProto.UINT32, np.array([[0, 1, 2], [3, 4, (1 << 32) - 1]], np.uint32)),
    "UINT64": (TensorProto.UINT64, np.array([[0, 1, 2], [3, 1 << 53, (1 << 64) - 1]], np.uint64)),
    "INT8": (TensorProto.INT8, np.array([[-128, -1, 0], [1, 126, 127]], np.int8)),
    "INT16": (TensorProto.INT16, np.array([[-(1 << 15), -1, 0], [1, 2, (1 << 15) - 1]], np.int16)),
    "INT32": (TensorProto.INT32, np.array([[-(1 << 31), -1, 0], [1, 2, (1 << 31) - 1]], np.int32)),
    "INT64": (TensorProto.INT64, np.array([[-(1 << 63), -1, 0], [1, 2, (1 << 63) - 1]], np.int64)),
    "FP16": (TensorProto.FLOAT16, np.array([[-65504, -0.5, 0], [1, 6e-8, 65504]], np.float16)),
    "BF16": (TensorProto.BFLOAT16, np.array([[-3e38, -0.5, 0], [1, 1e-30, 3e38]], ml_dtypes.bfloat16)),
    "FP32": (TensorProto.FLOAT, np.array([[-3e38, -0.5, 0], [1, 1e-30, 3e38]], np.float32)),
    "FP64": (TensorProto.DOUBLE, np.array([[-1e300, -0.1, 0], [1, 1e-300, 1e300]], np.float64)),
    "BYTES": (
        TensorProto.STRING,
        np.array([[b"", b"one", "zwei \u2713".encode()], [b"a\nb", b"\x00", b"x" * 1000]], object),
    ),
}
SERVED: Final = [name for name in TYPES if name in oip.DTYPES]
MODES: Final = ["binary", "json", "gzip", "deflate"]


def echo(path: Path, *kinds: int) -> Path:
    """A model that gives each input back: ``x0`` as ``y0``, and so on."""
    shape = ["rows", "columns"]
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"x{at}"], [f"y{at}"]) for at in range(len(kinds))],
        "echo",
        [helper.make_tensor_value_info(f"x{at}", kind, shape) for at, kind in enumerate(kinds)],
        [helper.make_tensor_value_info(f"y{at}", kind, shape) for at, kind in enumerate(kinds)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


def publish(service: World, name: str, source: Path) -> None:
    service.seal(name, source)
    with service.publisher() as publisher:
        publisher.publish(name, service.model_policy, service.sealed(name), pool=service.pool)
        publisher.grant(name, service.user.user_id(service.desk.owner), int(time.time()) + DAY)


def command(service: World, *options: str, identity: str = "user", policy: Path | None = None) -> list[str]:
    return [
        *(sys.executable, "-m", "cloister.cli", "proxy", service.url),
        *("--policy", str(policy or service.site.user_policy)),
        *("--identity", str(service.root / identity / "user.identity")),
        *(() if "--unix" in options else ("--rest-port", "0")),
        *("--grpc-port", "0", "--json", *options),
    ]


@contextmanager
def proxy(service: World, *options: str, identity: str = "user") -> Iterator[dict[str, Any]]:
    """A proxy in a process of its own; gives what it printed. It ends by SIGTERM, in silence."""
    process = subprocess.Popen(
        command(service, *options, identity=identity),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate(timeout=20)[1]
        yield {**json.loads(line), "pid": process.pid}
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.fixture(scope="module")
def service(shared_root: Path) -> Iterator[World]:
    """One worker; a model for each datatype, and one with two inputs."""
    with world(shared_root / "p", workers=1, lease_seconds=30) as made:
        for name in SERVED:
            publish(made, name.lower(), echo(made.root / f"{name}.onnx", TYPES[name][0]))
        publish(made, "pair", echo(made.root / "pair.onnx", TensorProto.FLOAT, TensorProto.INT64))
        yield made


@pytest.fixture(scope="module")
def local(service: World) -> Iterator[dict[str, Any]]:
    with proxy(service) as made:
        yield made


def host_of(local: dict[str, Any]) -> str:
    return str(local["rest"]).removeprefix("http://")


def require_served(datatype: str) -> None:
    if datatype not in SERVED:
        pytest.xfail(f"the inner side has no {datatype} yet")


def same(found: Any, array: Any) -> bool:
    """Bit for bit; BYTES as bytes."""
    if array.dtype == object:
        return [bytes(each) for each in found.reshape(-1)] == array.reshape(-1).tolist()
    return found.dtype == array.dtype and found.tobytes() == array.tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("datatype", TYPES)
def test_tritons_http_client(local: dict[str, Any], datatype: str, mode: str) -> None:
    require_served(datatype)
    if (datatype, mode) == ("BF16", "json"):
        pytest.skip("tritonclient sends BF16 in binary only")
    _, array = TYPES[datatype]
    binary = mode != "json"
    packed = {"request_compression_algorithm": mode, "response_compression_algorithm": mode}
    with triton_http.InferenceServerClient(host_of(local)) as client:
        for each in (array, array[:1]):
            tensor = triton_http.InferInput("x0", list(each.shape), datatype)
            tensor.set_data_from_numpy(each, binary_data=binary)
            wanted = triton_http.InferRequestedOutput("y0", binary_data=binary)
            options = packed if mode in ("gzip", "deflate") else {}
            found = client.infer(datatype.lower(), [tensor], outputs=[wanted], request_id="seven", **options)
            assert found.get_response()["id"] == "seven"
            assert found.get_output("y0")["datatype"] == datatype
            got = found.as_numpy("y0")
            assert got.shape == each.shape
            if datatype == "BYTES" and not binary:
                assert [str(each) for each in got.reshape(-1)] == [e.decode() for e in each.reshape(-1)]
            else:
                assert same(got, each)


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("datatype", TYPES)
def test_tritons_grpc_client(local: dict[str, Any], datatype: str, compression: str | None) -> None:
    require_served(datatype)
    _, array = TYPES[datatype]
    with triton_grpc.InferenceServerClient(local["grpc"]) as client:
        for each in (array, array[:1]):
            tensor = triton_grpc.InferInput("x0", list(each.shape), datatype)
            tensor.set_data_from_numpy(each)
            found = client.infer(
                datatype.lower(), [tensor], request_id="seven", compression_algorithm=compression
            )
            assert found.get_response().id == "seven"
            assert found.get_output("y0").datatype == datatype
            assert found.as_numpy("y0").shape == each.shape
            assert same(found.as_numpy("y0"), each)


@pytest.mark.parametrize("module", [triton_http, triton_grpc], ids=["http", "grpc"])
def test_health_metadata_several_tensors_and_errors(
    service: World, local: dict[str, Any], module: Any
) -> None:
    url = host_of(local) if module is triton_http else local["grpc"]
    with module.InferenceServerClient(url) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("pair")
        assert client.is_model_ready(service.model("pair"), "1")
        assert not client.is_model_ready("nonesuch")
        json_form = {} if module is triton_http else {"as_json": True}
        assert client.get_server_metadata(**json_form)["name"] == "cloister"
        metadata = client.get_model_metadata(service.model("pair"), **json_form)
        assert [each["datatype"] for each in metadata["inputs"]] == ["FP32", "INT64"]
        arrays = TYPES["FP32"][1], TYPES["INT64"][1]
        tensors = []
        for at, (name, array) in enumerate(zip(("FP32", "INT64"), arrays, strict=True)):
            tensors.append(module.InferInput(f"x{at}", list(array.shape), name))
            tensors[-1].set_data_from_numpy(array)
        found = client.infer("pair", tensors)
        assert all(same(found.as_numpy(f"y{at}"), array) for at, array in enumerate(arrays))
        found = client.infer("pair", tensors[::-1], outputs=[module.InferRequestedOutput("y1")])
        assert same(found.as_numpy("y1"), arrays[1])
        assert found.as_numpy("y0") is None
        with pytest.raises(Exception, match=r"request\.inputs") as refused:
            client.infer("pair", tensors[:1])
        assert type(refused.value).__name__ == "InferenceServerException"
        with pytest.raises(Exception, match=r"not-found\.model"):
            client.infer("nonesuch", tensors)


def test_typed_contents_over_grpc(local: dict[str, Any]) -> None:
    """What clients send that don't know raw contents; the messages are Triton's own."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with grpc.insecure_channel(local["grpc"]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for datatype, field in (
            ("INT8", "int_contents"),
            ("FP64", "fp64_contents"),
            ("BYTES", "bytes_contents"),
        ):
            array = TYPES[datatype][1]
            request = service_pb2.ModelInferRequest(model_name=datatype.lower())
            tensor = request.inputs.add(name="x0", datatype=datatype, shape=array.shape)
            getattr(tensor.contents, field).extend(array.reshape(-1).tolist())
            (raw,) = stub.ModelInfer(request).raw_output_contents
            _, (wanted,) = oip.encode_request({"x": array})
            assert raw == bytes(wanted)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(service: World, tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    tensor = {"name": "x0", "shape": [1, 3], "datatype": "INT32", "data": [[1, 2, 3]]}
    body = json.dumps({"inputs": [tensor], "id": "7"})

    def curl(*arguments: str) -> tuple[int, Any]:
        done = subprocess.run(
            ["curl", "--silent", "--max-time", "20", "--write-out", "\n%{http_code}", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        text, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(text)

    with proxy(service, "--alias", f"short={service.model('int32')}") as local:
        url = local["rest"]
        for name in ("short", "int32", service.model("int32"), service.model("int32").replace("/", "%2f")):
            status, answer = curl("--json", body, "--compressed", f"{url}/v2/models/{name}/infer")
            assert status == 200
            assert answer["id"] == "7"
            assert answer["outputs"] == [
                {"name": "y0", "datatype": "INT32", "shape": [1, 3], "data": [1, 2, 3]}
            ]
        assert curl(f"{url}/v2/health/ready") == (200, {"ready": True})
        assert curl("--header", "Host: evil.example", f"{url}/v2")[0] == 403
        assert curl("--header", "Origin: http://evil.example", "--json", body, f"{url}/v2")[0] == 403
        status, record = curl(f"{url}/verification.json")
        assert (status, record["service"]) == (200, local["service"])
        assert all(step["outcome"] in ("ok", "note") for step in record["steps"])
    with proxy(service, "--unix", str(path), "--no-grpc") as local:
        assert "grpc" not in local
        status, answer = curl(
            "--unix-socket", str(path), "--json", body, "http://localhost/v2/models/int32/infer"
        )
        assert (status, answer["outputs"][0]["data"]) == (200, [1, 2, 3])
    assert not path.exists()


def test_a_user_without_a_grant_gets_the_enclaves_word(service: World) -> None:
    with proxy(service, identity="stranger") as local:
        with triton_http.InferenceServerClient(host_of(local)) as client:
            assert client.is_server_ready()
            with pytest.raises(Exception, match=r"access\."):
                client.get_model_metadata("int32")
        with (
            triton_grpc.InferenceServerClient(local["grpc"]) as client,
            pytest.raises(Exception, match=r"PERMISSION_DENIED.*access\."),
        ):
            client.get_model_metadata("int32")


@pytest.mark.parametrize("section", ["key_service", "worker"])
def test_it_does_not_start_where_the_verification_fails(service: World, tmp_path: Path, section: str) -> None:
    text = service.site.user_policy.read_text()
    start = text.index("mr_enclave", text.index(f"[{section}]"))
    quote = text.index('"', start)
    wrong = tmp_path / "user-policy.toml"
    wrong.write_text(text[: quote + 1] + "00" * 32 + text[quote + 65 :])
    done = subprocess.run(command(service, policy=wrong), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    refused = json.loads(done.stdout)
    assert "mr_enclave" in (refused["claim"], refused["error"].partition(".")[2])


def test_listening_elsewhere_is_said_loudly(service: World) -> None:
    process = subprocess.Popen(
        command(service, "--dangerous-listen", "127.0.0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "DANGEROUS" in err
    assert "CLEAR" in err


def test_nothing_is_written_but_the_memory(service: World, tmp_path: Path) -> None:
    """A request leaves no file behind, and the proxy has no file open for writing."""
    memory = tmp_path / "memory"
    with proxy(service, "--memory", str(memory), "--no-grpc") as local:
        with triton_http.InferenceServerClient(host_of(local)) as client:
            array = TYPES["FP32"][1]
            tensor = triton_http.InferInput("x0", list(array.shape), "FP32")
            tensor.set_data_from_numpy(array)
            client.infer("fp32", [tensor])
        for link in Path(f"/proc/{local['pid']}/fd").iterdir():
            try:
                target = os.readlink(link)
                opened = Path(f"/proc/{local['pid']}/fdinfo/{link.name}").read_text()
            except FileNotFoundError:  # closed meanwhile
                continue
            flags = int(opened.split("flags:")[1].split()[0], 8)
            regular = target.startswith("/") and Path(target).is_file()
            assert not (regular and flags & (os.O_WRONLY | os.O_RDWR)), target
    assert [each.name for each in tmp_path.iterdir()] == ["memory"]
