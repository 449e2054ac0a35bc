"""Well-known image classifiers as ONNX models with random weights.

    python -m benchmarks.zoo [NAME ...] --into DIR

Input ``input``: float32 (batch, 3, side, side). Output ``logits``: float32 (batch, 1000). The batch is free;
the side is 224, and 299 for InceptionV3. Weights come from a seed: normal with He's variance (He et al.,
2015, arXiv:1502.01852), and small normal biases, so activations keep their size and outputs differ from class
to class. Batch normalization stays a node of its own, as parameters are counted before it is folded into a
convolution. Where it follows one, ONNX Runtime folds it when it loads the model.

What each is built after, and where its number of parameters is published:

- ResNet, VGG, InceptionV3, DenseNet: torchvision's; ``num_params`` in its documentation, as at
  https://pytorch.org/vision/stable/models/generated/torchvision.models.resnet18.html. InceptionV3 has
  27,161,264 there, 3,326,696 of them in the auxiliary classifier. Only training uses that, so models exported
  for inference lack it, and so does this one: 23,834,568, as in the tables of
  https://github.com/osmr/imgclsmob.
- MobileNetV1 (1.0, 224): Keras's. https://keras.io/api/applications rounds its 4,253,864 to 4.3 M;
  ``keras.applications.MobileNet().summary()`` splits them into 4,231,976 trainable ones and 21,888 others.

Counted are weights, biases, and the scale and shift of batch normalization. Its mean and variance aren't:
PyTorch calls them buffers, Keras non-trainable.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.models import bare_session, sample
from benchmarks.report import Report, Rows, Samples, console

PARAMETERS: Final[Mapping[str, int]] = {
    "MobileNetV1": 4_231_976,
    "ResNet18": 11_689_512,
    "ResNet50": 25_557_032,
    "ResNet101": 44_549_160,
    "ResNet152": 60_192_808,
    "VGG19": 143_667_240,
    "InceptionV3": 23_834_568,
    "DenseNet121": 7_978_856,
    "DenseNet201": 20_013_928,
}
NAMES: Final = tuple(PARAMETERS)
# (channels, height, width) of one image; the batch comes before them.
INPUTS: Final[Mapping[str, tuple[int, int, int]]] = {
    name: (3, 299, 299) if name == "InceptionV3" else (3, 224, 224) for name in NAMES
}
CLASSES: Final = 1000
RUNS: Final = 5
_OPSET: Final = 21
_IR_VERSION: Final = 10
_BIAS: Final = 0.1  # standard deviation of biases
_FLOAT: Final = "<f4"  # as ONNX stores it

_Size = int | tuple[int, int]


def build(name: str, *, seed: int = 0) -> onnx.ModelProto:
    """A model in memory; the same seed gives the same bytes.

    Raises:
        ValueError: No model here has this name.
    """
    graph = _Graph(_known(name), seed)
    _BUILDERS[name](graph)
    graph.model.graph.node[-1].output[0] = "logits"
    return graph.model


def save(name: str, folder: Path, *, external: bool = False) -> Path:
    """Write a model of seed 0 to ``NAME.onnx``; ``external`` moves its weights to ``NAME.data``."""
    path, data = folder / f"{name}.onnx", folder / f"{name}.data"
    model = build(name)
    if external:
        data.unlink(missing_ok=True)  # onnx appends to one that is there
        onnx.save(model, path, save_as_external_data=True, location=data.name)
    else:
        onnx.save(model, path)
    return path


def parameters(model: onnx.ModelProto) -> int:
    """How many parameters a model built here has; see the module for what counts."""
    counted = (each for each in model.graph.initializer if each.name.endswith((".weight", ".bias")))
    return sum(math.prod(each.dims) for each in counted)


def run(arguments: Sequence[str]) -> Report:
    """Write the models that are named, or all, and time each in bare ONNX Runtime."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        names = tuple(dict.fromkeys(map(_known, options.names))) or NAMES
    except ValueError as error:
        parser.error(str(error))
    options.into.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, name in enumerate(names, start=1):
        console.print(f"{number}/{len(names)} {name}: building", style="dim")
        path = save(name, options.into, external=options.external)
        files = [path, path.with_suffix(".data")] if options.external else [path]
        size = sum(file.stat().st_size for file in files) / 1e6
        console.print(f"{number}/{len(names)} {name}: timing", style="dim")
        shape = "x".join(map(str, INPUTS[name]))
        rows.append((name, PARAMETERS[name], size, shape, _time(path).ms(0.5)))
    keys = ("parameters", "size_mb", "input", "bare_ms_p50")
    columns = ("model", "parameters", "MB", "input", "bare p50 ms")
    return Report(
        benchmark="zoo",
        runs=RUNS,
        figures={"models": {model: dict(zip(keys, row, strict=True)) for model, *row in rows}},
        tables=(Rows(title="Models with random weights", columns=columns, rows=tuple(rows)),),
        setting="Bare ONNX Runtime, one thread, one image.",
    )


