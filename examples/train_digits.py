"""Train a small convolutional network on handwritten digits with JAX, and export it to ONNX.

    python examples/train_digits.py [models/digits.onnx]

Input ``image``: float32 (N, 1, 8, 8), 0..1. Output ``probabilities``: float32 (N, 10). Trains on the CPU in a
few seconds, always from the same seed.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from datasets import Array, digits_test, digits_train

MODEL = Path(__file__).parent / "models" / "digits.onnx"
OPSET = 21
EPOCHS, BATCH, RATE, DECAY = 40, 64, 3e-3, 1e-4

Parameters = dict[str, Any]


def main(path: Path = MODEL) -> float:
    """Train, write the model to ``path``, print and return its accuracy on the test split."""
    parameters = train()
    images, digits = digits_test()
    accuracy = float((np.argmax(logits(parameters, images), axis=1) == digits).mean())
    onnx.save(export(parameters), path)
    print(f"{path.name}: test accuracy {accuracy:.4f} on {len(digits)} images")
    return accuracy


def train(seed: int = 0) -> Parameters:
    """Adam with weight decay on the cross-entropy; half of the batches are shifted by up to one pixel."""
    images, digits = digits_train()
    parameters = initialise(jax.random.key(seed))
    state = (parameters, *(jax.tree.map(jnp.zeros_like, parameters) for _ in range(2)))
    order = np.random.default_rng(seed)
    steps = len(digits) // BATCH
    for epoch in range(EPOCHS):
        rows = order.permutation(len(digits))[: steps * BATCH].reshape(steps, BATCH)
        for number, batch in enumerate(rows, start=1 + epoch * steps):
            inputs = images[batch]
            if order.random() < 0.5:
                inputs = _shift(inputs, *order.integers(-1, 2, size=2))
            state = step(state, inputs, digits[batch], number / (EPOCHS * steps), number)
    return dict(state[0])


def initialise(key: Any) -> Parameters:
    """He initialisation; convolutions (out, in, height, width), dense layers (out, in)."""
    shapes = {"conv1": (16, 1, 3, 3), "conv2": (32, 16, 3, 3), "dense1": (64, 128), "dense2": (10, 64)}
    parameters: Parameters = {}
    for part, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
        scale = np.sqrt(2 / np.prod(shape[1:]))
        parameters[f"{name}.weight"] = scale * jax.random.normal(part, shape, jnp.float32)
        parameters[f"{name}.bias"] = jnp.zeros(shape[0], jnp.float32)
    return parameters


@jax.jit
def logits(parameters: Parameters, images: Array) -> jax.Array:
    """Scores before the softmax: (N, 1, 8, 8) to (N, 10)."""
    values = jnp.asarray(images)
    for name in ("conv1", "conv2"):
        values = jax.lax.conv(values, parameters[f"{name}.weight"], (1, 1), "SAME")
        values = jax.nn.relu(values + parameters[f"{name}.bias"][:, None, None])
        values = jax.lax.reduce_window(values, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    values = values.reshape(len(values), -1)
    values = jax.nn.relu(values @ parameters["dense1.weight"].T + parameters["dense1.bias"])
    scores: jax.Array = values @ parameters["dense2.weight"].T + parameters["dense2.bias"]
    return scores


@partial(jax.jit, donate_argnums=0)
def step(state: Any, images: Array, digits: Array, progress: float, number: int) -> Any:
    """One step of Adam (Kingma and Ba, 2015), with decoupled weight decay and a cosine schedule."""
    parameters, means, squares = state

    def loss(values: Parameters) -> jax.Array:
        scores = jax.nn.log_softmax(logits(values, images))
        return -jnp.take_along_axis(scores, digits[:, None], axis=1).mean()

    gradient = jax.grad(loss)(parameters)
    rate = RATE * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    means = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, means, gradient)
    squares = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, squares, gradient)

    def update(value: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
        direction = mean / (1 - 0.9**number) / (jnp.sqrt(square / (1 - 0.999**number)) + 1e-8)
        return value - rate * (direction + DECAY * value)

    return jax.tree.map(update, parameters, means, squares), means, squares


def export(parameters: Parameters) -> onnx.ModelProto:
    """The same network as ONNX, softmax included."""
    same: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    halve: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2]}
    nodes = [
        helper.make_node("Conv", ["image", "conv1.weight", "conv1.bias"], ["conv1"], **same),
        helper.make_node("Relu", ["conv1"], ["relu1"]),
        helper.make_node("MaxPool", ["relu1"], ["pool1"], **halve),
        helper.make_node("Conv", ["pool1", "conv2.weight", "conv2.bias"], ["conv2"], **same),
        helper.make_node("Relu", ["conv2"], ["relu2"]),
        helper.make_node("MaxPool", ["relu2"], ["pool2"], **halve),
        helper.make_node("Flatten", ["pool2"], ["flat"]),
        helper.make_node("Gemm", ["flat", "dense1.weight", "dense1.bias"], ["dense1"], transB=1),
        helper.make_node("Relu", ["dense1"], ["relu3"]),
        helper.make_node("Gemm", ["relu3", "dense2.weight", "dense2.bias"], ["scores"], transB=1),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in sorted(parameters.items())],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
        producer_name="cloister-examples",
    )
    onnx.checker.check_model(model)
    return model


def _shift(images: Array, down: int, right: int) -> Array:
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return padded[:, :, 1 - down : 9 - down, 1 - right : 9 - right]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
