"""Tensors of the Open Inference Protocol v2 (REST), in JSON and in the binary tensor data extension.

Source: https://github.com/kserve/open-inference-protocol and Triton's binary tensor data extension. Binary
inputs are read and binary outputs are written without a copy of their own. Needs NumPy; nothing else in
`cloister.core` does.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cloister.errors import InvalidRequest

HEADER_LENGTH: Final = b"inference-header-content-length"
MAX_HEADER: Final = 8 << 20  # bytes of JSON
MAX_TENSORS: Final = 256
MAX_RANK: Final = 32
MAX_TENSOR: Final = 64 << 20  # bytes, as if no side were zero: a model may turn such a side into another

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRequest:
    """An inference request.

    Attributes:
        inputs: Input name -> array; binary inputs are views into the request.
        outputs: Names of the outputs wanted; empty for all.
        id: The caller's own id, echoed.
        binary: Whether the outputs shall be binary.
    """

    inputs: dict[str, Array] = field(repr=False)
    outputs: tuple[str, ...] = ()
    id: str = ""
    binary: bool = True


def datatype(array: Array) -> str:
    """The protocol's name of an array's type; raises InvalidRequest for a type that it doesn't have."""
    if array.dtype.kind in "SU":
        return "BYTES"
    name = _NAMES.get(array.dtype.newbyteorder("<") if array.dtype.kind not in "bO" else array.dtype)
    if name is None:
        raise InvalidRequest(
            "the array's type has no name in the Open Inference Protocol",
            code="request.datatype",
            claim="datatype",
            expected=", ".join(map(numpy_name, DTYPES)),
            actual=array.dtype,
            hint="Convert the array with .astype(...) to the type of the model's input",
        )
    return name


def numpy_name(kind: str) -> str:
    """NumPy's name of a datatype of the protocol, such as ``float32`` for ``FP32``."""
    return "text or bytes" if kind == "BYTES" else DTYPES[kind].name


def encode_request(
    inputs: dict[str, Array], *, outputs: tuple[str, ...] = (), request_id: str = ""
) -> tuple[bytes, list[memoryview]]:
    """A request with binary tensors: the JSON header and the buffers that follow it."""
    tensors, buffers = _binary_tensors(inputs)
    header: dict[str, Any] = {"inputs": tensors, "parameters": {"binary_data_output": True}}
    if outputs:
        header["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    if request_id:
        header["id"] = request_id
    return json.dumps(header, separators=(",", ":")).encode(), buffers


def encode_response(
    model: str, outputs: dict[str, Array], *, binary: bool, request_id: str = ""
) -> tuple[bytes, list[memoryview]]:
    """A response: the JSON header, and the buffers that follow it where the tensors are binary."""
    if binary:
        tensors, buffers = _binary_tensors(outputs)
    else:
        tensors, buffers = [_json_tensor(name, array) for name, array in outputs.items()], []
    header: dict[str, Any] = {"model_name": model, "outputs": tensors}
    if request_id:
        header["id"] = request_id
    return json.dumps(header, separators=(",", ":"), allow_nan=True).encode(), buffers


def decode_request(content: memoryview, header_length: bytes | None) -> InferenceRequest:
    """Read a request.

    Args:
        content: The whole body.
        header_length: Value of `HEADER_LENGTH`; None where the body is JSON alone.

    Raises:
        InvalidRequest: not a request of the protocol; the code says which part.
    """
    header, binary = _split(content, header_length)
    if not isinstance(header.get("inputs"), list) or not header["inputs"]:
        raise _bad("request.inputs", "inputs", "a list of tensors", "none")
    wanted = header.get("outputs", [])
    if not isinstance(wanted, list) or not all(
        isinstance(item, dict) and isinstance(item.get("name"), str) for item in wanted
    ):
        raise _bad("request.outputs", "outputs", "a list of named outputs", "something else")
    request_id = header.get("id", "")
    parameters = header.get("parameters", {})
    if not isinstance(request_id, str) or len(request_id) > 256 or not isinstance(parameters, dict):
        raise _bad("request.header", "id and parameters", "text and a map", "something else")
    asked = [
        item.get("parameters", {}).get("binary_data")
        for item in wanted
        if isinstance(item.get("parameters", {}), dict)
    ]
    return InferenceRequest(
        inputs=_decode_tensors(header["inputs"], binary),
        outputs=tuple(item["name"] for item in wanted),
        id=request_id,
        binary=bool(parameters.get("binary_data_output", any(asked))),
    )


def decode_response(content: memoryview, header_length: bytes | None) -> dict[str, Array]:
    """Read a response: output name -> array, a view into ``content`` where the tensor is binary.

    Raises:
        InvalidRequest: not a response of the protocol.
    """
    header, binary = _split(content, header_length)
    if not isinstance(header.get("outputs"), list):
        raise _bad("request.outputs", "outputs", "a list of tensors", "none")
    return _decode_tensors(header["outputs"], binary)


def _split(content: memoryview, header_length: bytes | None) -> tuple[dict[str, Any], memoryview]:
    length = len(content)
    if header_length is not None:
        if not header_length.isdigit() or len(header_length) > 12 or int(header_length) > length:
            raise _bad(
                "request.header-length", "inference header length", f"at most {length}", "more, or no number"
            )
        length = int(header_length)
    if not 0 < length <= MAX_HEADER:
        raise _bad("request.header", "inference header", f"1 to {MAX_HEADER} B of JSON", f"{length} B")
    try:
        header = json.loads(bytes(content[:length]))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            "the inference header is not JSON",
            code="request.header",
            claim="inference header",
            expected="JSON",
        ) from error
    if not isinstance(header, dict):
        raise _bad("request.header", "inference header", "a JSON object", type(header).__name__)
    return header, content[length:]