class _Value(NamedTuple):
    """What a node gives: its name and the size of its second axis."""

    name: str
    channels: int


class _Graph:
    """A model that grows node by node; weights are added in place, as copies of them would cost memory."""

    def __init__(self, name: str, seed: int) -> None:
        shape: list[str | int | None] = ["batch", *INPUTS[name]]
        graph = helper.make_graph(
            [],
            name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        )
        opsets = [helper.make_opsetid("", _OPSET)]
        self.model = helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="cloister-benchmarks"
        )
        self.input = _Value("input", INPUTS[name][0])
        self._random = np.random.default_rng(seed)

    def conv(
        self,
        x: _Value,
        channels: int,
        kernel: _Size = 1,
        *,
        stride: int = 1,
        same: bool = True,
        groups: int = 1,
        bias: bool = False,
    ) -> _Value:
        """A convolution; ``same`` pads so that a stride of 1 keeps the size, else nothing is padded."""
        name = self._name("conv")
        sides = _pair(kernel)
        shape = (channels, x.channels // groups, *sides)
        inputs = [x.name, self._weight(name, shape), *([self._bias(name, channels)] if bias else [])]
        window = _window(sides, stride, same)
        return _Value(self._node("Conv", name, inputs, group=groups, **window), channels)

    def bn(self, x: _Value, *, gain: float = 1.0, epsilon: float = 1e-5) -> _Value:
        """Batch normalization of mean 0 and variance 1 that multiplies by ``gain``."""
        name = self._name("bn")
        inputs = [
            x.name,
            self._constant(f"{name}.weight", (x.channels,), gain),
            self._bias(name, x.channels),
            self._constant(f"{name}.mean", (x.channels,), 0),
            self._constant(f"{name}.variance", (x.channels,), 1),
        ]
        return x._replace(name=self._node("BatchNormalization", name, inputs, epsilon=epsilon))

    def relu(self, x: _Value) -> _Value:
        """The positive part."""
        return x._replace(name=self._node("Relu", self._name("relu"), [x.name]))

    def relu6(self, x: _Value) -> _Value:
        """The positive part, cut at 6."""
        name = self._name("relu")
        low = self._constant(f"{name}.low", (), 0)
        high = self._constant(f"{name}.high", (), 6)
        return x._replace(name=self._node("Clip", name, [x.name, low, high]))

    def unit(
        self,
        x: _Value,
        channels: int,
        kernel: _Size = 1,
        *,
        stride: int = 1,
        same: bool = True,
        epsilon: float = 1e-5,
    ) -> _Value:
        """Convolution, batch normalization, ReLU."""
        return self.relu(self.bn(self.conv(x, channels, kernel, stride=stride, same=same), epsilon=epsilon))

    def max_pool(self, x: _Value, kernel: int, *, stride: int, same: bool = True) -> _Value:
        """The largest value of each window."""
        window = _window((kernel, kernel), stride, same)
        return x._replace(name=self._node("MaxPool", self._name("pool"), [x.name], **window))

    def average_pool(self, x: _Value, kernel: int, *, stride: int) -> _Value:
        """The mean of each window, padding included as in PyTorch."""
        window = _window((kernel, kernel), stride, same=True)
        node = self._node("AveragePool", self._name("pool"), [x.name], count_include_pad=1, **window)
        return x._replace(name=node)

    def add(self, x: _Value, y: _Value) -> _Value:
        """The sum of two values of one shape."""
        return x._replace(name=self._node("Add", self._name("add"), [x.name, y.name]))

    def concat(self, *values: _Value) -> _Value:
        """All channels of all values."""
        names = [value.name for value in values]
        channels = sum(value.channels for value in values)
        return _Value(self._node("Concat", self._name("concat"), names, axis=1), channels)

    def flatten(self, x: _Value, *, pixels: int = 1) -> _Value:
        """Channels and pixels on one axis."""
        return _Value(self._node("Flatten", self._name("flat"), [x.name]), x.channels * pixels)

    def dense(self, x: _Value, channels: int) -> _Value:
        """A dense layer with a bias."""
        name = self._name("dense")
        inputs = [x.name, self._weight(name, (channels, x.channels)), self._bias(name, channels)]
        return _Value(self._node("Gemm", name, inputs, transB=1), channels)

    def classify(self, x: _Value) -> None:
        """The mean over all pixels, and a score per class from it."""
        pooled = x._replace(name=self._node("GlobalAveragePool", self._name("pool"), [x.name]))
        self.dense(self.flatten(pooled), CLASSES)

    def _name(self, kind: str) -> str:
        return f"{kind}{len(self.model.graph.node)}"

    def _node(self, operator: str, name: str, inputs: list[str], **attributes: Any) -> str:
        self.model.graph.node.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def _weight(self, name: str, shape: tuple[int, ...]) -> str:
        return self._normal(f"{name}.weight", shape, math.sqrt(2 / math.prod(shape[1:])))

    def _bias(self, name: str, channels: int) -> str:
        return self._normal(f"{name}.bias", (channels,), _BIAS)

    def _normal(self, name: str, shape: tuple[int, ...], deviation: float) -> str:
        values = self._random.standard_normal(shape, dtype=np.float32)
        values *= np.float32(deviation)
        data = values.astype(_FLOAT, copy=False).tobytes()
        del values  # one tensor can be most of a model
        return self._tensor(name, shape, data)

    def _constant(self, name: str, shape: tuple[int, ...], value: float) -> str:
        return self._tensor(name, shape, np.full(shape, value, _FLOAT).tobytes())

    def _tensor(self, name: str, shape: tuple[int, ...], data: bytes) -> str:
        self.model.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=shape, raw_data=data)
        return name


