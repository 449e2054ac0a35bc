"""Runs models that take or give bfloat16, which ONNX Runtime's NumPy interface can't carry.

Their tensors go in and out as `OrtValue`. Of a bfloat16 output ONNX Runtime 1.31 gives the address alone,
from which its bytes are copied while the value lives. It makes no such values of strings, so a model that has
bfloat16 and takes strings can't run.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from cloister.core.bfloat16 import BFLOAT16, Array

_ELEMENT: Final = 16  # onnx.TensorProto.BFLOAT16
_TYPE: Final = "tensor(bfloat16)"


def run(session: ort.InferenceSession, names: list[str], inputs: dict[str, Array]) -> list[Array]:
    """Run a session on arrays, some of them of `BFLOAT16`; gives the named outputs in order."""
    values = {name: _value(array) for name, array in inputs.items()}
    return [_array(value) for value in session.run_with_ort_values(names, values)]


def _value(array: Array) -> Any:
    if array.dtype != BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy(array)
    bits = np.ascontiguousarray(array).view("<u2").reshape(array.shape)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ELEMENT)


def _array(value: Any) -> Array:
    if value.data_type() != _TYPE:
        array: Array = value.numpy()
        return array
    shape = tuple(value.shape())
    size = int(np.prod(shape, dtype=np.int64)) * BFLOAT16.itemsize
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(raw, dtype=BFLOAT16).reshape(shape)