def _decode_tensors(tensors: list[Any], binary: memoryview) -> dict[str, Array]:
    if len(tensors) > MAX_TENSORS:
        raise _bad("request.inputs", "tensors", f"at most {MAX_TENSORS}", len(tensors))
    arrays: dict[str, Array] = {}
    offset = 0
    for tensor in tensors:
        name, dtype, shape, size = _tensor_head(tensor)
        if name in arrays:
            raise _bad("request.duplicate", "tensor name", "unique", name)
        if size is None:
            arrays[name] = _from_json(name, tensor.get("data"), dtype, shape)
            continue
        if size > len(binary) - offset:
            raise _bad(
                "request.binary-size",
                f"binary data of {name}",
                f"at most {len(binary) - offset} B",
                f"{size} B",
            )
        arrays[name] = _from_binary(name, binary[offset : offset + size], dtype, shape)
        offset += size
    if offset != len(binary):
        raise _bad("request.binary-size", "binary data", f"{offset} B", f"{len(binary)} B")
    return arrays


def _tensor_head(tensor: Any) -> tuple[str, np.dtype[Any], tuple[int, ...], int | None]:
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str) or len(tensor["name"]) > 256:
        raise _bad("request.tensor", "tensor", "an object with a name", "something else")
    name, shape, kind = tensor["name"], tensor.get("shape"), tensor.get("datatype")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise _bad("request.datatype", f"datatype of {name}", ", ".join(DTYPES), str(kind)[:32])
    valid = isinstance(shape, list) and len(shape) <= MAX_RANK
    if not valid or not all(type(side) is int and 0 <= side < 1 << 40 for side in shape or ()):
        raise _bad("request.shape", f"shape of {name}", f"at most {MAX_RANK} whole numbers", "something else")
    if math.prod(max(side, 1) for side in shape or ()) * min(DTYPES[kind].itemsize, 8) > MAX_TENSOR:
        raise _bad("request.shape", f"size of {name}", f"at most {MAX_TENSOR} B", "more")
    parameters = tensor.get("parameters", {})
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None and (type(size) is not int or size < 0):
        raise _bad(
            "request.binary-size", f"binary data of {name}", "a whole number of bytes", "something else"
        )
    return name, DTYPES[kind], tuple(shape or ()), size


