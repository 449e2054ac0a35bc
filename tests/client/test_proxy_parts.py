"""Parts of the proxy: whose requests it takes, codings, limits, names, messages, tensors."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.client.proxy import coding, messages, tensors
from cloister.client.proxy.fields import MAX_FIELDS, require_few
from cloister.client.proxy.guard import require_local
from cloister.client.proxy.names import Names, parse_aliases
from cloister.client.proxy.room import Room
from cloister.core import oip
from cloister.errors import (
    AccessRefused,
    CloisterError,
    FormatError,
    InvalidRequest,
    NotFound,
    Overloaded,
    UsageError,
)

ID = "ab" * 32
Request = messages.message("ModelInferRequest")


def inside(number: int, content: bytes) -> bytes:
    """A field that holds a message."""
    length, rest = b"", len(content)
    while rest >= 0x80:
        length, rest = length + bytes([rest & 0x7F | 0x80]), rest >> 7
    return bytes([number << 3 | 2]) + length + bytes([rest]) + content


# Whose requests.


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [b""],
        [b"evil.example"],
        [b"evil.example:8500"],
        [b"localhost.evil.example:8500"],
        [b"localhost.:8500"],
        [b"127.0.0.1.nip.io"],
        [b"192.0.2.7:8500"],
        [b"0.0.0.0:8500"],
        [b"[2001:db8::1]:8500"],
        [b"2130706433:8500"],
        [b"localhost:x"],
        [b"l\xf6calhost"],
        [b"localhost", b"evil.example"],
        [b"localhost", b"localhost"],
    ],
)
def test_a_request_for_another_host_is_refused(hosts):
    """DNS rebinding: the page's own name, which leads to 127.0.0.1, stands in Host."""
    with pytest.raises(AccessRefused) as refused:
        require_local([(b"host", each) for each in hosts], listen=None)
    assert refused.value.code == "proxy.host"


@pytest.mark.parametrize(
    "field",
    [
        (b"origin", b"https://evil.example"),
        (b"origin", b"null"),
        (b"origin", b"http://localhost:3000"),
        (b"origin", b"https://localhost:8500"),
        (b"sec-fetch-site", b"cross-site"),
        (b"sec-fetch-site", b"same-site"),
    ],
)
def test_a_request_of_a_foreign_page_is_refused(field):
    with pytest.raises(AccessRefused) as refused:
        require_local([(b"host", b"localhost:8500"), field], listen=None)
    assert refused.value.code == "proxy.origin"


@pytest.mark.parametrize(
    "fields",
    [
        [(b"host", b"localhost:8500")],
        [(b"host", b"LOCALHOST")],
        [(b"host", b"127.0.0.1:1")],
        [(b"host", b"[::1]:8500")],
        [(b"host", b"[::1]")],
        [(b"host", b"localhost:8500"), (b"origin", b"http://localhost:8500"), (b"sec-fetch-site", b"none")],
    ],
)
def test_local_programs_are_let_in(fields):
    require_local(fields, listen=None)


def test_with_dangerous_listen_its_name_and_addresses_are_let_in_and_other_names_are_not():
    for host in (b"proxy.internal:8500", b"192.0.2.7:8500"):
        require_local([(b"host", host)], listen="proxy.internal")
    with pytest.raises(AccessRefused):
        require_local([(b"host", b"evil.example")], listen="proxy.internal")


# Codings and limits.


def decode(body, name, **limits):
    async def run():
        room = Room(**limits)
        with room.enter() as place:
            return bytes(await coding.decode(body, name, place))

    return asyncio.run(run())


