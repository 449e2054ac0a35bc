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
PAIRS: Final = 16  # batches of a size that a look compares with runs alone
NEAR: Final = 3  # runs alone, just before it, whose median a batch is compared with
GAIN: Final = 0.9  # batches begin where three of four pairs cost at most this part for a row
KEEP: Final = 0.97  # and end where half of the pairs cost more than this
BETTER: Final = 0.9  # another size must cost at most this part of what the present one does
STEP: Final = 0.98  # a larger size that costs more than this part of the best one brought nothing
WAIT: Final = 512  # runs before the second look; with each look they double
MAX_WAIT: Final = 16_384
_SIZES: Final = MAX_ROWS.bit_length()  # 1, 2, 3 to 4, 5 to 8, ... rows
_BATCHES: Final = PAIRS * _SIZES  # in a look at most

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

    Whether batches pay is decided in looks, and stays as it is between them. A look lets batches and runs
    alone take turns and compares each batch with the runs just before it, so that a machine that is slow for
    a while is slow for both. To begin, most pairs must show a clear gain; to end, half of them none: noise
    moves neither. Looks become rare, and each ends after `_BATCHES` batches.

    Attributes:
        offered: False once a batch gave other results than its requests alone; for good.
        settled: Rows that were found to be worth joining; 1 for none.
        limit: Rows that may be joined now: `settled`, but for looks.
    """

    __slots__ = (
        "_agreed", "_alone", "_batches", "_left", "_looking", "_pairs", "_ratios", "_seen", "_turn", "_wait",
        "limit", "offered", "settled",
    )  # fmt: skip

    def __init__(self) -> None:
        self.offered = True
        self.limit = self.settled = 1
        self._agreed = 0  # trials whose results agreed
        self._seen = [0] * _SIZES  # runs by size
        self._wait = WAIT
        self._left = 0  # runs until the next look
        self._begin()

    def record(self, rows: int, seconds: float) -> None:
        """Learn from one run, which took so many seconds of processor time."""
        size = min((rows - 1).bit_length(), _SIZES - 1)
        self._seen[size] += 1
        if not self.offered:
            return
        if not self._looking:
            self._left -= 1
            if self._left > 0:
                return
            self._begin()
        self._note(size, seconds / rows)
        self.limit = self._choose()

    def agree(self) -> None:
        """A trial whose requests differed gave the same results in both ways."""
        self._agreed += 1

    def refuse(self) -> None:
        """Never batch this model again."""
        self.offered, self.limit, self.settled = False, 1, 1

    def on_trial(self, rows: int) -> bool:
        """Whether a batch of so many rows needs to be compared with its requests alone."""
        size = min((rows - 1).bit_length(), _SIZES - 1)
        return self._agreed < TRIALS or self._seen[size] < TRIALS

    def _begin(self) -> None:
        """Begin a look."""
        self._looking = True
        self._batches = _BATCHES
        self._turn = False  # whether a batch is next
        self._alone: list[float] = []  # seconds of a row in the last runs alone
        self._pairs: list[list[float]] = [[] for _ in range(_SIZES)]  # what a row costs, as a part of that
        self._ratios: dict[int, float] = {}  # medians of those that are complete

    def _note(self, size: int, cost: float) -> None:
        if size == 0:
            self._alone = [*self._alone[1 - NEAR :], cost]
            self._turn = len(self._alone) == NEAR
        elif len(self._alone) == NEAR:
            self._batches -= 1
            self._turn = False
            pairs, alone = self._pairs[size], sorted(self._alone)[NEAR // 2]
            if len(pairs) < PAIRS and alone > 0:
                pairs.append(cost / alone)
                if len(pairs) == PAIRS:
                    pairs.sort()
                    self._ratios[size] = pairs[PAIRS // 2]

    def _choose(self) -> int:
        """Rows that may be joined next; ends the look where there is nothing more to learn."""
        if not self._batches:
            return self._settle()
        if not self._turn:
            return 1
        size = self._wanted()
        return self._settle() if size == 0 else 1 << size

    def _wanted(self) -> int:
        """The size to look at next; 0 where the last two brought nothing, or the next would run too long."""
        alone, best, useless = sorted(self._alone)[NEAR // 2], 1.0, 0
        present = self.settled.bit_length() - 1
        first, last = (max(1, present - 1), present + 1) if present else (1, _SIZES - 1)
        for size in range(first, min(last, _SIZES - 1) + 1):
            if alone * self._ratios.get(size - 1, 1.0) * 2**size > MAX_SECONDS or useless == 2:
                return 0
            if size not in self._ratios:
                return size
            useless = 0 if self._ratios[size] <= STEP * best else useless + 1
            best = min(best, self._ratios[size])
        return 0

    def _settle(self) -> int:
        """End a look."""
        before, ratios = self.settled, self._ratios
        paying = [size for size in ratios if self._pairs[size][PAIRS * 3 // 4 - 1] <= GAIN]
        best = min(paying, key=ratios.__getitem__, default=0)
        present = before.bit_length() - 1
        if not present:
            self.settled = 1 << best
        elif present in ratios:
            if best and ratios[best] <= BETTER * ratios[present]:
                self.settled = 1 << best
            elif ratios[present] > KEEP:
                self.settled = 1
        self._looking = False
        self._left = WAIT if self.settled not in (1, before) else self._wait
        self._wait = min(2 * self._wait, MAX_WAIT)
        return self.settled


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
