"""What an ONNX model holds, in subgraphs and functions too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import (
        AttributeProto,
        FunctionProto,
        GraphProto,
        ModelProto,
        NodeProto,
        SparseTensorProto,
        TensorProto,
    )


def nodes(scope: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Every node, those of subgraphs included."""
    for node in scope.node:
        yield node
        for attribute in node.attribute:
            for graph in _graphs(attribute):
                yield from nodes(graph)


def _graphs(attribute: AttributeProto) -> Iterator[GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def other_tensors(model: ModelProto) -> Iterator[TensorProto]:
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


def _attributes(scope: GraphProto | FunctionProto) -> Iterator[AttributeProto]:
    if hasattr(scope, "attribute_proto"):
        yield from scope.attribute_proto
    for node in scope.node:
        yield from node.attribute
