"""What an owner and a worker must agree on about ONNX models. Reads no graph, and needs no NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WEIGHTS: Final = "weights"  # the "file" in which a graph says its weights lie, and their section when sealed
STANDARD_DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml"})  # of operators
DATATYPES: Final = {  # ONNX element type -> datatype of the Open Inference Protocol
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
    "BFLOAT16": "BF16",
    "FLOAT": "FP32",
    "DOUBLE": "FP64",
    "STRING": "BYTES",
}


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
