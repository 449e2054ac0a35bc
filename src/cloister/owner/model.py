"""Read an ONNX model and split it: a small graph, and its weights as one contiguous buffer.

The two parts are the sections of a sealed model. A worker gives them to ONNX Runtime as they are, with
nothing on a disk (`SplitModel`). What a model may hold is decided here, at the owner's desk: standard
operators only, and external data only in regular files beside the model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cloister.core.model import DATATYPES, STANDARD_DOMAINS, TensorSpec
from cloister.errors import UsageError
from cloister.owner.graph import nodes
from cloister.owner.weights import check_external, invalid, move_weights, unreadable

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, ValueInfoProto

MIN_WEIGHT: Final = 1024  # bytes; smaller initializers stay in the graph
LEAST_WEIGHT: Final = 256  # bytes; below it, shapes and axes would leave, which shape inference must read
MAX_GRAPH_FILE: Final = (1 << 31) - 1  # bytes; no protobuf message is longer


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
    external = check_external(model, file.parent)
    _check(str(file) if external else data)
    model = _inline_functions(model)
    inputs, outputs = _interface(model.graph)
    weights = move_weights(model, file.parent, min_weight)
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
        raise unreadable(file.name, error) from error


def _parse(data: bytes) -> ModelProto:
    try:
        import onnx
    except ImportError as error:
        raise UsageError(
            "reading models needs onnx", code="model.onnx", hint="In a checkout: pip install '.[owner]'"
        ) from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's, whose module has no types
        raise invalid("the file is no ONNX model", "content", "an ONNX model", "other bytes") from error
    if not model.HasField("graph"):
        raise invalid("the file is no ONNX model", "graph", "one", "none")
    if model.training_info:
        raise invalid(
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
        for node in nodes(scope):
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
        if kind in DATATYPES:
            shape = tuple(
                size.dim_value if size.HasField("dim_value") and size.dim_value >= 0 else -1
                for size in tensor.shape.dim
            )
            return TensorSpec(name=value.name, datatype=DATATYPES[kind], shape=shape)
    raise UsageError(
        "an input or output that no request can carry",
        code="model.type",
        claim=f"type of {value.name!r}",
        expected="a tensor of numbers, truth values or strings",
        actual=kind,
        hint="Export classifiers without ZipMap",
    )
