"""What benchmarks take as arguments: argparse refuses the rest, with one line."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from pathlib import Path

from benchmarks.models import EXAMPLES, SYNTHETIC


def positive_int(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"{text[:80]!r} is no whole number from 1 on")
    return number


def positive_float(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text[:80]!r} is no number above 0")
    return number


def model(text: str) -> str:
    """A model that `benchmarks.models.locate` finds."""
    from benchmarks import zoo

    known = text == SYNTHETIC or text in zoo.NAMES or (EXAMPLES / f"{text}.onnx").is_file()
    if not known and not Path(text).is_file():
        examples = sorted(path.stem for path in EXAMPLES.glob("*.onnx"))
        names = ", ".join((SYNTHETIC, *examples, *zoo.NAMES))
        raise ArgumentTypeError(f"{text[:80]!r} is neither a file nor one of {names}")
    return text
