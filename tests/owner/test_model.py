"""Reading models: first what is refused, then that the two parts run to the bit as the file does."""

from __future__ import annotations

import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cloister.core.model import TensorSpec
from cloister.errors import UsageError
from cloister.owner.model import SplitModel, load_model

RANDOM = np.random.default_rng(1)
X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])
SQUARE = RANDOM.random((32, 32), dtype=np.float32)  # 4 KiB
INPUT = {"x": RANDOM.random((3, 32), dtype=np.float32)}


def build(
    nodes, initializers=(), *, inputs=(X,), outputs=(Y,), opset=21, ir_version=10, domains=(), functions=()
):
    tensors = [
        numpy_helper.from_array(v, k) if isinstance(v, np.ndarray) else v
        for k, v in dict(initializers).items()
    ]
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), tensors)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions))


def product(weight="w"):
    return build([helper.make_node("MatMul", ["x", weight], ["y"])], {weight: SQUARE})


def save(model, folder, **options):
    path = folder / "model.onnx"
    onnx.save(model, path, **options)
    return path


def save_external(folder, **entries):
    """A model whose one weight lies in weights.bin; ``entries`` replace what it says about it."""
    model = product()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {
        "location": "weights.bin",
        "offset": "8",
        "length": str(SQUARE.nbytes),
        **entries,
    }.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    (folder / "weights.bin").write_bytes(bytes(8) + SQUARE.tobytes())
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def run(split: SplitModel, inputs, *, weights=None):
    weights = split.weights if weights is None else weights
    options = onnxruntime.SessionOptions()
    options.add_external_initializers_from_files_in_memory(["weights"], [weights], [len(weights)])
    session = onnxruntime.InferenceSession(split.graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def assert_same(path, inputs, **options) -> SplitModel:
    split = load_model(path, **options)
    whole = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [spec.name for spec in split.inputs] == [value.name for value in whole.get_inputs()]
    assert [spec.name for spec in split.outputs] == [value.name for value in whole.get_outputs()]
    for ours, theirs in zip(run(split, inputs), whole.run(None, inputs), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.tobytes() == theirs.tobytes()
    return split


def refused(path, code: str, **options) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_model(path, **options)
    assert caught.value.code == code
    return caught.value


# -- what is refused ------------------------------------------------------------


def test_file_that_is_not_there(tmp_path):
    refused(tmp_path / "none.onnx", "model.file")


def test_folder(tmp_path):
    refused(tmp_path, "model.file")


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"not a model", b"PK\x03\x04" + bytes(60), b"\x80\x04]q\x00."], ids=str
)
def test_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, "model.format")


def test_model_cut_short(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(product().SerializeToString()[:-10])
    refused(path, "model.format")


def test_file_longer_than_protobuf_allows(tmp_path):
    path = tmp_path / "model.onnx"
    path.touch()
    os.truncate(path, 1 << 31)  # sparse
    assert "external data" in refused(path, "model.format").hint


def test_graph_that_the_checker_refuses(tmp_path):
    refused(save(build([helper.make_node("Relu", ["nowhere"], ["y"])]), tmp_path), "model.format")


def test_training_graph(tmp_path):
    model = product()
    model.training_info.add()
    refused(save(model, tmp_path), "model.format")


@pytest.mark.parametrize(
    ("operator", "domain"),
    [
        ("Secret", "com.example"),
        ("FusedMatMul", "com.microsoft"),
        ("Gradient", "ai.onnx.preview.training"),
        ("Relux", ""),
    ],
)
def test_operator_that_is_not_standard(tmp_path, operator, domain):
    model = build(
        [helper.make_node(operator, ["x"], ["y"], domain=domain)], domains=[domain] if domain else []
    )
    error = refused(save(model, tmp_path), "model.operator")
    assert operator in error.actual


def test_operator_in_a_subgraph_that_is_not_standard(tmp_path):
    refused(
        save(branch([helper.make_node("Secret", ["x"], ["t"], domain="com.example")]), tmp_path),
        "model.operator",
    )


def test_operator_in_a_function_that_is_not_standard(tmp_path):
    node = helper.make_node("Secret", ["a"], ["b"], domain="com.example")
    refused(save(with_function(node, ["com.example"]), tmp_path), "model.operator")


def test_operator_newer_than_the_imported_version(tmp_path):
    model = build([helper.make_node("Gelu", ["x"], ["y"])], opset=19)
    assert "Gelu" in refused(save(model, tmp_path), "model.operator").actual


def test_domain_that_is_not_imported(tmp_path):
    node = helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml")
    assert "not imported" in refused(save(build([node]), tmp_path), "model.operator").actual


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../weights.bin", "sub/weights.bin", "..", ".", "", "a\\b", "c:x"]
)
def test_external_data_elsewhere(tmp_path, location):
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(8) + SQUARE.tobytes())
    (folder / "sub").mkdir()
    (folder / "sub" / "weights.bin").write_bytes(bytes(8) + SQUARE.tobytes())
    refused(save_external(folder, location=location), "model.file")


