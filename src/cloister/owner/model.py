"""Read an ONNX model and split it: a small graph, and its weights as one contiguous buffer.

The two parts are the sections of a sealed model. A worker gives them to ONNX Runtime as they are, with
nothing on a disk (`SplitModel`). What a model may hold is decided here, at the owner's desk: standard
operators only, and external data only in regular files beside the model.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from cloister.errors import UsageError

if TYPE_CHECKING:
    from onnx import (
        AttributeProto,
        FunctionProto,
        GraphProto,
        ModelProto,
        NodeProto,
        SparseTensorProto,
        TensorProto,
        ValueInfoProto,
    )

WEIGHTS: Final = "weights"  # the "file" in which the graph says its weights lie
WEIGHT_ALIGNMENT: Final = 64  # bytes; a cache line, and the widest vector register
MIN_WEIGHT: Final = 1024  # bytes; smaller initializers stay in the graph
LEAST_WEIGHT: Final = 256  # bytes; below it, shapes and axes would leave, which shape inference must read
MAX_GRAPH_FILE: Final = (1 << 31) - 1  # bytes; no protobuf message is longer

STANDARD_DOMAINS: Final = ("", "ai.onnx", "ai.onnx.ml")

_DATATYPES: Final = {  # ONNX element type -> Open Inference Protocol datatype
    "BOOL": "BOOL",
    "UINT8": "UINT8",
    "UINT16": "UINT16",
    "UINT32": "UINT32",
    "UINT64": "UINT64",
    "INT8": "INT8",
    "INT16": "INT16",
    "INT32": "INT32",
    "INT64": "INT64",
    "FLOAT16": "FP16",
    "FLOAT": "FP32",
    "DOUBLE": "FP64",
    "BFLOAT16": "BF16",
    "STRING": "BYTES",
}
_PACKED_BITS: Final = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
_DATA_FIELDS: Final = (
    "raw_data",
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "external_data",
    "data_location",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input or an output of a model.

    Attributes:
        name: As in the graph.
        datatype: As the Open Inference Protocol names it: ``"FP32"``, ``"INT64"``, ``"BYTES"``, ...
        shape: One size per axis; -1 where it varies.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitModel:
    """A model in two parts.

    They run, with results identical to the bit to the file's, as::

        options = onnxruntime.SessionOptions()
        options.add_external_initializers_from_files_in_memory(["weights"], [weights], [len(weights)])
        session = onnxruntime.InferenceSession(graph, options)

    ``weights`` may be `bytes`, a `bytearray`, a `memoryview` or an array of bytes, and may be empty. ONNX
    Runtime (1.31, measured) keeps only a pointer in the options and copies every initializer while it makes
    the session, so the peak is twice the weights: keep the buffer until the session exists. With
    ``session.use_external_initializer_file_buffers_directly`` set to ``"1"`` it reads a tensor where it lies
    if that is aligned for its type, as all are here: keep the buffer, unchanged, while the session lives. So
    workers load them.

    Attributes:
        graph: A serialised ONNX model whose large initializers point into ``"weights"``.
        weights: These initializers' raw bytes, each at a multiple of 64 bytes, zeros in between.
        inputs: What a request must give, in the graph's order; initializers that an input may override are
            not listed.
        outputs: What a response gives, in the graph's order.
    """

    graph: bytes
    weights: bytearray
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def load_model(path: str | os.PathLike[str], *, min_weight: int = MIN_WEIGHT) -> SplitModel:
    """Read, check and split the ONNX model at ``path``.

    1. Read and parse the file.
    2. Refuse operators that aren't standard ONNX; functions that the model itself defines are allowed, and
       inlined.
    3. Refuse external data that lies anywhere but in a regular file beside the model.
    4. Run ONNX's own checker.
    5. Move every initializer of the main graph of ``min_weight`` bytes or more into one buffer. Initializers
       of subgraphs (of If, Loop, Scan) stay, because ONNX Runtime doesn't look for those in memory; so do
       strings.

    Args:
        path: An ``.onnx`` file.
        min_weight: In bytes, 256 or more.

    Raises:
        UsageError: it can't be read, or its external data (code ``model.file``); it is no valid ONNX model
            (``model.format``); an operator isn't standard (``model.operator``); an input or output is no
            tensor that a request can carry (``model.type``); ``min_weight`` is too small
            (``model.min-weight``); the owner's extra isn't installed (``model.onnx``).
    """
    if min_weight < LEAST_WEIGHT:
        raise UsageError(
            "initializers this small must stay in the graph",
            code="model.min-weight",
            claim="min_weight",
            expected=f"at least {LEAST_WEIGHT} B",
            actual=f"{min_weight} B",
        )
    file = Path(path)
    data = _read_file(file)
    model = _parse(data)
    _check_operators(model)
    external = [
        tensor for tensor in (*model.graph.initializer, *_other_tensors(model)) if _is_external(tensor)
    ]
    for tensor in external:
        _open_external(tensor, file.parent).close()
    _check(str(file) if external else data)
    model = _inline_functions(model)
    inputs, outputs = _interface(model.graph)
    weights = _move_weights(model, file.parent, min_weight)
    return SplitModel(graph=model.SerializeToString(), weights=weights, inputs=inputs, outputs=outputs)


def _read_file(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > MAX_GRAPH_FILE:
            raise UsageError(
                "an ONNX file of 2 GiB or more",
                code="model.format",
                claim="size",
                expected=f"at most {MAX_GRAPH_FILE} B",
                actual=f"{size} B",
                hint="Save it with external data beside it",
            )
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file.name, error) from error


def _parse(data: bytes) -> ModelProto:
    try:
        import onnx
    except ImportError as error:
        raise UsageError(
            "reading models needs onnx", code="model.onnx", hint="Install cloister[owner]"
        ) from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's, whose module has no types
        raise _invalid("the file is no ONNX model", "content", "an ONNX model", "other bytes") from error
    if not model.HasField("graph"):
        raise _invalid("the file is no ONNX model", "graph", "one", "none")
    if model.training_info:
        raise _invalid(
            "a model to serve has no training graph", "training_info", "none", len(model.training_info)
        )
    return model


def _check(model: str | bytes) -> None:
    import onnx

    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the native checker raises several types, of which one is public
        raise UsageError("ONNX's checker refuses the model", code="model.format", hint=str(error)) from error


def _check_operators(model: ModelProto) -> None:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    own = {(function.domain, function.name) for function in model.functions}
    scopes: list[tuple[GraphProto | FunctionProto, dict[str, int]]] = [(model.graph, versions)]
    for function in model.functions:
        scopes.append((function, {entry.domain: entry.version for entry in function.opset_import}))
    for scope, imported in scopes:
        for node in _nodes(scope):
            if (node.domain, node.op_type) not in own:
                _check_operator(node, imported)


def _check_operator(node: NodeProto, versions: dict[str, int]) -> None:
    import onnx

    domain = "" if node.domain == "ai.onnx" else node.domain
    version = versions.get(domain, versions.get("ai.onnx") if domain == "" else None)
    if node.domain in STANDARD_DOMAINS and version is not None:
        try:
            onnx.defs.get_schema(node.op_type, version, domain)
            return
        except onnx.defs.SchemaError:
            pass
    raise UsageError(
        "an operator that isn't standard ONNX",
        code="model.operator",
        claim=f"operator of node {node.name!r}",
        expected="one of ai.onnx or ai.onnx.ml in an imported version",
        actual=f"{node.domain or 'ai.onnx'}::{node.op_type}, version {version or 'not imported'}",
        hint="Export the model with standard operators only",
    )


def _inline_functions(model: ModelProto) -> ModelProto:
    if model.functions:
        from onnx.inliner import inline_local_functions

        try:
            model = inline_local_functions(model)
        except Exception as error:  # a native extension, as the checker
            raise UsageError("a function of the model can't be inlined", code="model.format") from error
        _check_operators(model)
    kept = [entry for entry in model.opset_import if entry.domain in STANDARD_DOMAINS]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def _nodes(scope: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Every node, those of subgraphs included."""
    for node in scope.node:
        yield node
        for attribute in node.attribute:
            for graph in _graphs(attribute):
                yield from _nodes(graph)


