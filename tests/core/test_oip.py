"""Open Inference Protocol v2: first every refusal, then that arrays come back as they were, in both forms."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cloister.core import bfloat16, oip
from cloister.errors import InvalidRequest

NUMBERS = sorted(set(oip.DTYPES) - {"BYTES"})


def made(name: str, values: Any) -> oip.Array:
    """Numbers as an array of a datatype."""
    return bfloat16.bfloat16(np.array(values)) if name == "BF16" else np.array(values, dtype=oip.DTYPES[name])


def read(header: Any, binary: bytes = b"", length: bytes | None = None) -> oip.InferenceRequest:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return oip.decode_request(memoryview(raw + binary), b"%d" % len(raw) if length is None else length)


def tensor(**changes: Any) -> dict[str, Any]:
    made = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2], **changes}
    return {name: value for name, value in made.items() if value is not ...}


def binary(shape: list[int], size: Any, datatype: str = "FP32") -> dict[str, Any]:
    return tensor(shape=shape, datatype=datatype, data=..., parameters={"binary_data_size": size})


def refused(code: str, header: Any, content: bytes = b"", length: bytes | None = None) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(header, content, length)
    assert caught.value.code == code, str(caught.value)
    return caught.value


# -- the header ----------------------------------------------------------------


@pytest.mark.parametrize("length", [b"", b"-1", b"+2", b"1e3", b"0x2", b"9999", b"1" * 13, b" 2", b"2\xb2"])
def test_header_length_that_is_none(length):
    refused("request.header-length", {"inputs": [tensor()]}, length=length)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 5000,
        b"9" * 5000,
        b"{} {}",
        b"{'inputs': 1}",
    ],
)
def test_header_that_is_no_json_object(raw):
    refused("request.header", raw)


def test_header_of_no_length_and_one_that_is_too_long():
    refused("request.header", {"inputs": [tensor()]}, length=b"0")
    with pytest.raises(InvalidRequest) as caught:
        oip.decode_request(memoryview(bytes(oip.MAX_HEADER + 1)), None)
    assert caught.value.code == "request.header"


@pytest.mark.parametrize("inputs", [None, [], {}, "x", 1])
def test_no_inputs(inputs):
    refused("request.inputs", {"inputs": inputs})
    refused("request.inputs", {})


@pytest.mark.parametrize("outputs", [None, {}, "y", [1], [{}], [{"name": 1}], [["y"]]])
def test_outputs_that_are_none(outputs):
    refused("request.outputs", {"inputs": [tensor()], "outputs": outputs})


@pytest.mark.parametrize("extra", [{"id": 1}, {"id": "x" * 257}, {"parameters": []}, {"parameters": None}])
def test_id_or_parameters_of_another_kind(extra):
    refused("request.header", {"inputs": [tensor()], **extra})


def test_too_many_tensors():
    many = [tensor(name=f"x{index}") for index in range(oip.MAX_TENSORS + 1)]
    refused("request.inputs", {"inputs": many})
    assert len(read({"inputs": many[:-1]}).inputs) == oip.MAX_TENSORS


def test_two_tensors_of_one_name():
    refused("request.duplicate", {"inputs": [tensor(), tensor()]})


# -- one tensor ----------------------------------------------------------------


@pytest.mark.parametrize(
    "broken", [1, None, "x", [], {}, tensor(name=1), tensor(name=...), tensor(name="n" * 257)]
)
def test_no_tensor(broken):
    refused("request.tensor", {"inputs": [broken]})


@pytest.mark.parametrize("kind", [None, "", "FP33", "fp32", "BF15", 1, [], {}])
def test_unknown_datatype(kind):
    refused("request.datatype", {"inputs": [tensor(datatype=kind)]})


@pytest.mark.parametrize(
    "shape",
    [
        None,
        "2",
        2,
        [-1],
        [2.0],
        ["2"],
        [True],
        [None],
        [1 << 40],
        [10**5000],
        [1] * (oip.MAX_RANK + 1),
        [0, 1 << 39, 1 << 39],
        [1 << 21, 1 << 21],
    ],
)
@pytest.mark.parametrize("datatype", ["FP32", "BYTES", "BOOL"])
def test_impossible_shape(shape, datatype):
    if shape == [10**5000]:
        header = b'{"inputs":[{"name":"x","datatype":"FP32","data":[],"shape":[1' + b"0" * 5000 + b"]}]}"
        refused("request.header", header)
        return
    refused("request.shape", {"inputs": [tensor(shape=shape, datatype=datatype, data=[])]})
    refused("request.shape", {"inputs": [binary(shape, 0, datatype)]})


@pytest.mark.parametrize("data", [None, ..., 1, "12", {}])
def test_no_data(data):
    refused("request.data", {"inputs": [tensor(data=data)]})


@pytest.mark.parametrize(
    "data", [[], [1], [1, 2, 3], [[1, 2], [3, 4]], [1, [2]], [[1], 2], [[1], [2, 3]], [[[[1]]], []]]
)
def test_data_of_another_shape(data):
    refused("request.shape", {"inputs": [tensor(data=data)]})


def test_data_nested_too_deeply():
    data: Any = 1
    for _ in range(oip.MAX_RANK + 2):
        data = [data]
    refused("request.shape", {"inputs": [tensor(shape=[1], data=data)]})


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("BOOL", 1),
        ("BOOL", "true"),
        ("INT32", 1.0),
        ("INT32", True),
        ("INT32", None),
        ("INT8", 128),
        ("INT8", -129),
        ("UINT8", -1),
        ("UINT8", 256),
        ("INT64", 1 << 63),
        ("UINT64", 1 << 64),
        ("FP32", "1"),
        ("FP32", True),
        ("FP32", {}),
        ("FP16", 1e6),
        ("FP32", 1e300),
        ("FP32", -(10**60)),
        ("FP64", 10**400),
        ("BF16", 3.4e38),
        ("BF16", True),
        ("BF16", "1"),
        ("BYTES", 1),
        ("BYTES", None),
        ("BYTES", "\ud800"),
    ],
)
def test_value_that_does_not_fit_its_datatype(datatype, value):
    refused("request.data", {"inputs": [tensor(datatype=datatype, shape=[1], data=[value])]})


@pytest.mark.parametrize("size", [-1, "8", 8.0, True, [8]])
def test_binary_size_that_is_no_number(size):
    refused("request.binary-size", {"inputs": [binary([2], size)]}, bytes(8))


@pytest.mark.parametrize(
    ("size", "content"), [(8, 7), (8, 9), (4, 8), (12, 12), (0, 8), (8, 0), (1 << 60, 8)]
)
def test_binary_data_of_another_length(size, content):
    refused("request.binary-size", {"inputs": [binary([2], size)]}, bytes(content))


def test_binary_data_that_nobody_asked_for():
    refused("request.binary-size", {"inputs": [tensor()]}, b"x")


@pytest.mark.parametrize(
    "content", [b"\x01", b"\x01\x00\x00\x00", b"\xff\xff\xff\xffa", b"\x02\x00\x00\x00a"]
)
def test_truncated_element(content):
    refused("request.binary-size", {"inputs": [binary([1], len(content), "BYTES")]}, content)


def test_more_elements_than_are_made_objects_of(monkeypatch):
    """One request must not hold the worker's loop: each element takes microseconds, as JSON and as text."""
    monkeypatch.setattr(oip, "MAX_ELEMENTS", 8)
    refused("request.elements", {"inputs": [tensor(shape=[9], data=[1] * 9)]})
    refused("request.elements", {"inputs": [binary([9], 36, "BYTES")]}, bytes(36))
    assert read({"inputs": [binary([9], 36)]}, bytes(36)).inputs["x"].size == 9, (
        "binary numbers are no objects"
    )
    for array, form in ((np.zeros(9), False), (np.array([b""] * 9, dtype=object), True)):
        with pytest.raises(InvalidRequest) as caught:
            oip.encode_response("m", {"y": array}, binary=form)
        assert (caught.value.code, caught.value.actual) == ("request.elements", "9")