def test_external_data_without_a_location(tmp_path):
    refused(save_external(tmp_path, location=None), "model.file")


def test_external_data_through_a_link(tmp_path):
    path = save_external(tmp_path)
    (tmp_path / "weights.bin").rename(tmp_path / "elsewhere")
    (tmp_path / "weights.bin").symlink_to(tmp_path / "elsewhere")
    refused(path, "model.file")


def test_external_data_in_a_pipe(tmp_path):
    path = save_external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    os.mkfifo(tmp_path / "weights.bin")
    refused(path, "model.file")


def test_external_data_that_is_not_there(tmp_path):
    path = save_external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    refused(path, "model.file")


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "9"},
        {"offset": "-8"},
        {"offset": "x"},
        {"length": "4095"},
        {"length": "4097"},
        {"length": ""},
    ],
    ids=str,
)
def test_external_data_that_does_not_fit(tmp_path, entries):
    refused(save_external(tmp_path, **entries), "model.file")


def test_initializer_with_too_few_bytes(tmp_path):
    model = product()
    model.graph.initializer[0].raw_data = bytes(SQUARE.nbytes - 4)
    refused(save(model, tmp_path), "model.format")


def test_output_that_no_request_can_carry(tmp_path):
    node = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=list(range(32)))
    output = onnx.ValueInfoProto(name="y")
    entry = output.type.sequence_type.elem_type.map_type
    entry.key_type = TensorProto.INT64
    entry.value_type.tensor_type.elem_type = TensorProto.FLOAT
    entry.value_type.tensor_type.shape.SetInParent()
    model = build([node], outputs=[output], domains=["ai.onnx.ml"])
    assert "ZipMap" in refused(save(model, tmp_path), "model.type").hint


def test_without_onnx(tmp_path, monkeypatch):
    path = save(product(), tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "'.[owner]'" in refused(path, "model.onnx").hint


def test_threshold_that_would_move_shapes_out(tmp_path):
    refused(save(product(), tmp_path), "model.min-weight", min_weight=255)


# -- what runs ------------------------------------------------------------------


def branch(then_nodes, initializers=()):
    then = helper.make_graph(
        then_nodes, "then", [], [onnx.ValueInfoProto(name="t", type=Y.type)], list(initializers)
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["e"])], "else", [], [onnx.ValueInfoProto(name="e", type=Y.type)]
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["flag"], to=TensorProto.BOOL),
        helper.make_node("If", ["flag"], ["z"], then_branch=then, else_branch=other),
        helper.make_node("MatMul", ["z", "w"], ["y"]),
    ]
    return build(nodes, {"w": SQUARE})


def with_function(node, domains=()):
    imports = [helper.make_opsetid("", 21), *(helper.make_opsetid(name, 1) for name in domains)]
    function = helper.make_function("local", "Twice", ["a"], ["b"], [node], imports)
    nodes = [
        helper.make_node("Twice", ["x"], ["t"], domain="local"),
        helper.make_node("MatMul", ["t", "w"], ["y"]),
    ]
    return build(nodes, {"w": SQUARE}, domains=["local", *domains], functions=[function])


def test_weights_leave_the_graph(tmp_path):
    split = assert_same(save(product(), tmp_path), INPUT)
    assert bytes(split.weights) == SQUARE.tobytes()
    assert len(split.graph) < 300
    assert split.inputs == (TensorSpec(name="x", datatype="FP32", shape=(-1, 32)),)
    assert split.outputs == (TensorSpec(name="y", datatype="FP32", shape=(-1, 32)),)