def _graphs(attribute: AttributeProto) -> Iterator[GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def _other_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that is no initializer of the main graph: sparse ones, attributes, those of subgraphs."""
    pending: list[tuple[GraphProto | FunctionProto, bool]] = [(model.graph, True)]
    pending.extend((function, False) for function in model.functions)
    while pending:
        scope, main = pending.pop()
        sparse: list[SparseTensorProto] = []
        if hasattr(scope, "initializer"):
            sparse.extend(scope.sparse_initializer)
            if not main:
                yield from scope.initializer
        for attribute in _attributes(scope):
            pending.extend((graph, False) for graph in _graphs(attribute))
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            sparse.extend(attribute.sparse_tensors)
            if attribute.HasField("sparse_tensor"):
                sparse.append(attribute.sparse_tensor)
        for tensor in sparse:
            yield from (tensor.values, tensor.indices)


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == tensor.EXTERNAL)


def _attributes(scope: GraphProto | FunctionProto) -> Iterator[AttributeProto]:
    if hasattr(scope, "attribute_proto"):
        yield from scope.attribute_proto
    for node in scope.node:
        yield from node.attribute


def _move_weights(model: ModelProto, folder: Path, min_weight: int) -> bytearray:
    """Put every tensor where it belongs; the buffer is allocated once, after every size was checked."""
    large: list[tuple[TensorProto, int, int]] = []  # with where it starts and stops in the buffer
    small = list(_other_tensors(model))
    end = 0
    for tensor in model.graph.initializer:
        if tensor.data_type == tensor.STRING or _size(tensor) < min_weight:
            small.append(tensor)
        else:
            start = -(-end // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
            end = start + _size(tensor)
            large.append((tensor, start, end))
    for tensor in small:
        if _is_external(tensor):
            data = bytearray(_size(tensor))
            _copy_data(tensor, folder, memoryview(data))
            _clear_data(tensor)
            tensor.raw_data = bytes(data)
    weights = bytearray(end)
    view = memoryview(weights)
    for tensor, start, stop in large:
        _copy_data(tensor, folder, view[start:stop])
        _clear_data(tensor)
        tensor.data_location = tensor.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", start), ("length", stop - start)):
            tensor.external_data.add(key=key, value=str(value))
    return weights


def _copy_data(tensor: TensorProto, folder: Path, target: memoryview) -> None:
    """Put the tensor's raw bytes into ``target``, which has their length."""
    if _is_external(tensor):
        with _open_external(tensor, folder) as file:
            if file.readinto(target) != len(target):
                _refuse_external(tensor, "as many bytes as the tensor has", "fewer")
        return
    from onnx import numpy_helper

    raw = tensor.raw_data
    if not tensor.HasField("raw_data"):
        try:
            raw = numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
        except Exception as error:  # numpy's and onnx's own, for fields that hold too little
            raise _invalid(
                "a tensor's data doesn't fit it", f"tensor {tensor.name!r}", "its shape", ""
            ) from error
    if len(raw) != len(target):
        raise _invalid(
            "a tensor's data doesn't fit it", f"tensor {tensor.name!r}", f"{len(target)} B", f"{len(raw)} B"
        )
    target[:] = raw


def _clear_data(tensor: TensorProto) -> None:
    for field in _DATA_FIELDS:
        tensor.ClearField(field)


def _size(tensor: TensorProto) -> int:
    """Bytes of the tensor's raw data, from its shape and type."""
    from onnx import helper

    kind = (
        tensor.DataType.Name(tensor.data_type) if tensor.data_type in tensor.DataType.values() else "unknown"
    )
    if kind in ("UNDEFINED", "unknown") or (kind == "STRING" and _is_external(tensor)):
        raise _invalid("a tensor of a type without raw data", f"tensor {tensor.name!r}", "numbers", kind)
    if any(size < 0 for size in tensor.dims):
        raise _invalid("a tensor of negative size", f"tensor {tensor.name!r}", "sizes", list(tensor.dims))
    bits: int = _PACKED_BITS.get(kind) or helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    return int(-(-math.prod(tensor.dims) * bits // 8))


def _open_external(tensor: TensorProto, folder: Path) -> BufferedReader:
    """Open the file that holds the tensor, at its first byte; it holds the whole tensor."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name = entries.get("location", "")
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0", ":")):
        _refuse_external(tensor, "the name of a file beside the model", repr(name))
    size = _size(tensor)
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", size))
    except ValueError:
        _refuse_external(tensor, "offset and length in digits", "others")
    if offset < 0 or length != size:
        _refuse_external(tensor, f"{size} B", f"{length} B at {offset}")
    try:
        # A link could name any file of the owner's, and the seal would carry its bytes; a pipe would block.
        handle = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise _unreadable(name, error) from error
    file = os.fdopen(handle, "rb")
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size < offset + size:
        file.close()
        _refuse_external(tensor, f"a regular file of {offset + size} B or more", f"{status.st_size} B")
    file.seek(offset)
    return file


def _interface(graph: GraphProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    given = {tensor.name for tensor in graph.initializer}
    given.update(sparse.values.name for sparse in graph.sparse_initializer)
    inputs = tuple(_describe(value) for value in graph.input if value.name not in given)
    return inputs, tuple(_describe(value) for value in graph.output)


def _describe(value: ValueInfoProto) -> TensorSpec:
    from onnx import TensorProto

    kind = str(value.type.WhichOneof("value") or "nothing")
    if kind == "tensor_type":
        tensor = value.type.tensor_type
        kind = TensorProto.DataType.Name(tensor.elem_type)
        if kind in _DATATYPES:
            shape = tuple(
                size.dim_value if size.HasField("dim_value") and size.dim_value >= 0 else -1
                for size in tensor.shape.dim
            )
            return TensorSpec(name=value.name, datatype=_DATATYPES[kind], shape=shape)
    raise UsageError(
        "an input or output that no request can carry",
        code="model.type",
        claim=f"type of {value.name!r}",
        expected="a tensor of numbers, truth values or strings",
        actual=kind,
        hint="Export classifiers without ZipMap",
    )


def _refuse_external(tensor: TensorProto, expected: str, actual: str) -> NoReturn:
    raise UsageError(
        "external data that isn't what and where it must be",
        code="model.file",
        claim=f"external data of tensor {tensor.name!r}",
        expected=expected,
        actual=actual,
    )


def _unreadable(name: str, error: OSError) -> UsageError:
    return UsageError(
        f"can't read {name}",
        code="model.file",
        claim="file",
        expected="readable",
        actual=error.strerror or "an error",
    )


def _invalid(message: str, claim: str, expected: object, actual: object) -> UsageError:
    return UsageError(message, code="model.format", claim=claim, expected=expected, actual=actual)