def _mobilenet(graph: _Graph) -> None:
    """MobileNetV1 (Howard et al., 2017, arXiv:1704.04861)."""

    def activate(x: _Value) -> _Value:
        return graph.relu6(graph.bn(x, epsilon=1e-3))

    x = activate(graph.conv(graph.input, 32, 3, stride=2))
    for channels in (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024):
        # Each doubling halves the sides, but for the first.
        stride = 2 if channels > x.channels > 32 else 1
        x = activate(graph.conv(x, x.channels, 3, stride=stride, groups=x.channels))
        x = activate(graph.conv(x, channels))
    graph.classify(x)


def _resnet(graph: _Graph, depths: tuple[int, ...], *, bottleneck: bool) -> None:
    """ResNet (He et al., 2015, arXiv:1512.03385), striding in the 3x3 convolution as torchvision does."""
    x = graph.unit(graph.input, 64, 7, stride=2)
    x = graph.max_pool(x, 3, stride=2)
    gain = sum(depths) ** -0.5  # else the variance would double with every block
    for stage, depth in enumerate(depths):
        for index in range(depth):
            stride = 2 if stage and not index else 1
            x = _residual(graph, x, 64 << stage, stride, bottleneck=bottleneck, gain=gain)
    graph.classify(x)


def _residual(graph: _Graph, x: _Value, width: int, stride: int, *, bottleneck: bool, gain: float) -> _Value:
    if bottleneck:
        y = graph.unit(graph.unit(x, width), width, 3, stride=stride)
        y = graph.bn(graph.conv(y, 4 * width), gain=gain)
    else:
        y = graph.unit(x, width, 3, stride=stride)
        y = graph.bn(graph.conv(y, width, 3), gain=gain)
    if stride != 1 or x.channels != y.channels:
        x = graph.bn(graph.conv(x, y.channels, stride=stride))
    return graph.relu(graph.add(x, y))


def _vgg(graph: _Graph, depths: tuple[int, ...]) -> None:
    """VGG without batch normalization (Simonyan and Zisserman, 2014, arXiv:1409.1556)."""
    x = graph.input
    for depth, channels in zip(depths, (64, 128, 256, 512, 512), strict=True):
        for _ in range(depth):
            x = graph.relu(graph.conv(x, channels, 3, bias=True))
        x = graph.max_pool(x, 2, stride=2)
    x = graph.flatten(x, pixels=7 * 7)
    for _ in range(2):
        x = graph.relu(graph.dense(x, 4096))
    graph.dense(x, CLASSES)