def _from_binary(name: str, data: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    count = math.prod(shape)
    if dtype.kind == "O":
        items = _split_bytes(name, data)
        if len(items) != count:
            raise _bad("request.shape", f"elements of {name}", count, len(items))
        return np.array([*items, None], dtype=object)[:-1].reshape(shape)
    if len(data) != count * dtype.itemsize:
        raise _bad(
            "request.binary-size", f"binary data of {name}", f"{count * dtype.itemsize} B", f"{len(data)} B"
        )
    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    except ValueError as error:  # such as two sides whose product overflows beside one that is zero
        raise InvalidRequest(
            code="request.shape", claim=f"shape of {name}", expected="a possible one"
        ) from error


def _split_bytes(name: str, data: memoryview) -> list[bytes]:
    items, offset = [], 0
    while offset < len(data):
        end = offset + 4 + int.from_bytes(data[offset : offset + 4], "little")
        if offset + 4 > len(data) or end > len(data):
            raise _bad("request.binary-size", f"binary data of {name}", "whole elements", "a truncated one")
        items.append(bytes(data[offset + 4 : end]))
        offset = end
    return items


def _from_json(name: str, data: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    flat = _flatten(name, data, math.prod(shape))
    if dtype.kind == "O":
        if not all(isinstance(item, str) for item in flat):
            raise _bad("request.data", f"data of {name}", "text", "something else")
        try:
            items = [item.encode() for item in flat]
        except UnicodeEncodeError as error:  # JSON can name half a surrogate pair
            raise InvalidRequest(
                code="request.data", claim=f"data of {name}", expected="Unicode text"
            ) from error
        return np.array([*items, None], dtype=object)[:-1].reshape(shape)
    kinds = {"b": bool, "i": int, "u": int}.get(dtype.kind)
    if not all(type(item) is kinds if kinds else type(item) in (int, float) for item in flat):
        raise _bad("request.data", f"data of {name}", dtype, "another type")
    try:
        with np.errstate(over="raise"):  # a number beyond the datatype must not become infinity
            return np.array(flat, dtype=dtype).reshape(shape)
    except (ValueError, ArithmeticError, TypeError) as error:
        raise InvalidRequest(
            "a value does not fit its datatype", code="request.data", claim=f"data of {name}", expected=dtype
        ) from error


def _flatten(name: str, data: Any, count: int) -> list[Any]:
    if not isinstance(data, list):
        raise _bad("request.data", f"data of {name}", "a list", "none")
    flat: list[Any] = data
    for _ in range(MAX_RANK):
        if not any(isinstance(item, list) for item in flat):
            break
        if not all(isinstance(item, list) for item in flat):
            raise _bad("request.shape", f"data of {name}", "nested evenly", "a mixture")
        flat = [item for part in flat for item in part]
    if len(flat) != count or any(isinstance(item, list) for item in flat):
        raise _bad("request.shape", f"elements of {name}", count, len(flat))
    return flat


def _binary_tensors(arrays: dict[str, Array]) -> tuple[list[dict[str, Any]], list[memoryview]]:
    tensors: list[dict[str, Any]] = []
    buffers: list[memoryview] = []
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise _bad("request.datatype", f"input {name}", "a numpy array", type(array).__name__)
        kind = datatype(array)
        buffer = _bytes_elements(array) if kind == "BYTES" else _little_endian(array)
        parameters = {"binary_data_size": buffer.nbytes}
        tensors.append({"name": name, "datatype": kind, "shape": list(array.shape), "parameters": parameters})
        buffers.append(buffer)
    return tensors, buffers


def _little_endian(array: Array) -> memoryview:
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return plain.reshape(-1).view(np.uint8).data if plain.size else memoryview(b"")


def _bytes_elements(array: Array) -> memoryview:
    out = bytearray()
    for item in array.reshape(-1).tolist():
        if not isinstance(item, str | bytes):
            raise _bad("request.data", "data of a BYTES tensor", "text or bytes", type(item).__name__)
        raw = item.encode("utf-8", "replace") if isinstance(item, str) else item
        out += len(raw).to_bytes(4, "little") + raw
    return memoryview(out)


def _json_tensor(name: str, array: Array) -> dict[str, Any]:
    kind = datatype(array)
    data = array.reshape(-1).tolist()
    if kind == "BYTES":
        data = [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in data]
    return {"name": name, "datatype": kind, "shape": list(array.shape), "data": data}


def _bad(code: str, claim: str, expected: object, actual: object) -> InvalidRequest:
    return InvalidRequest(code=code, claim=claim, expected=expected, actual=actual)
