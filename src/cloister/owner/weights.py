"""A model's weights: out of the graph or the files beside it, into one contiguous buffer."""

from __future__ import annotations

import math
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from cloister.core.model import WEIGHTS
from cloister.errors import UsageError
from cloister.owner.graph import other_tensors

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

WEIGHT_ALIGNMENT: Final = 64  # bytes; a cache line, and the widest vector register

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


def check_external(model: ModelProto, folder: Path) -> bool:
    """Refuse external data that lies anywhere but in a regular file beside the model; is there any?

    Raises:
        UsageError: ``model.file``.
    """
    external = [
        tensor for tensor in (*model.graph.initializer, *other_tensors(model)) if _is_external(tensor)
    ]
    for tensor in external:
        _open_external(tensor, folder).close()
    return bool(external)


def move_weights(model: ModelProto, folder: Path, min_weight: int) -> bytearray:
    """Give the buffer of all tensors of ``min_weight`` bytes or more; the others' data goes into the graph.

    The buffer is allocated once, after every size was checked.

    Raises:
        UsageError: ``model.file`` or ``model.format``.
    """
    large: list[tuple[TensorProto, int, int]] = []  # with where it starts and stops in the buffer
    small = list(other_tensors(model))
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
            raise invalid(
                "a tensor's data doesn't fit it", f"tensor {tensor.name!r}", "its shape", ""
            ) from error
    if len(raw) != len(target):
        raise invalid(
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
        raise invalid("a tensor of a type without raw data", f"tensor {tensor.name!r}", "numbers", kind)
    if any(size < 0 for size in tensor.dims):
        raise invalid("a tensor of negative size", f"tensor {tensor.name!r}", "sizes", list(tensor.dims))
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
        raise unreadable(name, error) from error
    file = os.fdopen(handle, "rb")
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size < offset + size:
        file.close()
        _refuse_external(tensor, f"a regular file of {offset + size} B or more", f"{status.st_size} B")
    file.seek(offset)
    return file


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == tensor.EXTERNAL)


def _refuse_external(tensor: TensorProto, expected: str, actual: str) -> NoReturn:
    raise UsageError(
        "external data that isn't what and where it must be",
        code="model.file",
        claim=f"external data of tensor {tensor.name!r}",
        expected=expected,
        actual=actual,
    )


def unreadable(name: str, error: OSError) -> UsageError:
    """The error of a file that can't be read."""
    return UsageError(
        f"can't read {name}",
        code="model.file",
        claim="file",
        expected="readable",
        actual=error.strerror or "an error",
    )


def invalid(message: str, claim: str, expected: object, actual: object) -> UsageError:
    """The error of a model that isn't one."""
    return UsageError(message, code="model.format", claim=claim, expected=expected, actual=actual)