@pytest.mark.parametrize("name", [b"gzip", b"deflate"])
def test_a_bomb_is_refused_before_it_fills_memory(name):
    wbits = {b"gzip": 31, b"deflate": 15}[name]
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    bomb = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(64)), packer.flush()])
    assert len(bomb) < 100_000
    with pytest.raises(InvalidRequest) as refused:
        decode(bomb, name, max_body=8 << 20)
    assert refused.value.code == "request.size"
    with pytest.raises(Overloaded):
        decode(bomb, name, max_bytes=8 << 20)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no gzip",
        gzip.compress(b"x" * 100)[:-1],
        gzip.compress(b"x" * 100)[:-9] + bytes(9),
        gzip.compress(b"x") + b"trailing",
        gzip.compress(b"x") + gzip.compress(b"y"),
        gzip.compress(bytes(range(256)) * 1000, 0)[:-1],
    ],
    ids=["empty", "other", "cut", "checksum", "trailing", "two", "stored-cut"],
)
def test_what_is_no_whole_stream_is_refused(body):
    with pytest.raises(FormatError) as refused:
        decode(body, b"gzip")
    assert refused.value.code == "proxy.encoding"


@given(st.binary(max_size=2000), st.integers(1, 400), st.sampled_from([b"gzip", b"deflate"]))
def test_codings_round_trip(piece, times, name):
    body = piece * times
    assert decode(asyncio.run(coding.encode(memoryview(body), name)), name) == body


@pytest.mark.parametrize("field", [b"br", b"gzip, gzip", b"zstd", b"\xff"])
def test_other_codings_are_refused(field):
    with pytest.raises(FormatError):
        coding.coding_of(field)


def test_an_answer_is_compressed_where_one_coding_is_asked_for():
    assert coding.coding_of(None) is None
    assert coding.coding_of(b" GZip ") == b"gzip"
    assert coding.wanted(b"gzip") == b"gzip"
    assert coding.wanted(b"deflate") == b"deflate"
    for field in (None, b"", b"identity", b"br", b"gzip, deflate", b"gzip, deflate, br"):
        assert coding.wanted(field) is None


def test_the_room_is_bounded_and_given_back():
    room = Room(max_requests=2, max_bytes=10, max_body=8)
    with room.enter() as one, room.enter() as two:
        with pytest.raises(Overloaded), room.enter():
            pass
        one.hold(8)
        with pytest.raises(InvalidRequest):
            one.hold(1)
        two.hold(2)
        with pytest.raises(Overloaded):
            two.hold(1)
    with room.enter() as place:
        place.hold(8)
        place.next_body()
        place.hold(2)


# Names.


class Document(SimpleNamespace):
    """What `Names` looks at of a session; ``refused`` models are in pools that the policy doesn't accept."""

    def __init__(self, *models, aliases=(), refused=()):
        pools = [SimpleNamespace(models=[SimpleNamespace(model=model) for model in models])]
        self.verified = SimpleNamespace(document=SimpleNamespace(pools=pools))
        self.aliases = dict(aliases)
        self.refused = refused

    @property
    def conversation(self):
        return SimpleNamespace(current=lambda: self.verified)

    def place(self, model):
        if model in self.refused:
            raise AccessRefused


def test_a_name_is_an_id_an_alias_or_the_only_one_of_its_name():
    session = Document(f"{ID}/one", f"{ID}/two", f"{'cd' * 32}/two", aliases={"short": f"{ID}/else"})
    names = Names(session)
    assert names.resolve(f"{ID}/new") == f"{ID}/new"
    assert names.resolve("short") == f"{ID}/else"
    assert names.resolve("one") == f"{ID}/one"
    with pytest.raises(UsageError, match="several"):
        names.resolve("two")
    with pytest.raises(NotFound) as refused:
        names.resolve("three")
    assert refused.value.code == "not-found.model"
    for path in (f"{ID}/one/config", f"{ID}/one/../two", "x/y", f"{ID.upper()}/one"):
        with pytest.raises(NotFound) as refused:
            names.resolve(path)
        assert refused.value.code == "not-found.route"


def test_a_name_that_was_used_keeps_its_meaning():
    session = Document(f"{ID}/one")
    names = Names(session)
    assert names.resolve("one") == f"{ID}/one"
    session.verified = Document(f"{'cd' * 32}/one").verified  # somebody else's
    assert names.resolve("one") == f"{ID}/one"
    assert Names(session).resolve("one") == f"{'cd' * 32}/one"


