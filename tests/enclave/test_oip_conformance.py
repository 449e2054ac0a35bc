"""Every datatype through a worker's routes and ONNX Runtime: in JSON, in binary, and mixed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from cloister.core import bfloat16, oip
from cloister.core.ohttp import bhttp
from cloister.errors import InvalidRequest
from enclave.conftest import seal_model
from enclave.test_routes import USER, Bench
from support.realm import DAY, NOW

pytestmark = pytest.mark.asyncio
TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
SHAPES = [(), (1,), (3,), (2, 3), (1, 2, 3, 4)]  # a free side is never zero


def identity(inputs: dict[str, tuple[str, int]]) -> bytes:
    """A graph that gives each input back, name -> (datatype, rank), as ``<name>_out``."""
    nodes, sources, results = [], [], []
    for name, (kind, rank) in inputs.items():
        shape = [f"{name}{axis}" for axis in range(rank)]
        nodes.append(helper.make_node("Identity", [name], [f"{name}_out"]))
        sources.append(helper.make_tensor_value_info(name, TYPES[kind], shape))
        results.append(helper.make_tensor_value_info(f"{name}_out", TYPES[kind], shape))
    graph = helper.make_graph(nodes, "g", sources, results)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return made.SerializeToString()


def bench_of(inputs: dict[str, tuple[str, int]]) -> Bench:
    model = seal_model(
        sections={"graph": identity(inputs), "weights": b""}, grants={USER.thumbprint: NOW + DAY}
    )
    return Bench(model)


@pytest.fixture(scope="module")
def benches() -> Iterator[dict[tuple[str, int], Bench]]:
    """One bench for each datatype and rank, made when it is first asked for."""
    made: dict[tuple[str, int], Bench] = {}
    yield made
    for bench in made.values():
        bench.scheduler.close()


def at(benches: dict[tuple[str, int], Bench], kind: str, rank: int) -> Bench:
    if (kind, rank) not in benches:
        benches[kind, rank] = bench_of({"x": (kind, rank)})
    return benches[kind, rank]


def sample(kind: str, shape: tuple[int, ...]) -> oip.Array:
    """Values from one end of the datatype to the other."""
    size = int(np.prod(shape, dtype=int))
    rng = np.random.default_rng(size)
    if kind == "BYTES":
        words = ["", "ä", "x" * 300, "\x00", "日本", '"\\'] * 8
        return np.array([*(word.encode() for word in words[:size]), None], dtype=object)[:-1].reshape(shape)
    dtype = oip.DTYPES[kind]
    if kind == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        values = rng.integers(limits.min, limits.max, size, dtype=dtype, endpoint=True)
        values[:1], values[1:2] = limits.max, limits.min
        return values.reshape(shape)
    values = (rng.standard_normal(size) * 100).astype(np.float32)
    if kind == "BF16":
        return bfloat16.bfloat16(values).reshape(shape)
    return values.astype(dtype).reshape(shape)


def in_json(kind: str, array: oip.Array) -> Any:
    """The array as JSON has it, nested."""
    if kind == "BYTES":
        return (
            np.array([*(item.decode() for item in array.reshape(-1)), None], dtype=object)[:-1]
            .reshape(array.shape)
            .tolist()
        )
    return (bfloat16.float32(array) if kind == "BF16" else array).tolist()


def tensor(name: str, kind: str, array: oip.Array, **rest: Any) -> dict[str, Any]:
    return {"name": name, "datatype": kind, "shape": list(array.shape), **rest}


async def ask(
    bench: Bench, header: dict[str, Any], buffers: bytes = b"", *, binary: bool = False
) -> bhttp.Response:
    raw = json.dumps(header).encode()
    length = b"%d" % len(raw) if binary else None
    return await bench.ask(content=raw + buffers, header=length)


def answer(response: bhttp.Response) -> dict[str, oip.Array]:
    return oip.decode_response(memoryview(response.content), response.field(oip.HEADER_LENGTH))


def require_same(kind: str, one: oip.Array, other: oip.Array) -> None:
    assert (oip.datatype(one), one.shape) == (kind, other.shape)
    if kind == "BYTES":
        assert one.tolist() == other.tolist()
    else:
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
async def test_binary(benches, kind, shape):
    array = sample(kind, shape)
    raw, buffers = oip.encode_request({"x": array})
    response = await at(benches, kind, len(shape)).ask(
        content=raw + b"".join(buffers), header=b"%d" % len(raw)
    )
    assert response.field(b"content-type") == b"application/octet-stream"
    require_same(kind, answer(response)["x_out"], array)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
async def test_json(benches, kind, shape, flat):
    array = sample(kind, shape)
    data = in_json(kind, array.reshape(-1) if flat else array)
    response = await ask(at(benches, kind, len(shape)), {"inputs": [tensor("x", kind, array, data=data)]})
    assert response.field(b"content-type") == b"application/json"
    assert response.field(oip.HEADER_LENGTH) is None
    require_same(kind, answer(response)["x_out"], array)


@pytest.mark.parametrize("kind", TYPES)
async def test_metadata_names_the_datatype(benches, kind):
    bench = at(benches, kind, 2)
    response = await bench.ask(method=b"GET", path=f"/v2/models/{bench.model.model}".encode())
    found = json.loads(bytes(response.content))
    assert found["inputs"] == [{"name": "x", "datatype": kind, "shape": [-1, -1]}]
    assert found["outputs"] == [{"name": "x_out", "datatype": kind, "shape": [-1, -1]}]
    assert (found["versions"], found["platform"]) == (["1"], "onnxruntime_onnx")


@pytest.mark.parametrize("kind", TYPES)
async def test_another_datatype_than_the_models(benches, kind):
    other = "INT8" if kind == "UINT8" else "UINT8"
    array = sample(other, (2,))
    raw, buffers = oip.encode_request({"x": array})
    bench = at(benches, kind, 1)
    await bench.refused(
        InvalidRequest, "request.datatype", content=raw + b"".join(buffers), header=b"%d" % len(raw)
    )


MANY = {f"x_{kind}": (kind, 1) for kind in TYPES if kind != "BF16"}
WITH_BFLOAT16 = {f"x_{kind}": (kind, 1) for kind in TYPES if kind != "BYTES"}


@pytest.fixture
def many() -> Iterator[Bench]:
    made = bench_of(MANY)
    yield made
    made.scheduler.close()


async def test_bfloat16_beside_every_other_datatype_but_strings():
    bench = bench_of(WITH_BFLOAT16)
    arrays = {name: sample(kind, (3,)) for name, (kind, _) in WITH_BFLOAT16.items()}
    raw, buffers = oip.encode_request(arrays)
    response = await bench.ask(content=raw + b"".join(buffers), header=b"%d" % len(raw))
    got = answer(response)
    for name, (kind, _) in WITH_BFLOAT16.items():
        require_same(kind, got[f"{name}_out"], arrays[name])
    bench.scheduler.close()


async def test_bfloat16_beside_strings_is_refused():
    """ONNX Runtime 1.31 can't; see LIMITATIONS."""
    bench = bench_of({"x": ("BYTES", 1), "z": ("BF16", 1)})
    raw, buffers = oip.encode_request({"x": sample("BYTES", (1,)), "z": sample("BF16", (1,))})
    await bench.refused(
        InvalidRequest, "request.execution", content=raw + b"".join(buffers), header=b"%d" % len(raw)
    )
    bench.scheduler.close()