def _densenet(graph: _Graph, depths: tuple[int, ...], *, growth: int = 32) -> None:
    """DenseNet-BC (Huang et al., 2016, arXiv:1608.06993)."""
    x = graph.unit(graph.input, 2 * growth, 7, stride=2)
    x = graph.max_pool(x, 3, stride=2)
    for stage, depth in enumerate(depths):
        if stage:
            x = graph.conv(graph.relu(graph.bn(x)), x.channels // 2)
            x = graph.average_pool(x, 2, stride=2)
        for _ in range(depth):
            y = graph.conv(graph.relu(graph.bn(x)), 4 * growth)
            y = graph.conv(graph.relu(graph.bn(y)), growth, 3)
            x = graph.concat(x, y)
    graph.classify(graph.relu(graph.bn(x)))


def _inception(graph: _Graph) -> None:
    """InceptionV3 (Szegedy et al., 2015, arXiv:1512.00567) without the auxiliary classifier."""
    unit = partial(graph.unit, epsilon=1e-3)

    def chain(x: _Value, *layers: tuple[int, _Size]) -> _Value:
        for channels, kernel in layers:
            x = unit(x, channels, kernel)
        return x

    def reduce(x: _Value, channels: int) -> _Value:
        return unit(x, channels, 3, stride=2, same=False)

    def pooled(x: _Value, channels: int) -> _Value:
        return unit(graph.average_pool(x, 3, stride=1), channels)

    def halved(x: _Value) -> _Value:
        return graph.max_pool(x, 3, stride=2, same=False)

    def split(x: _Value) -> tuple[_Value, _Value]:
        return unit(x, 384, (1, 3)), unit(x, 384, (3, 1))

    x = unit(reduce(graph.input, 32), 32, 3, same=False)
    x = halved(unit(x, 64, 3))
    x = halved(unit(unit(x, 80), 192, 3, same=False))
    for channels in (32, 64, 64):  # 35 x 35 pixels
        double = chain(x, (64, 1), (96, 3), (96, 3))
        x = graph.concat(unit(x, 64), chain(x, (48, 1), (64, 5)), double, pooled(x, channels))
    x = graph.concat(reduce(x, 384), reduce(chain(x, (64, 1), (96, 3)), 96), halved(x))
    across, down = (1, 7), (7, 1)
    for inner in (128, 160, 160, 192):  # 17 x 17
        single = chain(x, (inner, 1), (inner, across), (192, down))
        double = chain(x, (inner, 1), (inner, down), (inner, across), (inner, down), (192, across))
        x = graph.concat(unit(x, 192), single, double, pooled(x, 192))
    single, double = chain(x, (192, 1)), chain(x, (192, 1), (192, across), (192, down))
    x = graph.concat(reduce(single, 320), reduce(double, 192), halved(x))
    for _ in range(2):  # 8 x 8
        single, double = chain(x, (384, 1)), chain(x, (448, 1), (384, 3))
        x = graph.concat(unit(x, 320), *split(single), *split(double), pooled(x, 192))
    graph.classify(x)


_BUILDERS: Final[Mapping[str, Callable[[_Graph], None]]] = {
    "MobileNetV1": _mobilenet,
    "ResNet18": partial(_resnet, depths=(2, 2, 2, 2), bottleneck=False),
    "ResNet50": partial(_resnet, depths=(3, 4, 6, 3), bottleneck=True),
    "ResNet101": partial(_resnet, depths=(3, 4, 23, 3), bottleneck=True),
    "ResNet152": partial(_resnet, depths=(3, 8, 36, 3), bottleneck=True),
    "VGG19": partial(_vgg, depths=(2, 2, 4, 4, 4)),
    "InceptionV3": _inception,
    "DenseNet121": partial(_densenet, depths=(6, 12, 24, 16)),
    "DenseNet201": partial(_densenet, depths=(6, 12, 48, 32)),
}


def _known(name: str) -> str:
    if name not in PARAMETERS:
        raise ValueError(f"no model is called {name[:80]!r}; there are {', '.join(NAMES)}")
    return name


def _pair(size: _Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _window(kernel: tuple[int, int], stride: int, same: bool) -> dict[str, list[int]]:
    """Attributes of what slides over an image; padding is the same on both sides, as in PyTorch."""
    pads = [(side - 1) // 2 if same else 0 for side in kernel]
    return {"kernel_shape": [*kernel], "strides": [stride, stride], "pads": [*pads, *pads]}


def _time(path: Path) -> Samples:
    session = bare_session(path)
    inputs, times = sample(session), Samples()
    session.run(None, inputs)
    for _ in range(RUNS):
        start = time.perf_counter()
        session.run(None, inputs)
        times.seconds.append(time.perf_counter() - start)
    return times


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.zoo", description=__doc__.partition("\n")[0])
    # Without `choices`, which argparse in Python 3.11 holds against an empty list.
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--into", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--external", action="store_true", help="weights into a file beside each model")
    return parser


if __name__ == "__main__":
    import sys

    run(sys.argv[1:]).show()