def test_models_that_the_policy_does_not_accept_have_no_short_name():
    model = f"{ID}/one"
    with pytest.raises(NotFound):
        Names(Document(model, refused=(model,))).resolve("one")


@pytest.mark.parametrize(
    "texts",
    [["x"], ["x="], ["x=y"], [f"={ID}/m"], [f"a/b={ID}/m"], [f"a={ID}/m", f"a={ID}/n"], [f"a={ID}"]],
)
def test_aliases_that_mean_nothing_are_refused(texts):
    with pytest.raises(UsageError) as refused:
        parse_aliases(texts)
    assert refused.value.code == "proxy.alias"


def test_aliases():
    assert parse_aliases([f"a={ID}/m", f"b={ID}/m"]) == {"a": f"{ID}/m", "b": f"{ID}/m"}


# Messages and tensors.


def fields_of(descriptor):
    """(name, number, kind, repeated, message, one of) of every field."""
    return {
        (
            field.name,
            field.number,
            field.type,
            field.is_repeated,
            field.message_type.full_name if field.message_type else "",
            field.containing_oneof.name if field.containing_oneof else "",
        )
        for field in descriptor.fields
    }


def test_the_messages_are_those_of_triton():
    theirs = pytest.importorskip("tritonclient.grpc.service_pb2").DESCRIPTOR.pool
    for name in messages.TABLE:
        ours = messages.message(name).DESCRIPTOR
        assert ours.full_name == f"inference.{name}"
        assert fields_of(ours) == fields_of(theirs.FindMessageTypeByName(ours.full_name)), name
    service = theirs.FindServiceByName(messages.SERVICE)
    for method in (
        "ServerLive",
        "ServerReady",
        "ServerMetadata",
        "ModelReady",
        "ModelMetadata",
        "ModelInfer",
    ):
        found = service.methods_by_name[method]
        assert found.input_type.name == f"{method}Request"
        assert found.output_type.name == f"{method}Response"


def request(datatype="INT32", shape=(2,), raw=None, **contents):
    made = Request(model_name="m")
    tensor = made.inputs.add(name="x", datatype=datatype, shape=shape)
    for name, values in contents.items():
        getattr(tensor.contents, name).extend(values)
    if raw is not None:
        made.raw_input_contents.append(raw)
    return made


@pytest.mark.parametrize(
    "made",
    [
        request(),
        request(raw=b"1234", int_contents=[1]),
        request("FP16", fp32_contents=[1, 2]),
        request("BF16", fp32_contents=[1, 2]),
        request("INT8", int_contents=[1, 200]),
        request("UINT8", uint_contents=[256, 0]),
        request("INT32", fp32_contents=[1, 2]),
        request("INT32", int_contents=[1, 2], fp32_contents=[1, 2]),
    ],
    ids=["none", "both", "fp16", "bf16", "too-small-type", "too-large", "other-field", "two-fields"],
)
def test_contents_that_would_change_meaning_are_refused(made):
    with pytest.raises(InvalidRequest) as refused:
        tensors.to_inner(made)
    assert refused.value.code == "request.contents"


@pytest.mark.parametrize(
    "raw",
    [
        b"\x2a\x00" * (MAX_FIELDS + 1),  # inputs, each empty
        b"\x3a\x00" * (MAX_FIELDS + 1),  # raw_input_contents
        # one input, its contents, and in them bytes_contents
        inside(5, inside(5, b"\x42\x00" * MAX_FIELDS)),
        inside(5, b"\x18\x01" * MAX_FIELDS),  # a shape that isn't packed
    ],
)
def test_a_message_of_more_fields_than_a_request_has(raw):
    """24 MiB of empty inputs became 1.2 GiB of objects."""
    with pytest.raises(InvalidRequest) as caught:
        require_few(raw, Request.DESCRIPTOR)
    assert caught.value.code == "request.elements"


@pytest.mark.parametrize("raw", [b"\x2a", b"\x2a\x05\x00", b"\x2f\x00", b"\xff" * 11, inside(5, b"\x2a\x7f")])
def test_no_message(raw):
    with pytest.raises(FormatError):
        require_few(raw, Request.DESCRIPTOR)