def test_weights_are_aligned_and_small_ones_stay(tmp_path):
    odd = RANDOM.random((257, 1), dtype=np.float32)  # 1028 B
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("ReduceSum", ["odd"], ["s"], keepdims=0),
        helper.make_node("Add", ["a", "s"], ["b"]),
        helper.make_node("MatMul", ["b", "v"], ["c"]),
        helper.make_node("Add", ["c", "small"], ["y"]),
    ]
    small = RANDOM.random(32, dtype=np.float32)
    split = assert_same(
        save(build(nodes, {"odd": odd, "w": SQUARE, "v": SQUARE * 2, "small": small}), tmp_path), INPUT
    )
    offsets = {}
    for tensor in onnx.load_from_string(split.graph).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert entries["location"] == "weights"
            offsets[tensor.name] = int(entries["offset"])
    assert offsets == {"odd": 0, "w": 1088, "v": 1088 + 4096}
    assert len(split.weights) == 1088 + 2 * 4096
    assert split.weights[1028:1088] == bytes(60)


def test_threshold_moves_more(tmp_path):
    nodes = [helper.make_node("Add", ["x", "b"], ["y"])]
    path = save(build(nodes, {"b": RANDOM.random((2, 32), dtype=np.float32)[:1].repeat(3, axis=0)}), tmp_path)
    assert not load_model(path).weights
    assert len(assert_same(path, INPUT, min_weight=384).weights) == 384


def test_no_weights_at_all(tmp_path):
    split = assert_same(save(build([helper.make_node("Relu", ["x"], ["y"])]), tmp_path), INPUT)
    assert split.weights == b""


def test_empty_initializer(tmp_path):
    nodes = [
        helper.make_node("Concat", ["x", "none"], ["z"], axis=0),
        helper.make_node("MatMul", ["z", "w"], ["y"]),
    ]
    assert_same(save(build(nodes, {"none": np.zeros((0, 32), np.float32), "w": SQUARE}), tmp_path), INPUT)


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8", "INT32", "INT64", "BOOL"])
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "fields"])
def test_every_kind_of_number(tmp_path, kind, raw):
    number = getattr(TensorProto, kind)
    values = (RANDOM.random((32, 32)) * 4 - (0 if kind == "UINT8" else 2)).astype(
        helper.tensor_dtype_to_np_dtype(number)
    )
    tensor = numpy_helper.from_array(values, "w")
    if not raw:
        tensor = helper.make_tensor("w", number, values.shape, values.flatten().tolist())
        assert not tensor.HasField("raw_data")
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    split = assert_same(save(build(nodes, {"w": tensor}), tmp_path), INPUT)
    assert bytes(split.weights) == values.tobytes()


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "fields"])
def test_numbers_of_four_bits(tmp_path, raw):
    values = RANDOM.integers(-8, 8, (64, 32))
    tensor = helper.make_tensor("w", TensorProto.INT4, values.shape, values.flatten().tolist())
    if raw:
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), "w")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["f"]),
        helper.make_node("MatMul", ["f", "x2"], ["g"]),
        helper.make_node("MatMul", ["x", "g2"], ["y"]),
        helper.make_node("Transpose", ["f"], ["x2"]),
        helper.make_node("Slice", ["g", "zero", "most"], ["g2"]),
    ]
    order = [nodes[0], nodes[3], nodes[1], nodes[4], nodes[2]]
    extra = {
        "scale": np.array(0.5, np.float32),
        "zero": np.zeros(2, np.int64),
        "most": np.full(2, 32, np.int64),
    }
    split = assert_same(save(build(order, {"w": tensor, **extra}), tmp_path), INPUT)
    assert len(split.weights) == values.size // 2


def test_strings_stay(tmp_path):
    tensor = helper.make_tensor("s", TensorProto.STRING, [400], [b"text"] * 400)
    output = helper.make_tensor_value_info("t", TensorProto.STRING, [400])
    model = build(
        [helper.make_node("Identity", ["s"], ["t"]), helper.make_node("Relu", ["x"], ["y"])], {"s": tensor}
    )
    model.graph.output.append(output)
    split = load_model(save(model, tmp_path))
    assert split.weights == b""
    assert split.outputs[1].datatype == "BYTES"
    assert run(split, INPUT)[1].tolist() == ["text"] * 400


