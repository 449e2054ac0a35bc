"""What a graph refers to: ONNX messages with a file name or a foreign operator wherever it may hide."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cloister.enclave.worker.graph import MAX_DEPTH, require_safe
from cloister.enclave.worker.session import build_session
from cloister.errors import CloisterError, FormatError, InvalidRequest

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
ADD = helper.make_node("Add", ["x", "w"], ["y"])
WEIGHTS = np.arange(4, dtype="<f4").tobytes()


def external(location: str = "../secret", **entries: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "16", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def plain() -> TensorProto:
    return TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], raw_data=WEIGHTS)


def graph(*tensors: TensorProto, nodes: tuple[onnx.NodeProto, ...] = (ADD,)) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "g", [X], [Y], list(tensors))


def model(made: onnx.GraphProto | None = None) -> onnx.ModelProto:
    made = graph(plain()) if made is None else made
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def node(**fields: object) -> onnx.NodeProto:
    made = helper.make_node("Identity", ["x"], ["y"])
    attribute = made.attribute.add(name="a")
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(attribute, name).extend(value)
        else:
            getattr(attribute, name).CopyFrom(value)
    return made


def sparse(tensor: TensorProto, *, indices: bool = False) -> onnx.SparseTensorProto:
    made = onnx.SparseTensorProto(dims=[4])
    (made.indices if indices else made.values).CopyFrom(tensor)
    return made


def in_initializer(t: TensorProto) -> onnx.ModelProto:
    return model(graph(plain(), t))


def in_sparse_initializer(t: TensorProto) -> onnx.ModelProto:
    made = model()
    made.graph.sparse_initializer.append(sparse(t))
    return made


def in_sparse_indices(t: TensorProto) -> onnx.ModelProto:
    made = model()
    made.graph.sparse_initializer.append(sparse(t, indices=True))
    return made


def in_training(t: TensorProto) -> onnx.ModelProto:
    made = model()
    made.training_info.add().algorithm.CopyFrom(graph(t))
    return made


def in_training_initialization(t: TensorProto) -> onnx.ModelProto:
    made = model()
    made.training_info.add().initialization.CopyFrom(graph(t))
    return made


def in_function(t: TensorProto) -> onnx.ModelProto:
    made = model()
    made.functions.add(name="f", domain="d").node.append(node(t=t))
    return made


def in_function_default(t: TensorProto) -> onnx.ModelProto:
    made = model()
    made.functions.add(name="f", domain="d").attribute_proto.add(name="a").t.CopyFrom(t)
    return made


def in_nested_subgraph(t: TensorProto) -> onnx.ModelProto:
    inner = graph(t)
    for _ in range(5):
        inner = graph(plain(), nodes=(node(g=inner),))
    return model(inner)


PLACES = {
    "initializer": in_initializer,
    "sparse initializer": in_sparse_initializer,
    "sparse indices": in_sparse_indices,
    "attribute": lambda t: model(graph(nodes=(node(t=t),))),
    "attribute list": lambda t: model(graph(nodes=(node(tensors=[plain(), t]),))),
    "sparse attribute": lambda t: model(graph(nodes=(node(sparse_tensor=sparse(t)),))),
    "sparse attribute list": lambda t: model(graph(nodes=(node(sparse_tensors=[sparse(t)]),))),
    "subgraph": lambda t: model(graph(nodes=(node(g=graph(t)),))),
    "subgraph list": lambda t: model(graph(nodes=(node(graphs=[graph(), graph(t)]),))),
    "nested subgraph": in_nested_subgraph,
    "training algorithm": in_training,
    "training initialization": in_training_initialization,
    "function": in_function,
    "function default": in_function_default,
}


def refused(made: onnx.ModelProto | bytes, code: str) -> None:
    raw = made if isinstance(made, bytes) else made.SerializeToString()
    with pytest.raises(CloisterError) as caught:
        require_safe(raw)
    assert caught.value.code == code


@pytest.mark.parametrize("place", PLACES)
def test_a_file_name_in_every_place(place):
    refused(PLACES[place](external()), "model.external-data")
    require_safe(PLACES[place](external("weights")).SerializeToString())
    require_safe(PLACES[place](plain()).SerializeToString())


@pytest.mark.parametrize(
    "location",
    [
        "",
        "/etc/passwd",
        "weights/../secret",
        "./weights",
        "WEIGHTS",
        "weights\0x",
        " weights",
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_every_other_name(location):
    refused(in_initializer(external(location)), "model.external-data")


def test_a_second_location_behind_the_first():
    for names in (("weights", "/etc/passwd"), ("/etc/passwd", "weights")):
        tensor = external(names[0])
        tensor.external_data.add(key="location", value=names[1])
        refused(in_initializer(tensor), "model.external-data")


def test_external_entries_count_even_where_the_tensor_says_otherwise():
    tensor = external()
    tensor.data_location = TensorProto.DEFAULT
    refused(in_initializer(tensor), "model.external-data")


def test_where_everything_that_holds_tensors_is_found():
    """A way to a tensor that a later ONNX adds must be added to the reader too."""

    def ways(message, seen):
        found = set()
        for field in message.fields:
            kind = field.message_type
            if kind is None or kind.name in seen:
                continue
            inner = ways(kind, {*seen, kind.name})
            if inner or kind.name in ("TensorProto", "NodeProto"):
                found |= {(message.name, field.number)} | inner
        return found

    from cloister.enclave.worker.graph import _CHILDREN

    ours = {
        "Model": "ModelProto",
        "Training": "TrainingInfoProto",
        "Graph": "GraphProto",
        "Function": "FunctionProto",
        "Node": "NodeProto",
        "Attribute": "AttributeProto",
        "SparseTensor": "SparseTensorProto",
    }
    known = {
        (ours[kind], number) for kind, numbers in _CHILDREN.items() if kind in ours for number in numbers
    }
    assert ways(onnx.ModelProto.DESCRIPTOR, {"ModelProto"}) <= known


# -- operators -----------------------------------------------------------------

FOREIGN = [
    "com.microsoft",
    "com.example",
    "ai.onnx.contrib",
    "ai.onnx.ml ",
    "AI.ONNX",
    "ai.onnx.preview.training",
]


@pytest.mark.parametrize("domain", FOREIGN)
def test_operators_of_other_domains(domain):
    foreign = helper.make_node("Gelu", ["x"], ["y"], domain=domain)
    refused(model(graph(nodes=(foreign,))), "model.operator")
    refused(model(graph(nodes=(node(g=graph(nodes=(foreign,))),))), "model.operator")
    inside = model()
    inside.functions.add(name="f", domain="d").node.append(foreign)
    refused(inside, "model.operator")
    training = model()
    training.training_info.add().algorithm.CopyFrom(graph(nodes=(foreign,)))
    refused(training, "model.operator")


@pytest.mark.parametrize("domain", ["", "ai.onnx", "ai.onnx.ml"])
def test_standard_operators(domain):
    require_safe(
        model(graph(nodes=(helper.make_node("Any", ["x"], ["y"], domain=domain),))).SerializeToString()
    )


def test_a_domain_given_twice():
    """The last one counts for a parser; we look at each."""
    raw = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft").SerializeToString()
    twice = raw + b"\x3a\x00"
    made = field(7, field(1, twice))
    assert onnx.load_model_from_string(made).graph.node[0].domain == ""
    refused(made, "model.operator")


# -- the wire format -----------------------------------------------------------


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, content: bytes, tag: bytes = b"") -> bytes:
    return (tag or varint(number << 3 | 2)) + varint(len(content)) + content


def test_two_graphs_are_both_read():
    """A parser merges them into one."""
    made = model().SerializeToString() + field(7, graph(external()).SerializeToString())
    assert len(onnx.load_model_from_string(made).graph.initializer) == 2
    refused(made, "model.external-data")


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_tags_and_lengths_longer_than_needed_hide_nothing(padding):
    content = graph(external()).SerializeToString()
    tag = bytes([0x3A | 0x80, *[0x80] * (padding - 1), 0])
    made = field(7, content, tag)
    assert onnx.load_model_from_string(made).graph.initializer
    refused(made, "model.external-data")
    length = varint(len(content))
    padded = length[:-1] + bytes([length[-1] | 0x80, *[0x80] * (padding - 1), 0])
    refused(b"\x3a" + padded + content, "model.external-data")


@pytest.mark.parametrize("bits", [32, 33, 35, 60])
def test_a_tag_that_a_parser_might_cut(bits):
    made = varint(7 << 3 | 2 | 1 << bits) + varint(4) + bytes(4)
    refused(made, "model.format")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x3a",
        b"\x3a\x05",
        b"\x3a\x05abcd",
        b"\x80" * 11,
        b"\xff" * 11,
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x3b",  # groups
        b"\x3c",
        b"\x3e",  # wire types that aren't any
        b"\x3f",
        b"\x02\x00",  # field number zero
        b"ORTM",
    ],
)
def test_no_protocol_buffer(raw):
    refused(raw, "model.format")


def test_nested_too_deeply():
    made = b""
    for _ in range(MAX_DEPTH):
        made = field(1, field(5, field(6, made)))  # node -> attribute -> graph
    with pytest.raises(FormatError) as caught:
        require_safe(field(7, made))
    assert caught.value.claim == "graph nesting"


@given(st.binary(max_size=200))
def test_any_bytes_pass_or_are_refused_by_us(raw):
    with contextlib.suppress(FormatError, InvalidRequest):
        require_safe(raw)


@given(st.sampled_from(sorted(PLACES)), st.integers(0, 1 << 20), st.integers(0, 255))
def test_altered_graphs_that_still_name_a_file_are_refused(place, position, value):
    """Whatever a parser still reads as a file name, we have seen."""
    raw = bytearray(PLACES[place](external()).SerializeToString())
    raw[position % len(raw)] = value
    try:
        require_safe(bytes(raw))
    except CloisterError:
        return
    with contextlib.suppress(Exception):
        assert "../secret" not in _locations(onnx.load_model_from_string(bytes(raw)))


def _locations(message) -> list[str]:
    found = []
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        items = value if descriptor.is_repeated else [value]
        for item in items:
            if descriptor.message_type.name == "TensorProto":
                found += [entry.value for entry in item.external_data if entry.key == "location"]
            found += _locations(item)
    return found


# -- what ONNX Runtime makes of it ---------------------------------------------


def build(made: onnx.ModelProto | bytes, weights: bytes = WEIGHTS) -> ort.InferenceSession:
    raw = made if isinstance(made, bytes) else made.SerializeToString()
    return build_session(memoryview(raw), memoryview(weights))


def test_weights_come_from_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(bytes(16))  # a file of that name is not what is read
    session = build(model(graph(external("weights"))))
    assert session.run(None, {"x": np.zeros(4, np.float32)})[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("weights", [b"", WEIGHTS[:-1]])
def test_weights_that_are_not_there_are_not_looked_for_elsewhere(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(WEIGHTS)
    with pytest.raises(InvalidRequest) as caught:
        build(model(graph(external("weights"))), weights)
    assert caught.value.code == "model.load"


@pytest.mark.parametrize("offset", ["4", "16", "1000000", "-16", "4294967296", "9223372036854775807", "x"])
def test_offsets_outside_the_weights(offset):
    with pytest.raises(InvalidRequest) as caught:
        build(model(graph(external("weights", offset=offset))))
    assert caught.value.code == "model.load"


@pytest.mark.parametrize("length", ["-1", "8", "17", "1000000", "9223372036854775807"])
def test_lengths_that_do_not_fit(length):
    with pytest.raises(InvalidRequest) as caught:
        build(model(graph(external("weights", length=length))))
    assert caught.value.code == "model.load"


def test_onnx_runtimes_own_format_is_not_loaded(tmp_path, monkeypatch):
    """It could be dressed up as a protocol buffer, and then bring operators that we didn't see."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "m.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(model().SerializeToString(), options, providers=["CPUExecutionProvider"])
    raw = (tmp_path / "m.ort").read_bytes()
    assert raw[4:8] == b"ORTM"
    ort.InferenceSession(raw, providers=["CPUExecutionProvider"])
    monkeypatch.setattr("cloister.enclave.worker.session.require_safe", lambda graph: None)
    with pytest.raises(InvalidRequest) as caught:
        build(raw)
    assert caught.value.code == "model.load"


@pytest.mark.parametrize("raw", [b"", b"no model", os.urandom(200), b"\x08\x0a"])
def test_no_model(raw):
    with pytest.raises((InvalidRequest, FormatError)):
        build(raw)


def test_an_unknown_operator():
    with pytest.raises(InvalidRequest) as caught:
        build(model(graph(nodes=(helper.make_node("Nonesuch", ["x"], ["y"]),))))
    assert caught.value.code == "model.load"
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("name", ["digits", "diagnosis"])
def test_the_examples_are_safe(name):
    require_safe((MODELS / f"{name}.onnx").read_bytes())
