"""What a graph refers to, read from its protocol buffer without loading it.

ONNX lets a graph name files for its weights and operators of any domain. Inside an enclave a file name would
be a path of the enclave's own machine, so the only name allowed is that of the sealed model's own weights
(DESIGN, 4.10). Source: onnx.proto3 (field numbers below); the wire format is
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cloister.core.model import STANDARD_DOMAINS, WEIGHTS
from cloister.errors import FormatError, InvalidRequest

MAX_DEPTH: Final = 128  # of messages inside messages

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_TAG: Final = (1 << 32) - 1  # a parser that cuts a longer one would see another field than we

# message: {field number: message that it holds}. Only the ways that lead to tensors and operators.
_CHILDREN: Final[dict[str, dict[int, str]]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_NODE_DOMAIN: Final = 7
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


def require_safe(graph: bytes | memoryview) -> None:
    """Refuse a graph that names operators of other domains or files other than its own weights.

    Raises:
        FormatError: not a model's protocol buffer.
        InvalidRequest: it names something that no enclave loads.
    """
    _walk("Model", memoryview(graph), 0)


def _walk(kind: str, message: memoryview, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FormatError(claim="graph nesting", expected=f"at most {MAX_DEPTH}", actual="more")
    children = _CHILDREN[kind]
    for number, value in _fields(message):
        child = children.get(number)
        if child == "Entry":
            _require_location({field: _text(item) for field, item in _fields(value)})
        elif child is not None:
            _walk(child, value, depth + 1)
        elif kind == "Node" and number == _NODE_DOMAIN and _text(value) not in STANDARD_DOMAINS:
            raise InvalidRequest(
                "the model uses an operator that isn't standard ONNX",
                code="model.operator",
                claim="operator domain",
                expected="ai.onnx or ai.onnx.ml",
                actual=_text(value)[:80],
            )


def _require_location(entry: dict[int, str]) -> None:
    if entry.get(_ENTRY_KEY) == "location" and entry.get(_ENTRY_VALUE) != WEIGHTS:
        raise InvalidRequest(
            "the model names a file for its weights",
            code="model.external-data",
            claim="external data location",
            expected=WEIGHTS,
            actual="another path",
        )


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, bytes) of each length-delimited field; others are passed over."""
    offset = 0
    while offset < len(message):
        tag, offset = _varint(message, offset)
        if not 8 <= tag <= _MAX_TAG:
            raise FormatError("the graph is no protocol buffer", code="model.format")
        wire = tag & 7
        if wire == _BYTES:
            length, offset = _varint(message, offset)
            if length > len(message) - offset:
                raise FormatError("the graph is cut short", code="model.format")
            yield tag >> 3, message[offset : offset + length]
            offset += length
        elif wire == _VARINT:
            _, offset = _varint(message, offset)
        elif wire in (_FIXED64, _FIXED32):
            offset += 8 if wire == _FIXED64 else 4
        else:
            raise FormatError("the graph is no protocol buffer", code="model.format")


def _varint(message: memoryview, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(message):
            break
        byte = message[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise FormatError("the graph is no protocol buffer", code="model.format")


def _text(value: memoryview) -> str:
    return bytes(value).decode("utf-8", "replace")