def test_elements_beyond_those_of_the_shape_are_not_made():
    """63 MiB of empty elements took 34 s before they were counted."""
    content, seen = bytes(4 * 1000), []
    view = memoryview(content)

    class Counted:
        def __len__(self) -> int:
            return len(view)

        def __getitem__(self, part: slice) -> memoryview:
            seen.append(part)
            return view[part]

    with pytest.raises(InvalidRequest):
        oip._split_bytes("x", Counted(), 1)  # type: ignore[arg-type]
    assert len(seen) == 2, "the length and the content of one element"


def test_data_nested_beyond_its_shape_is_not_looked_into():
    data: Any = [1.0]
    for _ in range(900):
        data = [data]
    refused("request.shape", {"inputs": [tensor(shape=[1], data=data)]})


@pytest.mark.parametrize(("count", "content"), [(1, bytes(8)), (2, bytes(4)), (1, b"")])
def test_another_number_of_elements(count, content):
    refused("request.shape", {"inputs": [binary([count], len(content), "BYTES")]}, content)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, dtype=complex),
        np.zeros(2, dtype=np.longdouble),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.zeros(2, dtype=[("a", "i4")]),
        np.zeros(2, dtype="V4"),
        [1.0, 2.0],
        1.0,
    ],
    ids=lambda array: str(getattr(array, "dtype", type(array))),
)
def test_an_array_that_the_protocol_has_no_name_for(array):
    with pytest.raises(InvalidRequest) as caught:
        oip.encode_request({"x": array})
    assert caught.value.code == "request.datatype"


