"""BF16 in NumPy, which has no such type: an array of `BFLOAT16`, the 16 bits of each element under a name."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BFLOAT16: Final = np.dtype([("bfloat16", "<u2")])


def bfloat16(array: Array) -> Array:
    """Numbers as BF16, rounded to the nearest, ties to even; what is too large becomes infinite."""
    given = np.asarray(array, dtype="<f4")
    bits = given.reshape(-1).view("<u4")
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
    quiet = ((bits >> 16) | 0x40).astype("<u2")  # else the rounding could make a NaN infinite, or zero
    made = np.where(np.isnan(bits.view("<f4")), quiet, rounded).astype("<u2")
    return made.view(BFLOAT16).reshape(given.shape)


def float32(array: Array) -> Array:
    """A BF16 array as float32, exactly."""
    bits = bits_of(array).reshape(-1).astype("<u4") << 16
    return bits.view("<f4").reshape(array.shape)


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether a type is ours, or the one that ml_dtypes adds to NumPy; both are of kind V."""
    if dtype.kind != "V" or dtype.itemsize != 2:
        return False
    return dtype == BFLOAT16 or dtype.name == "bfloat16"


def bits_of(array: Array) -> Array:
    """The 16 bits of each element, as unsigned integers."""
    return np.ascontiguousarray(array).view("<u2").reshape(array.shape)
