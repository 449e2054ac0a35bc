"""The models of known architectures: sizes and work as published, outputs that depend on class and image."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.models import bare_session  # noqa: E402

from benchmarks import zoo  # noqa: E402

# Multiply-adds of one image, in 10^9: torchvision's "GFLOPS"; MobileNetV1's from its paper.
WORK = {
    "MobileNetV1": 0.569,
    "ResNet18": 1.814,
    "ResNet50": 4.089,
    "ResNet101": 7.801,
    "ResNet152": 11.514,
    "VGG19": 19.632,
    "InceptionV3": 5.713,
    "DenseNet121": 2.834,
    "DenseNet201": 4.291,
}
SMALL = ("MobileNetV1", "ResNet18", "InceptionV3", "DenseNet121")
RUN = ("MobileNetV1", "ResNet18")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("zoo")
    for name in RUN:
        zoo.save(name, path)
    yield path
    for name in RUN:
        (path / f"{name}.onnx").unlink()


def images(name: str, batch: int) -> Any:
    """Noise of another strength per image."""
    strengths = np.arange(1, batch + 1, dtype=np.float32).reshape(-1, 1, 1, 1) / batch
    shape = (batch, *zoo.INPUTS[name])
    return np.random.default_rng(7).random(shape, dtype=np.float32) * strengths


def logits(path: Path, values: Any) -> Any:
    (found,) = bare_session(path).run(["logits"], {"input": values})
    return found


def multiply_adds(model: onnx.ModelProto) -> int:
    """Of convolutions and dense layers, for one image; takes the weights out of the model."""
    shapes: dict[str, list[int]] = {}
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        shapes[tensor.name] = list(tensor.dims)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    for value in (*inferred.value_info, *inferred.output):
        shapes[value.name] = [each.dim_value for each in value.type.tensor_type.shape.dim]
    return sum(
        math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm")
    )


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no model is called 'ResNet34'; there are MobileNetV1, ResNet18"):
        zoo.build("ResNet34")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("ResNet34", "--into", "."), "no model is called 'ResNet34'"), (("ResNet18",), "--into")],
)
def test_wrong_usage_is_refused(
    arguments: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        zoo.run(arguments)
    assert refused.value.code == 2
    assert reason in capsys.readouterr().err


def test_every_name_has_its_figures() -> None:
    assert set(zoo.NAMES) == zoo.PARAMETERS.keys() == zoo.INPUTS.keys() == WORK.keys()


@pytest.mark.parametrize("name", zoo.NAMES)
def test_parameters_and_work_are_as_published(name: str) -> None:
    model = zoo.build(name)
    assert zoo.parameters(model) == zoo.PARAMETERS[name]
    assert round(multiply_adds(model) / 1e9, 3) == WORK[name]


@pytest.mark.parametrize("name", SMALL)
def test_the_checker_accepts_and_the_batch_is_free(name: str) -> None:
    model = zoo.build(name)
    onnx.checker.check_model(model, full_check=True)
    (given,), (result,) = model.graph.input, model.graph.output
    shapes = [
        [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim]
        for value in (given, result)
    ]
    assert (given.name, shapes[0]) == ("input", ["batch", *zoo.INPUTS[name]])
    assert (result.name, shapes[1]) == ("logits", ["batch", 1000])


def test_the_seed_alone_decides_the_bytes() -> None:
    first, same, other = (zoo.build("MobileNetV1", seed=seed).SerializeToString() for seed in (3, 3, 4))
    assert first == same
    assert first != other


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", RUN)
def test_outputs_are_finite_and_differ(folder: Path, name: str, batch: int) -> None:
    found = logits(folder / f"{name}.onnx", images(name, batch))
    assert (found.shape, found.dtype) == ((batch, 1000), np.float32)
    assert np.isfinite(found).all()
    assert (found.std(axis=1) > 0.1).all()
    assert (found.std(axis=1) < 100).all()
    if batch == 2:
        assert np.abs(found[0] - found[1]).max() > 0.1


@pytest.mark.parametrize("name", RUN)
def test_external_weights_give_the_same_outputs(folder: Path, tmp_path: Path, name: str) -> None:
    path = zoo.save(name, tmp_path, external=True)
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}.onnx", f"{name}.data"}
    assert path.stat().st_size < 1e5
    values = images(name, 1)
    assert np.array_equal(logits(path, values), logits(folder / f"{name}.onnx", values))


def test_saving_again_replaces_what_is_there(tmp_path: Path) -> None:
    sizes = []
    for _ in range(2):
        zoo.save("MobileNetV1", tmp_path, external=True)
        sizes.append({file.name: file.stat().st_size for file in tmp_path.iterdir()})
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("arguments", [("MobileNetV1", "MobileNetV1"), ("--external",)])
def test_the_table_has_size_and_time(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.setattr(zoo, "NAMES", ("MobileNetV1",))  # what runs when no name is given
    into = tmp_path / "new"
    zoo.run([*arguments, "--into", str(into)]).show()
    shown = capsys.readouterr().out
    figures = json.loads(shown.splitlines()[-1])["models"]["MobileNetV1"]
    assert "1/1 MobileNetV1: building" in shown
    assert figures["parameters"] == 4_231_976
    assert figures["input"] == "3x224x224"
    assert len(list(into.iterdir())) == 1 + ("--external" in arguments)
    written = sum(file.stat().st_size for file in into.iterdir()) / 1e6
    assert figures["size_mb"] == pytest.approx(written, rel=1e-3)
    assert figures["bare_ms_p50"] > 0