@pytest.mark.parametrize("item", [None, 1, 1.5, [b"x"], 10**9])
def test_an_object_that_is_neither_text_nor_bytes(item):
    array = np.empty(1, dtype=object)
    array[0] = item
    with pytest.raises(InvalidRequest) as caught:
        oip.encode_request({"x": array})
    assert caught.value.code == "request.data"


def test_errors_never_hold_the_inputs():
    error = refused("request.data", {"inputs": [tensor(datatype="INT8", shape=[1], data=[123456])]})
    assert "123456" not in str(error) + repr(error) + json.dumps(error.to_dict())


@pytest.mark.parametrize("header", [{}, {"outputs": 1}, {"outputs": {}}])
def test_a_response_without_outputs(header):
    with pytest.raises(InvalidRequest) as caught:
        oip.decode_response(memoryview(json.dumps(header).encode()), None)
    assert caught.value.code == "request.outputs"


# -- what holds ----------------------------------------------------------------


def same(one: oip.Array, other: oip.Array) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype.kind == "O":
        return one.tolist() == other.tolist()
    return one.tobytes() == other.tobytes()


ARRAYS = st.one_of(
    *(
        hnp.arrays(oip.DTYPES[name], hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
        for name in NUMBERS
    ),
    hnp.arrays(object, hnp.array_shapes(max_side=3), elements=st.binary(max_size=8)),
)


@given(st.dictionaries(st.text(max_size=8), ARRAYS, min_size=1, max_size=4), st.text(max_size=9))
def test_binary_request_round_trip(inputs, request_id):
    header, buffers = oip.encode_request(inputs, outputs=("y",), request_id=request_id)
    back = read(header, b"".join(buffers))
    assert back.inputs.keys() == inputs.keys()
    assert all(same(back.inputs[name], inputs[name]) for name in inputs)
    assert (back.outputs, back.id, back.binary, back.forms) == (("y",), request_id, True, {"y": True})


@given(st.dictionaries(st.text(max_size=8), ARRAYS, min_size=1, max_size=4))
def test_binary_response_round_trip(outputs):
    header, buffers = oip.encode_response("m", outputs, binary=True)
    back = oip.decode_response(memoryview(header + b"".join(buffers)), b"%d" % len(header))
    assert all(same(back[name], outputs[name]) for name in outputs)


@given(
    st.sampled_from([name for name in NUMBERS if name not in ("FP16", "FP32")]).flatmap(
        lambda name: hnp.arrays(oip.DTYPES[name], hnp.array_shapes(min_dims=0, max_side=4))
    )
)
def test_json_response_round_trip(array):
    header, buffers = oip.encode_response("m", {"y": array}, binary=False)
    assert buffers == []
    back = oip.decode_response(memoryview(header), None)["y"]
    assert back.dtype == array.dtype
    if array.dtype == bfloat16.BFLOAT16:  # as numbers: what kind of NaN it was, JSON can't say
        back, array = bfloat16.float32(back), bfloat16.float32(array)
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_datatype_in_json(name):
    array = made(name, [[0, 1], [1, 0]])
    data = (np.array([[0, 1], [1, 0]], dtype=bool) if name == "BOOL" else np.array([[0, 1], [1, 0]])).tolist()
    nested = read({"inputs": [tensor(datatype=name, shape=[2, 2], data=data)]})
    flat = read({"inputs": [tensor(datatype=name, shape=[2, 2], data=[*data[0], *data[1]])]})
    assert same(nested.inputs["x"], array)
    assert same(flat.inputs["x"], array)


def test_float32_survives_json():
    array = np.array([0.1, 1e-45, 3.4028235e38, -0.0], dtype=np.float32)
    header, _ = oip.encode_response("m", {"y": array}, binary=False)
    assert same(oip.decode_response(memoryview(header), None)["y"], array)


def test_numbers_that_json_has_no_name_for():
    back = read(b'{"inputs":[{"name":"x","datatype":"FP32","shape":[3],"data":[NaN,Infinity,-Infinity]}]}')
    np.testing.assert_array_equal(back.inputs["x"], np.array([np.nan, np.inf, -np.inf], dtype=np.float32))


def test_text_becomes_bytes_in_both_forms():
    back = read({"inputs": [tensor(datatype="BYTES", shape=[2], data=["ä", ""])]})
    assert back.inputs["x"].tolist() == ["ä".encode(), b""]
    for array in (np.array(["ä", "b"]), np.array([b"\xff", b"b"]), np.array(["ä", b"b"], dtype=object)):
        header, buffers = oip.encode_request({"x": array})
        wanted = [item if isinstance(item, bytes) else item.encode() for item in array.tolist()]
        assert read(header, b"".join(buffers)).inputs["x"].tolist() == wanted


def test_byte_order_and_layout_do_not_matter():
    wanted = np.arange(6, dtype="<f4").reshape(2, 3)
    for array in (wanted.astype(">f4"), np.asfortranarray(wanted), wanted[::-1][::-1]):
        header, buffers = oip.encode_request({"x": array})
        assert same(read(header, b"".join(buffers)).inputs["x"], wanted)


def test_binary_inputs_are_views():
    raw = bytearray(json.dumps({"inputs": [binary([2], 8)]}).encode())
    content = memoryview(raw + np.array([1, 2], dtype="<f4").tobytes())
    request = oip.decode_request(content, b"%d" % len(raw))
    content[len(raw) :] = bytes(8)
    assert request.inputs["x"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("whole", "each", "wanted"),
    [
        (..., ..., False),
        (..., None, False),
        (..., 3, False),
        (..., {}, False),
        (..., {"binary_data": True}, True),
        (..., {"binary_data": False}, False),
        (False, {"binary_data": True}, True),
        (True, ..., True),
        (True, {}, True),
        (True, {"binary_data": False}, False),
        (True, {"binary_data": "no"}, True),
        (1, {}, False),
        ("true", {}, False),
    ],
)
def test_who_gets_binary_outputs(whole, each, wanted):
    """What an output says of itself goes before what the request says of all."""
    extra = {} if whole is ... else {"parameters": {"binary_data_output": whole}}
    output = {"name": "y"} if each is ... else {"name": "y", "parameters": each}
    request = read({"inputs": [tensor()], "outputs": [output, {"name": "z"}], **extra})
    outputs = {"y": np.zeros(1, "<f4"), "z": np.zeros(2, "<f4")}
    raw, buffers = oip.encode_response("m", outputs, binary=request.binary, forms=request.forms)
    answer = json.loads(raw)
    assert [each["name"] for each in answer["outputs"]] == ["y", "z"]
    assert [("data" in each) for each in answer["outputs"]] == [not wanted, whole is not True]
    assert [buffer.nbytes for buffer in buffers] == [4] * wanted + [8] * (whole is True)
    assert oip.decode_response(memoryview(raw + b"".join(buffers)), b"%d" % len(raw)).keys() == {"y", "z"}


def test_json_and_binary_inputs_in_one_request():
    inputs = [
        binary([2], 8) | {"name": "a"},
        tensor(name="b", shape=[1], data=[7]),
        binary([1], 7, "BYTES") | {"name": "c"},
        tensor(name="d", datatype="BOOL", data=[True, False]),
    ]
    request = read({"inputs": inputs}, np.array([1, 2], "<f4").tobytes() + b"\x03\0\0\0abc")
    assert {name: array.tolist() for name, array in request.inputs.items()} == {
        "a": [1, 2],
        "b": [7],
        "c": [b"abc"],
        "d": [True, False],
    }


def test_unknown_parameters_are_passed_over():
    extra = {"parameters": {"priority": 3, "sequence_id": "x", "anything": [1]}}
    inputs = [tensor(parameters={"content_type": "np", "x": None})]
    outputs = [{"name": "y", "parameters": {"classification": 3}}]
    assert read({"inputs": inputs, "outputs": outputs, "more": 1, **extra}).outputs == ("y",)


@pytest.mark.parametrize("data", [3, [3]])
def test_a_scalar_stands_alone_or_in_a_list(data):
    array = read({"inputs": [tensor(shape=[], data=data)]}).inputs["x"]
    assert (array.shape, array.item()) == ((), 3)


@pytest.mark.parametrize(("shape", "data"), [([0], []), ([2, 0], [[], []]), ([2, 0], []), ([0, 3], [])])
def test_empty_tensors(shape, data):
    assert read({"inputs": [tensor(shape=shape, data=data)]}).inputs["x"].shape == tuple(shape)


@pytest.mark.parametrize(
    "data", [[[1, 2, 3], [4, 5, 6]], [[[1], [2]], [[3], [4]], [[5], [6]]], [[1, 2, 3, 4, 5, 6]]]
)
def test_data_nested_another_way_than_its_shape(data):
    """Taken as it stands in memory it would be another matrix."""
    refused("request.shape", {"inputs": [tensor(shape=[3, 2], data=data)]})


def test_an_output_asked_for_twice_or_too_many():
    refused("request.duplicate", {"inputs": [tensor()], "outputs": [{"name": "y"}, {"name": "y"}]})
    many = [{"name": str(index)} for index in range(oip.MAX_TENSORS + 1)]
    refused("request.outputs", {"inputs": [tensor()], "outputs": many})
    refused("request.outputs", {"inputs": [tensor()], "outputs": [{"name": "n" * 257}]})


def test_a_byte_that_is_no_boolean():
    refused("request.data", {"inputs": [binary([3], 3, "BOOL")]}, b"\0\1\2")
    assert read({"inputs": [binary([2], 2, "BOOL")]}, b"\0\1").inputs["x"].tolist() == [False, True]


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_side=4)))
def test_bfloat16_is_the_nearest(array):
    """ml_dtypes, which comes with jax, is the second opinion."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = array.astype(ml_dtypes.bfloat16)
    ours = bfloat16.bfloat16(array)
    nan = np.isnan(array)
    assert np.array_equal(bfloat16.float32(ours)[~nan], wanted.astype(np.float32)[~nan])
    assert np.isnan(bfloat16.float32(ours)[nan]).all()
    header, buffers = oip.encode_request({"x": ours})
    assert same(read(header, b"".join(buffers)).inputs["x"], ours)
    assert oip.encode_request({"x": wanted})[0] == header


def test_bfloat16_in_json():
    header, _ = oip.encode_response(
        "m", {"y": bfloat16.bfloat16(np.array([1.5, -2.0, 3.140625]))}, binary=False
    )
    assert json.loads(header)["outputs"][0] == {
        "name": "y",
        "datatype": "BF16",
        "shape": [3],
        "data": [1.5, -2.0, 3.140625],
    }
    assert oip.numpy_name("BF16") == "bfloat16"


def test_a_request_does_not_show_its_inputs():
    assert "12.5" not in repr(read({"inputs": [tensor(data=[12.5, 12.5])]}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda items: st.lists(items, max_size=4) | st.dictionaries(st.text(max_size=4), items, max_size=4),
    max_leaves=12,
)
ODD_TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=3) | JSON,
        "datatype": st.sampled_from(sorted(oip.DTYPES)) | JSON,
        "shape": st.lists(st.integers(-1, 1 << 41), max_size=4) | JSON,
        "data": JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 40) | JSON}),
    },
)
ODD_HEADER = st.fixed_dictionaries(
    {"inputs": st.lists(ODD_TENSOR, max_size=3)},
    optional={"outputs": JSON, "id": JSON, "parameters": JSON},
)


@given(ODD_HEADER, st.binary(max_size=40))
def test_any_header_gives_a_request_or_our_error(header, content):
    with contextlib.suppress(InvalidRequest):
        read(header, content)


@given(
    st.binary(max_size=80), st.none() | st.binary(max_size=4) | st.integers(0, 90).map(lambda n: b"%d" % n)
)
def test_any_bytes_give_a_request_or_our_error(raw, length):
    for decode in (oip.decode_request, oip.decode_response):
        with contextlib.suppress(InvalidRequest):
            decode(memoryview(raw), length)
