"""Tensors of the Open Inference Protocol v2 (REST), in JSON and in the binary tensor data extension.

Source: https://github.com/kserve/open-inference-protocol and Triton's binary tensor data extension. Binary
inputs are read and binary outputs are written without a copy of their own. Needs NumPy, as does
`cloister.core.bfloat16`; nothing else in `cloister.core` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cloister.core.bfloat16 import BFLOAT16, bfloat16, bits_of, float32, is_bfloat16
from cloister.errors import InvalidRequest

HEADER_LENGTH: Final = b"inference-header-content-length"
MAX_HEADER: Final = 4 << 20  # bytes of JSON
MAX_ELEMENTS: Final = 1 << 18  # of one tensor that become objects of Python's: JSON, and text in either form
MAX_TENSORS: Final = 256
MAX_RANK: Final = 32
VERSION: Final = "1"  # of every model: a newer one replaces it under a new statement
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
    "BF16": BFLOAT16,
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
        binary: Whether outputs shall be binary where `forms` doesn't say.
        forms: Output name -> whether that output shall be binary.
    """

    inputs: dict[str, Array] = field(repr=False)
    outputs: tuple[str, ...] = ()
    id: str = ""
    binary: bool = False
    forms: dict[str, bool] = field(default_factory=dict)


def datatype(array: Array) -> str:
    """The protocol's name of an array's type; raises InvalidRequest for a type that it doesn't have."""
    if array.dtype.kind in "SU":
        return "BYTES"
    if is_bfloat16(array.dtype):
        return "BF16"
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
    return {"BYTES": "text or bytes", "BF16": "bfloat16"}.get(kind) or DTYPES[kind].name


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
    model: str,
    outputs: dict[str, Array],
    *,
    binary: bool,
    forms: Mapping[str, bool] | None = None,
    request_id: str = "",
) -> tuple[bytes, list[memoryview]]:
    """A response: the JSON header, and the buffers of its binary tensors, which follow it.

    Args:
        model: The model's id.
        outputs: Output name -> array, in the order that was asked for.
        binary: Whether tensors are binary where ``forms`` doesn't say.
        forms: Output name -> whether that tensor is binary.
        request_id: The caller's own; left out where it is empty.
    """
    tensors: list[dict[str, Any]] = []
    buffers: list[memoryview] = []
    for name, array in outputs.items():
        if (forms or {}).get(name, binary):
            tensor, buffer = _binary_tensor(name, array)
            tensors.append(tensor)
            buffers.append(buffer)
        else:
            tensors.append(_json_tensor(name, array))
    header: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": tensors}
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
    request_id = header.get("id", "")
    parameters = header.get("parameters", {})
    if not isinstance(request_id, str) or len(request_id) > 256 or not isinstance(parameters, dict):
        raise _bad("request.header", "id and parameters", "text and a map", "something else")
    wanted = _wanted(header.get("outputs", []))
    return InferenceRequest(
        inputs=_decode_tensors(header["inputs"], binary),
        outputs=tuple(wanted),
        id=request_id,
        binary=parameters.get("binary_data_output") is True,
        forms={name: form for name, form in wanted.items() if form is not None},
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


def _wanted(outputs: Any) -> dict[str, bool | None]:
    """The outputs asked for, in that order, and for each whether it shall be binary; None: it isn't said."""
    wanted: dict[str, bool | None] = {}
    if not isinstance(outputs, list) or len(outputs) > MAX_TENSORS:
        raise _bad("request.outputs", "outputs", f"a list of at most {MAX_TENSORS}", "something else")
    for item in outputs:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or len(name) > 256:
            raise _bad("request.outputs", "outputs", "a list of named outputs", "something else")
        if name in wanted:
            raise _bad("request.duplicate", "output name", "unique", name)
        parameters = item.get("parameters")
        form = parameters.get("binary_data") if isinstance(parameters, dict) else None
        wanted[name] = form if isinstance(form, bool) else None
    return wanted


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
            actual="other bytes",
            hint="" if header_length else "A body with binary tensors needs Inference-Header-Content-Length",
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
        return np.array([*_split_bytes(name, data, count), None], dtype=object)[:-1].reshape(shape)
    if len(data) != count * dtype.itemsize:
        raise _bad(
            "request.binary-size", f"binary data of {name}", f"{count * dtype.itemsize} B", f"{len(data)} B"
        )
    if dtype.kind == "b" and count and np.frombuffer(data, dtype=np.uint8).max() > 1:
        raise _bad("request.data", f"data of {name}", "bytes 0 and 1", "others")
    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    except ValueError as error:  # such as two sides whose product overflows beside one that is zero
        raise InvalidRequest(
            code="request.shape", claim=f"shape of {name}", expected="a possible one", actual="another"
        ) from error


def _split_bytes(name: str, data: memoryview, count: int) -> list[bytes]:
    _require_elements(name, count)
    items: list[bytes] = []
    offset = 0
    for _ in range(count):
        if offset == len(data):
            raise _bad("request.shape", f"elements of {name}", count, len(items))
        end = offset + 4 + int.from_bytes(data[offset : offset + 4], "little")
        if offset + 4 > len(data) or end > len(data):
            raise _bad("request.binary-size", f"binary data of {name}", "whole elements", "a truncated one")
        items.append(bytes(data[offset + 4 : end]))
        offset = end
    if offset != len(data):
        raise _bad("request.shape", f"elements of {name}", count, "more")
    return items


def _require_elements(name: str, count: int) -> None:
    """Refuse more elements than are made objects of Python's, of which each takes the worker microseconds."""
    if count > MAX_ELEMENTS:
        raise InvalidRequest(
            code="request.elements",
            claim=f"elements of {name}, as JSON or as text",
            expected=f"at most {MAX_ELEMENTS}",
            actual=count,
            hint="Send and ask for numbers in binary (binary_data), and text in several requests",
        )


def _from_json(name: str, data: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    _require_elements(name, math.prod(shape))
    flat = _flatten(name, data, shape)
    if dtype.kind == "O":
        if not all(isinstance(item, str) for item in flat):
            raise _bad("request.data", f"data of {name}", "text", "something else")
        try:
            items = [item.encode() for item in flat]
        except UnicodeEncodeError as error:  # JSON can name half a surrogate pair
            raise InvalidRequest(
                code="request.data",
                claim=f"data of {name}",
                expected="Unicode text",
                actual="half a character",
            ) from error
        return np.array([*items, None], dtype=object)[:-1].reshape(shape)
    kinds = {"b": bool, "i": int, "u": int}.get(dtype.kind)
    if not all(type(item) is kinds if kinds else type(item) in (int, float) for item in flat):
        raise _bad("request.data", f"data of {name}", _NAMES[dtype], "another type")
    try:
        with np.errstate(over="raise"):  # a number beyond the datatype must not become infinity
            return _numbers(flat, dtype).reshape(shape)
    except (ValueError, ArithmeticError, TypeError) as error:
        raise InvalidRequest(
            "a value does not fit its datatype",
            code="request.data",
            claim=f"data of {name}",
            expected=_NAMES[dtype],
            actual="a value beyond it",
        ) from error


def _numbers(flat: list[Any], dtype: np.dtype[Any]) -> Array:
    if dtype != BFLOAT16:
        return np.array(flat, dtype=dtype)
    given = np.array(flat, dtype="<f4")
    made = bfloat16(given)
    if not np.array_equal(np.isinf(float32(made)), np.isinf(given)):
        raise OverflowError
    return made


def _flatten(name: str, data: Any, shape: tuple[int, ...]) -> list[Any]:
    """The elements of flat data, or of data nested as the shape is; a scalar may also stand alone."""
    if not shape and not isinstance(data, list):
        data = [data]
    if not isinstance(data, list):
        raise _bad("request.data", f"data of {name}", "a list", "none")
    flat: list[Any] = data
    sides = [len(flat)]
    for _ in shape[1:]:
        if not any(isinstance(item, list) for item in flat):
            break
        if not all(isinstance(item, list) and len(item) == len(flat[0]) for item in flat):
            raise _bad("request.shape", f"data of {name}", "nested evenly", "a mixture")
        sides.append(len(flat[0]))
        flat = [item for part in flat for item in part]
    count = math.prod(shape)
    if len(flat) != count or any(isinstance(item, list) for item in flat):
        raise _bad("request.shape", f"elements of {name}", count, len(flat))
    if len(sides) > 1 and count and tuple(sides) != shape:
        raise _bad("request.shape", f"nesting of {name}", list(shape), sides)
    return flat


def _binary_tensors(arrays: dict[str, Array]) -> tuple[list[dict[str, Any]], list[memoryview]]:
    made = [_binary_tensor(name, array) for name, array in arrays.items()]
    return [tensor for tensor, _ in made], [buffer for _, buffer in made]


def _binary_tensor(name: str, array: Array) -> tuple[dict[str, Any], memoryview]:
    if not isinstance(array, np.ndarray):
        raise _bad("request.datatype", f"input {name}", "a numpy array", type(array).__name__)
    kind = datatype(array)
    if kind == "BYTES":
        _require_elements(name, array.size)
    buffer = _bytes_elements(array) if kind == "BYTES" else _little_endian(array)
    parameters = {"binary_data_size": buffer.nbytes}
    tensor = {"name": name, "datatype": kind, "shape": list(array.shape), "parameters": parameters}
    return tensor, buffer


def _little_endian(array: Array) -> memoryview:
    if is_bfloat16(array.dtype):
        array = bits_of(array)
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
    _require_elements(name, array.size)
    data = (float32(array) if kind == "BF16" else array).reshape(-1).tolist()
    if kind == "BYTES":
        data = [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in data]
    return {"name": name, "datatype": kind, "shape": list(array.shape), "data": data}


def _bad(code: str, claim: str, expected: object, actual: object) -> InvalidRequest:
    return InvalidRequest(code=code, claim=claim, expected=expected, actual=actual)
