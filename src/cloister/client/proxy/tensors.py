"""gRPC's form of an inference to the inner one, and back: a JSON header, then tensors as in memory.

Nothing is checked here that the enclave checks anyway; only what would change meaning on the way is refused.
"""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np

from cloister.client.proxy.messages import message
from cloister.core import oip
from cloister.errors import CloisterError, InvalidRequest

InferResponse: Final = message("ModelInferResponse")
_SIZE: Final = "binary_data_size"
# datatype -> the field of InferTensorContents that holds it. Types of 16 bits have none: raw only.
_CONTENTS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def to_inner(request: Any) -> tuple[bytes, bytes]:
    """The inner body of a ModelInferRequest, and the length of its JSON header in ASCII digits.

    Raises:
        InvalidRequest: contents in two forms, in none, or in a field of another datatype.
    """
    buffers = _buffers(request)
    inputs = []
    for tensor, buffer in zip(request.inputs, buffers, strict=True):
        parameters = _parameters(tensor.parameters) | {_SIZE: len(buffer)}
        inputs.append(
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": parameters,
            }
        )
    header: dict[str, Any] = {
        "inputs": inputs,
        "parameters": _parameters(request.parameters) | {"binary_data_output": True},
    }
    if request.id:
        header["id"] = request.id
    if request.outputs:
        header["outputs"] = [
            {"name": each.name, "parameters": _parameters(each.parameters) | {"binary_data": True}}
            for each in request.outputs
        ]
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join((text, *buffers)), b"%d" % len(text)


def from_inner(content: memoryview, header_length: bytes | None) -> Any:
    """The ModelInferResponse of an inner answer; raises CloisterError where it can't be read."""
    try:
        length = int(header_length or b"")
        header = json.loads(bytes(content[:length]))
        response = InferResponse(
            model_name=header.get("model_name", ""),
            model_version=str(header.get("model_version", "")),
            id=header.get("id", ""),
        )
        _set_parameters(response.parameters, header.get("parameters", {}))
        offset = length
        for tensor in header["outputs"]:
            parameters = dict(tensor["parameters"])
            size = parameters.pop(_SIZE)
            output = response.outputs.add(name=tensor["name"], datatype=tensor["datatype"])
            output.shape.extend(tensor["shape"])
            _set_parameters(output.parameters, parameters)
            end = offset + size
            if not 0 <= size <= len(content) - offset:
                raise ValueError
            response.raw_output_contents.append(bytes(content[offset:end]))
            offset = end
        if offset != len(content):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CloisterError("the enclave's answer can't be read", code="problem") from error
    return response


def _buffers(request: Any) -> list[bytes]:
    """One buffer for each input, raw or from its typed contents."""
    typed = [tensor for tensor in request.inputs if tensor.HasField("contents")]
    raw = list(request.raw_input_contents)
    if typed and raw:
        raise _bad("contents", "raw or typed, not both", "both")
    if typed:
        return [_pack(tensor) for tensor in request.inputs]
    if len(raw) != len(request.inputs):
        raise _bad("raw_input_contents", len(request.inputs), len(raw))
    return raw


def _pack(tensor: Any) -> bytes:
    """A tensor's typed contents as they are in memory, little endian."""
    name = f"contents of {tensor.name[:80]}"
    field = _CONTENTS.get(tensor.datatype)
    given = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if field is None:
        raise _bad(name, f"raw, for {tensor.datatype[:16]}", "typed")
    if given not in ([], [field]):
        raise _bad(name, field, ", ".join(given))
    values = getattr(tensor.contents, field)
    if tensor.datatype == "BYTES":
        return b"".join(part for value in values for part in (len(value).to_bytes(4, "little"), value))
    dtype = oip.DTYPES[tensor.datatype]
    try:
        return np.array(list(values), dtype=dtype).tobytes()
    except OverflowError as error:
        raise _bad(name, tensor.datatype, "a number beyond it") from error


def _parameters(parameters: Any) -> dict[str, Any]:
    found = {}
    for name, value in parameters.items():
        choice = value.WhichOneof("parameter_choice")
        if choice is None:
            raise _bad(f"parameter {name[:80]}", "a value", "none")
        if name.startswith("shared_memory_"):
            raise _bad("contents", "in the request", "in shared memory, which no enclave reads")
        found[name] = getattr(value, choice)
    return found


def _set_parameters(target: Any, parameters: dict[str, Any]) -> None:
    for name, value in parameters.items():
        match value:
            case bool():
                target[name].bool_param = value
            case int() if value < 1 << 63:
                target[name].int64_param = value
            case int():
                target[name].uint64_param = value
            case float():
                target[name].double_param = value
            case _:
                target[name].string_param = str(value)


def _bad(claim: str, expected: object, actual: object) -> InvalidRequest:
    return InvalidRequest(code="request.contents", claim=claim, expected=expected, actual=actual)
