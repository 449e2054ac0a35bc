"""Train a breast-cancer classifier with scikit-learn, and export it to ONNX.

    python examples/train_diagnosis.py [models/diagnosis.onnx]

Input ``features``: float32 (N, 30), the measurements of a fine-needle aspirate as scikit-learn lists them.
Outputs ``label``: int64 (N,), 0 malignant or 1 benign, and ``probabilities``: float32 (N, 2). An example, no
medical device.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from datasets import diagnosis_test, diagnosis_train

MODEL = Path(__file__).parent / "models" / "diagnosis.onnx"
OPSET = {"": 21, "ai.onnx.ml": 3}


def main(path: Path = MODEL) -> float:
    """Train, write the model to ``path``, print and return its accuracy on the test split."""
    pipeline = train()
    features, diagnoses = diagnosis_test()
    accuracy = float(pipeline.score(features, diagnoses))
    onnx.save(export(pipeline), path)
    print(f"{path.name}: test accuracy {accuracy:.4f} on {len(diagnoses)} patients")
    return accuracy


def train(seed: int = 0) -> Pipeline:
    """Standardise, then a network with one hidden layer, trained by L-BFGS."""
    features, diagnoses = diagnosis_train()
    network = MLPClassifier((32,), solver="lbfgs", alpha=1.0, max_iter=2000, random_state=seed)
    return make_pipeline(StandardScaler(), network).fit(features, diagnoses)


def export(pipeline: Pipeline) -> onnx.ModelProto:
    """The pipeline as ONNX; probabilities are a tensor and not a list of maps."""
    model: onnx.ModelProto = to_onnx(
        pipeline,
        initial_types=[("features", FloatTensorType([None, 30]))],
        target_opset=OPSET,
        options={"zipmap": False},
        name="diagnosis",
    )
    for output, name in zip(list(model.graph.output), ("label", "probabilities"), strict=True):
        if output.name != name:
            raise SystemExit(f"skl2onnx named an output {output.name!r}, not {name!r}")
    onnx.checker.check_model(model)
    return model


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
