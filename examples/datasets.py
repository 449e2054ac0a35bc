"""The data sets of the examples, with splits that the training scripts and the demo share."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split

Array = np.ndarray[Any, np.dtype[Any]]

_SEED = 7  # of the splits
_TEST_SHARE = 0.25


def digits_train() -> tuple[Array, Array]:
    """Images, float32 (1347, 1, 8, 8) in 0..1, and digits, int64 (1347,)."""
    images, digits = _digits()
    return images[0], digits[0]


def digits_test() -> tuple[Array, Array]:
    """Images, float32 (450, 1, 8, 8) in 0..1, and digits, int64 (450,); no model was trained on these."""
    images, digits = _digits()
    return images[1], digits[1]


def diagnosis_train() -> tuple[Array, Array]:
    """Features, float32 (426, 30), and diagnoses, int64 (426,): 0 malignant, 1 benign."""
    features, diagnoses = _diagnosis()
    return features[0], diagnoses[0]


def diagnosis_test() -> tuple[Array, Array]:
    """Features, float32 (143, 30), and diagnoses, int64 (143,); no model was trained on these."""
    features, diagnoses = _diagnosis()
    return features[1], diagnoses[1]


def _digits() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    images, digits = load_digits(return_X_y=True)
    pixels = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return _split(pixels, digits.astype(np.int64))


def _diagnosis() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    features, diagnoses = load_breast_cancer(return_X_y=True)
    return _split(features.astype(np.float32), diagnoses.astype(np.int64))


def _split(values: Array, labels: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    parts = train_test_split(values, labels, test_size=_TEST_SHARE, random_state=_SEED, stratify=labels)
    return (parts[0], parts[1]), (parts[2], parts[3])