def test_subgraph_keeps_its_own_weights(tmp_path):
    inner = numpy_helper.from_array(SQUARE * 3, "inner")
    path = save(branch([helper.make_node("MatMul", ["x", "inner"], ["t"])], [inner]), tmp_path)
    split = assert_same(path, INPUT)
    assert bytes(split.weights) == SQUARE.tobytes()
    assert (SQUARE * 3).tobytes() in split.graph
    assert_same(path, {"x": np.zeros((3, 32), np.float32)})


def test_subgraph_uses_weights_of_the_main_graph(tmp_path):
    split = assert_same(save(branch([helper.make_node("MatMul", ["x", "w"], ["t"])]), tmp_path), INPUT)
    assert len(split.weights) == SQUARE.nbytes


def test_functions_are_inlined(tmp_path):
    split = assert_same(save(with_function(helper.make_node("Add", ["a", "a"], ["b"])), tmp_path), INPUT)
    model = onnx.load_from_string(split.graph)
    assert not model.functions
    assert {node.op_type for node in model.graph.node} == {"Add", "MatMul"}
    assert [entry.domain for entry in model.opset_import] == [""]


@pytest.mark.parametrize("ir_version", [3, 10])
def test_initializer_that_is_an_input_too(tmp_path, ir_version):
    value = helper.make_tensor_value_info("w", TensorProto.FLOAT, [32, 32])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    opset = 8 if ir_version == 3 else 21
    model = build(nodes, {"w": SQUARE}, inputs=[X, value], ir_version=ir_version, opset=opset)
    split = assert_same(save(model, tmp_path), INPUT)
    assert [spec.name for spec in split.inputs] == ["x"]
    assert len(split.weights) == SQUARE.nbytes


def test_external_data_beside_the_model(tmp_path):
    split = assert_same(save_external(tmp_path), INPUT)
    assert bytes(split.weights) == SQUARE.tobytes()


def test_external_data_without_offset_and_length(tmp_path):
    path = save_external(tmp_path, offset=None, length=None)
    (tmp_path / "weights.bin").write_bytes(SQUARE.tobytes())
    assert bytes(assert_same(path, INPUT).weights) == SQUARE.tobytes()


def test_external_data_of_small_tensors_and_attributes_moves_into_the_graph(tmp_path):
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(SQUARE[0] * 5, "value"))
    nodes = [
        constant,
        helper.make_node("Add", ["x", "c"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    model = build(nodes, {"w": SQUARE, "b": SQUARE[1]})
    whole = model.SerializeToString()  # before `onnx.save` moves its tensors
    path = save(
        model,
        tmp_path,
        save_as_external_data=True,
        location="all.bin",
        size_threshold=0,
        convert_attribute=True,
    )
    assert len(path.read_bytes()) < 1000
    split = load_model(path)
    assert bytes(split.weights) == SQUARE.tobytes()
    assert (SQUARE[0] * 5).tobytes() in split.graph
    assert SQUARE[1].tobytes() in split.graph
    plain = onnxruntime.InferenceSession(whole, providers=["CPUExecutionProvider"])
    assert run(split, INPUT)[0].tobytes() == plain.run(None, INPUT)[0].tobytes()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_onnx_runtime_takes_any_buffer(tmp_path, kind):
    path = save(product(), tmp_path)
    split = load_model(path)
    assert run(split, INPUT, weights=kind(split.weights))[0].tobytes() == run(split, INPUT)[0].tobytes()


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_onnx_runtime_keeps_no_reference_to_the_buffer(tmp_path, level):
    """What `SplitModel` promises: once the session exists, its weights may be wiped."""
    split = load_model(save(product(), tmp_path))
    expected = run(split, INPUT)[0]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.add_external_initializers_from_files_in_memory(["weights"], [split.weights], [len(split.weights)])
    session = onnxruntime.InferenceSession(split.graph, options, providers=["CPUExecutionProvider"])
    split.weights[:] = bytes(len(split.weights))
    assert np.array_equal(session.run(None, INPUT)[0], expected)
