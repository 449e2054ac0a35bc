"""Batches of requests: which may be joined, how they are joined and parted, and whether it pays.

A batch joins inputs along axis 0. ONNX doesn't say whether a free first dimension counts independent rows, so
a model's first batches are trials: each request is run alone and answered with that, then the batch is run
and compared. A model whose rows depend on each other is never batched again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np

from cloister.core.oip import Array

MAX_ROWS: Final = 64  # in a batch
MAX_BATCH: Final = 64 << 20  # bytes of input in a batch, as much as in one request
MAX_SECONDS: Final = 0.1  # that a larger batch may be expected to run
TRIALS: Final = 3  # of each size before it is used, and of a model before any is
GAIN: Final = 0.9  # a row must cost at most this part of what it costs alone
FORGET: Final = 1024  # runs after which sizes that didn't pay are measured anew
COMPARE: Final = 32  # of so many runs one is of a request alone, to see what that costs now
_SIZES: Final = MAX_ROWS.bit_length()  # 1, 2, 4, ... rows
_DRIFT: Final = 1.02  # a figure grows by this with each run, so that a faster past is forgotten

Key = tuple[Any, ...]


class Spec(Protocol):
    """An input or output of a model: its name, and its shape with -1 for a free dimension."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


class Model(Protocol):
    """What runs: a `LoadedModel`."""

    @property
    def inputs(self) -> Mapping[str, Spec]: ...  # noqa: D102
    @property
    def outputs(self) -> Sequence[Spec]: ...  # noqa: D102
    def run(self, inputs: dict[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        """Run the model; blocking. Raises InvalidRequest where it fails on this input."""


class Profile:
    """What is known of a model's batches, learned from real requests alone.

    Attributes:
        offered: False once a batch gave other results than its requests alone; for good.
        limit: Rows that are worth joining now; 1 for none.
    """

    __slots__ = ("_agreed", "_costs", "_counts", "_runs", "limit", "offered")

    def __init__(self) -> None:
        self.offered = True
        self.limit = 1
        self._agreed = 0  # trials whose results agreed
        self._costs = [0.0] * _SIZES  # seconds of a row in batches of 1, 2, 3 to 4, 5 to 8, ... rows
        self._counts = [0] * _SIZES
        self._runs = 0

    def record(self, rows: int, seconds: float) -> None:
        """Learn from one run. Other work on the machine only ever adds to a figure, so the least counts."""
        size = min((rows - 1).bit_length(), _SIZES - 1)
        cost, known = seconds / rows, self._costs[size]
        self._costs[size] = min(cost, known * _DRIFT) if self._counts[size] else cost
        self._counts[size] += 1
        self._runs += 1
        if self._runs % FORGET == 0:
            for larger in range(self.limit.bit_length(), _SIZES):
                self._counts[larger] = 0
        self.limit = self._choose() if self.offered and self._runs % COMPARE else 1

    def agree(self) -> None:
        """A trial whose requests differed gave the same results in both ways."""
        self._agreed += 1

    def refuse(self) -> None:
        """Never batch this model again."""
        self.offered, self.limit = False, 1

    def on_trial(self, rows: int) -> bool:
        """Whether a batch of so many rows needs to be compared with its requests alone."""
        size = min((rows - 1).bit_length(), _SIZES - 1)
        return self._agreed < TRIALS or self._counts[size] < TRIALS

    def _choose(self) -> int:
        """The size whose rows cost least, or the next one to try unless the last two brought nothing."""
        alone, best, best_size, useless = self._costs[0], self._costs[0], 0, 0
        if self._counts[0] < TRIALS:
            return 1
        for size in range(1, _SIZES):
            if (self._costs[size - 1] * 2**size) > MAX_SECONDS or useless == 2:
                break
            if self._counts[size] < TRIALS:
                return 1 << size
            if self._costs[size] < best:
                best, best_size = self._costs[size], size
            useless = 0 if best_size == size else useless + 1
        return 1 << best_size if best <= GAIN * alone else 1


def can_batch(model: Model) -> bool:
    """Whether the first dimension of every input and output is free."""
    return bool(model.inputs) and all(
        spec.shape and spec.shape[0] == -1 for spec in (*model.inputs.values(), *model.outputs)
    )


def batch_key(inputs: dict[str, Array], outputs: tuple[str, ...]) -> tuple[Key, int] | None:
    """What requests must share to be joined, and this one's rows; None where it runs alone."""
    rows = {len(array) for array in inputs.values()}
    if len(rows) != 1 or not 0 < (count := rows.pop()) < MAX_ROWS:
        return None
    return (outputs, *((name, inputs[name].shape[1:]) for name in sorted(inputs))), count


def differ(requests: Sequence[dict[str, Array]]) -> bool:
    """Whether the first two requests have other inputs: a trial of copies would show nothing."""
    first, second = requests[0], requests[1]
    return any(not np.array_equal(array, second[name]) for name, array in first.items())


def join(requests: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """One request's inputs after the other's, in new arrays."""
    return {name: np.concatenate([inputs[name] for inputs in requests]) for name in requests[0]}


def part(outputs: dict[str, Array], rows: Sequence[int]) -> list[dict[str, Array]] | None:
    """Each request's own rows, as views; None where an output hasn't one row for each of the input's."""
    total = sum(rows)
    if any(array.ndim == 0 or len(array) != total for array in outputs.values()):
        return None
    parts, start = [], 0
    for count in rows:
        parts.append({name: array[start : start + count] for name, array in outputs.items()})
        start += count
    return parts


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    """Whether two results agree but for rounding, which may depend on the number of rows."""
    return one.keys() == other.keys() and all(_same(array, other[name]) for name, array in one.items())


def _same(one: Array, other: Array) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    slack = min(1000 * float(np.finfo(one.dtype).eps), 0.02)
    with np.errstate(all="ignore"):
        largest = float(np.max(np.abs(one), where=np.isfinite(one), initial=0.0))
        return np.allclose(other, one, rtol=slack, atol=slack * largest, equal_nan=True)


def wipe_arrays(arrays: Mapping[str, Array]) -> None:
    """Overwrite arrays with zeros, where NumPy owns their bytes; text elements are only let go."""
    for array in arrays.values():
        if array.flags.writeable:
            array.fill(None if array.dtype.kind == "O" else 0)