def test_a_large_tensor_is_few_fields():
    made = Request(model_name="m", raw_input_contents=[bytes(1 << 20)])
    made.inputs.add(name="x", datatype="FP32", shape=[512, 512]).contents.fp32_contents.extend([0.5] * 70_000)
    require_few(made.SerializeToString(), made.DESCRIPTOR)


def test_shared_memory_is_refused():
    made = request(raw=b"")
    made.inputs[0].parameters["shared_memory_region"].string_param = "x"
    with pytest.raises(InvalidRequest):
        tensors.to_inner(made)


SAMPLES = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-(1 << 15), 7]),
    "INT32": ("int_contents", [-(1 << 31), 7]),
    "INT64": ("int64_contents", [-(1 << 63), 7]),
    "UINT8": ("uint_contents", [255, 0]),
    "UINT16": ("uint_contents", [65535, 0]),
    "UINT32": ("uint_contents", [(1 << 32) - 1, 0]),
    "UINT64": ("uint64_contents", [(1 << 64) - 1, 0]),
    "FP32": ("fp32_contents", [0.5, -2.0]),
    "FP64": ("fp64_contents", [0.1, -2.0]),
    "BYTES": ("bytes_contents", [b"one", b"\xff\x00"]),
}


@pytest.mark.parametrize("datatype", SAMPLES)
def test_typed_contents_mean_what_the_enclave_reads(datatype):
    field, values = SAMPLES[datatype]
    body, length = tensors.to_inner(request(datatype, **{field: values}))
    found = oip.decode_request(memoryview(body), length).inputs["x"]
    assert found.tolist() == values
    assert found.dtype == oip.DTYPES[datatype]


def test_ids_parameters_and_requested_outputs_go_along():
    made = request(raw=b"12345678")
    made.id = "seven"
    made.parameters["a"].int64_param = -1
    made.parameters["b"].bool_param = True
    made.parameters["binary_data_output"].bool_param = False  # the answer's form is the proxy's business
    made.inputs[0].parameters["c"].double_param = 0.5
    made.inputs[0].parameters["binary_data_size"].int64_param = 99
    made.outputs.add(name="y").parameters["d"].string_param = "text"
    body, length = tensors.to_inner(made)
    header = json.loads(body[: int(length)])
    assert header == {
        "id": "seven",
        "parameters": {"a": -1, "b": True, "binary_data_output": True},
        "inputs": [
            {"name": "x", "datatype": "INT32", "shape": [2], "parameters": {"c": 0.5, "binary_data_size": 8}}
        ],
        "outputs": [{"name": "y", "parameters": {"d": "text", "binary_data": True}}],
    }


def test_answers_come_back_with_their_parameters():
    header, buffers = oip.encode_response(
        "m", {"y": np.array([[1, 2]], "i2"), "z": np.array([b"a"], object)}, binary=True, request_id="7"
    )
    extended = json.loads(header) | {"parameters": {"a": 1, "b": True, "c": "x", "d": 0.5, "e": 1 << 63}}
    header = json.dumps(extended).encode()
    body = b"".join((header, *buffers))
    found = tensors.from_inner(memoryview(body), b"%d" % len(header))
    assert (found.model_name, found.id) == ("m", "7")
    assert [(each.name, each.datatype, list(each.shape)) for each in found.outputs] == [
        ("y", "INT16", [1, 2]),
        ("z", "BYTES", [1]),
    ]
    assert list(found.raw_output_contents) == [b"\1\0\2\0", b"\1\0\0\0a"]
    kinds = {name: value.WhichOneof("parameter_choice") for name, value in found.parameters.items()}
    assert kinds == {
        "a": "int64_param",
        "b": "bool_param",
        "c": "string_param",
        "d": "double_param",
        "e": "uint64_param",
    }


@given(st.binary(max_size=200), st.one_of(st.none(), st.binary(max_size=3)))
def test_no_answer_breaks_the_reader(body, length):
    with pytest.raises(CloisterError):
        tensors.from_inner(memoryview(body), length)
