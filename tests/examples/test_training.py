"""The committed example models are what their scripts make."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_datasets():
    """By path: `datasets` is also the name of a package that others may have installed."""
    spec = importlib.util.spec_from_file_location("example_datasets", EXAMPLES / "datasets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DATASETS = load_datasets()


def accuracy(path: Path, data, output: str) -> float:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    values, labels = data
    (answers,) = session.run([output], {source.name: values})
    assert np.isfinite(answers).all()
    return float((np.argmax(answers, axis=1) == labels).mean())


@pytest.mark.parametrize(
    ("name", "data", "least"),
    [("digits", DATASETS.digits_test, 0.97), ("diagnosis", DATASETS.diagnosis_test, 0.95)],
)
def test_training_again_gives_the_committed_accuracy(tmp_path, name, data, least):
    path = tmp_path / f"{name}.onnx"
    script = EXAMPLES / f"train_{name}.py"
    done = subprocess.run(
        [sys.executable, script, path], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    committed = EXAMPLES / "models" / path.name
    ours, theirs = accuracy(path, data(), "probabilities"), accuracy(committed, data(), "probabilities")
    assert theirs >= least
    # Other processors round differently, which may turn a sample or two; anything more is another model.
    assert ours == pytest.approx(theirs, abs=2.5 / len(data()[1]))
    assert f"test accuracy {ours:.4f}" in done.stdout
    assert committed.stat().st_size < 200 << 10


def test_interfaces_of_the_committed_models():
    shapes = {}
    for name in ("digits", "diagnosis"):
        session = onnxruntime.InferenceSession(
            EXAMPLES / "models" / f"{name}.onnx", providers=["CPUExecutionProvider"]
        )
        shapes[name] = [
            (value.name, value.type, value.shape[1:])
            for value in (*session.get_inputs(), *session.get_outputs())
        ]
    assert shapes["digits"] == [
        ("image", "tensor(float)", [1, 8, 8]),
        ("probabilities", "tensor(float)", [10]),
    ]
    assert shapes["diagnosis"] == [
        ("features", "tensor(float)", [30]),
        ("label", "tensor(int64)", []),
        ("probabilities", "tensor(float)", [2]),
    ]


@pytest.mark.parametrize("name", ["digits", "diagnosis"])
def test_no_test_sample_is_trained_on(name):
    train, test = getattr(DATASETS, f"{name}_train")()[0], getattr(DATASETS, f"{name}_test")()[0]
    seen = {row.tobytes() for row in train}
    assert not [row for row in test if row.tobytes() in seen]
    assert train.dtype == test.dtype == np.float32