async def test_all_datatypes_in_one_request_some_in_json_and_some_in_binary(many):
    arrays = {name: sample(kind, (4,)) for name, (kind, _) in MANY.items()}
    inputs, buffers = [], b""
    for index, (name, (kind, _)) in enumerate(MANY.items()):
        if index % 2:
            inputs.append(tensor(name, kind, arrays[name], data=in_json(kind, arrays[name])))
            continue
        _, (buffer,) = oip.encode_request({name: arrays[name]})
        inputs.append(tensor(name, kind, arrays[name], parameters={"binary_data_size": buffer.nbytes}))
        buffers += bytes(buffer)
    wanted = [f"{name}_out" for name in reversed(MANY)]  # another order than the graph's
    outputs = [
        {"name": name, "parameters": {"binary_data": bool(index % 3)}} for index, name in enumerate(wanted)
    ]
    header = {"id": "mixed", "parameters": {"priority": 1}, "inputs": inputs, "outputs": outputs}
    response = await ask(many, header, buffers, binary=True)
    length = int(response.field(oip.HEADER_LENGTH))
    found = json.loads(bytes(response.content)[:length])
    assert (found["id"], found["model_name"], found["model_version"]) == ("mixed", many.model.model, "1")
    assert [each["name"] for each in found["outputs"]] == wanted
    assert ["data" in each for each in found["outputs"]] == [not index % 3 for index in range(len(wanted))]
    assert (
        sum(each.get("parameters", {}).get("binary_data_size", 0) for each in found["outputs"])
        == len(response.content) - length
    )
    got = answer(response)
    for name, (kind, _) in MANY.items():
        require_same(kind, got[f"{name}_out"], arrays[name])


async def test_without_outputs_all_come_in_the_graphs_order(many):
    inputs = [
        tensor(name, kind, sample(kind, (1,)), data=in_json(kind, sample(kind, (1,))))
        for name, (kind, _) in MANY.items()
    ]
    response = await ask(many, {"inputs": inputs[::-1]})
    assert list(answer(response)) == [f"{name}_out" for name in MANY]
    response = await ask(many, {"inputs": inputs, "parameters": {"binary_data_output": True}})
    assert response.field(oip.HEADER_LENGTH) is not None
    some = [{"name": "x_FP32_out"}, {"name": "x_BYTES_out", "parameters": {"binary_data": False}}]
    response = await ask(
        many, {"inputs": inputs, "outputs": some, "parameters": {"binary_data_output": True}}
    )
    header = json.loads(bytes(response.content)[: int(response.field(oip.HEADER_LENGTH))])
    assert [(each["name"], "data" in each) for each in header["outputs"]] == [
        ("x_FP32_out", False),
        ("x_BYTES_out", True),
    ]


async def test_bytes_that_are_no_text(benches):
    """ONNX's strings are UTF-8; a model could not tell what others mean."""
    raw, buffers = oip.encode_request({"x": np.array([b"\xff", None], dtype=object)[:1]})
    bench = at(benches, "BYTES", 1)
    await bench.refused(
        InvalidRequest, "request.data", content=raw + b"".join(buffers), header=b"%d" % len(raw)
    )


@pytest.mark.parametrize("kind", ["FP16", "BF16", "FP32", "FP64"])
async def test_numbers_that_are_none(benches, kind):
    array = np.array([np.nan, np.inf, -np.inf, -0.0], dtype=np.float32)
    array = bfloat16.bfloat16(array) if kind == "BF16" else array.astype(oip.DTYPES[kind])
    raw, buffers = oip.encode_request({"x": array})
    response = await at(benches, kind, 1).ask(content=raw + b"".join(buffers), header=b"%d" % len(raw))
    require_same(kind, answer(response)["x_out"], array)
