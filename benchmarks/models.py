"""The models that benchmarks run, and inputs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from cloister.enclave.worker.session import PREPACK_LIMIT
from cloister.owner.model import load_model

Array = np.ndarray[Any, np.dtype[Any]]

EXAMPLES: Final = Path(__file__).resolve().parents[1] / "examples" / "models"
SYNTHETIC: Final = "synthetic"
IMAGE: Final = (1, 3, 224, 224)  # float32: 602,112 bytes
_LAYERS: Final = ((3, 32, 7, 4), (32, 64, 3, 2), (64, 128, 3, 2))  # channels in, out, kernel, stride
_CLASSES: Final = 1000
_OPSET: Final = 17
_IR_VERSION: Final = 10


def locate(model: str, folder: Path) -> Path:
    """The file that ``--model`` names: an example, a path, or one that is built and written to ``folder``.

    Built are the synthetic one and those of `benchmarks.zoo`.
    """
    from benchmarks import zoo

    if model == SYNTHETIC:
        path = folder / "synthetic.onnx"
        onnx.save(convolutions(), path)
        return path
    if model in zoo.NAMES:
        return zoo.save(model, folder)
    example = EXAMPLES / f"{model}.onnx"
    return example if example.exists() else Path(model)


def convolutions() -> onnx.ModelProto:
    """An image classifier with random weights: 3x224x224 float32 in, 1000 scores out, about 90 MFLOP."""
    random = np.random.default_rng(0)

    def weights(name: str, *shape: int) -> onnx.TensorProto:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return numpy_helper.from_array((random.standard_normal(shape) * scale).astype(np.float32), name)

    nodes, tensors, last = [], [], "image"
    for index, (inside, outside, kernel, stride) in enumerate(_LAYERS):
        tensors.append(weights(f"kernel{index}", outside, inside, kernel, kernel))
        strides, pads = [stride, stride], [kernel // 2] * 4
        inputs = [last, f"kernel{index}"]
        nodes.append(helper.make_node("Conv", inputs, [f"conv{index}"], strides=strides, pads=pads))
        nodes.append(helper.make_node("Relu", [f"conv{index}"], [f"relu{index}"]))
        last = f"relu{index}"
    tensors.append(weights("dense", _CLASSES, _LAYERS[-1][1]))
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "dense"], ["scores"], transB=1))
    graph = helper.make_graph(
        nodes,
        "synthetic",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, list(IMAGE))],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, _CLASSES])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)


def bare_session(model: Path, *, prepacking: bool = True) -> ort.InferenceSession:
    """Plain ONNX Runtime with the worker's options: one thread inside operators and between them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    if not prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def answer(model: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    """What a worker must answer, to the bit.

    Workers run models of `PREPACK_LIMIT` or more without prepacking, whose kernels round differently: plain
    ONNX Runtime without it is then what to compare with.
    """
    prepacking = len(load_model(model).weights) < PREPACK_LIMIT
    session = bare_session(model, prepacking=prepacking)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def sample(session: ort.InferenceSession) -> dict[str, Array]:
    """One random input; a free dimension is 1."""
    random = np.random.default_rng(1)
    inputs: dict[str, Array] = {}
    for spec in session.get_inputs():
        if spec.type != "tensor(float)":
            raise SystemExit(f"the benchmark fills float32 inputs only; {spec.name} is {spec.type}")
        shape = [side if isinstance(side, int) and side > 0 else 1 for side in spec.shape]
        inputs[spec.name] = random.random(shape, dtype=np.float32)
    return inputs
