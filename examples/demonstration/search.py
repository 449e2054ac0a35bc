"""Searches files for thousands of needles at once: fragments of what must not be there, in several encodings.

A needle is short, so that a part of a secret is found as well as the whole. Base64 has three forms of the
same bytes, one for each position at which they can begin in a group of three; all three are searched.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

SHORTEST: Final = 6  # bytes of a needle
FRAGMENT: Final = 32  # bytes of a needle that is cut out of a tensor
VALUES: Final = 5  # numbers of a needle that is written as text
_PREFIX: Final = 3  # bytes that the table of candidates looks at
_BLOCK: Final = 1 << 22  # bytes searched at once


@dataclass(frozen=True, slots=True)
class Needle:
    """Bytes to look for, what they are a part of, and how they are written."""

    kind: str
    encoding: str
    data: bytes


def of_bytes(kind: str, data: bytes) -> Iterator[Needle]:
    """Needles for bytes: raw, hexadecimal, base64."""
    yield Needle(kind, "raw", data)
    yield Needle(kind, "hex", data.hex().encode())
    yield Needle(kind, "hex", data.hex().upper().encode())
    for form in _base64_forms(data):
        yield Needle(kind, "base64", form)
        urlsafe = form.translate(bytes.maketrans(b"+/", b"-_"))
        if urlsafe != form:
            yield Needle(kind, "base64", urlsafe)


def of_text(kind: str, text: str) -> Iterator[Needle]:
    """Needles for a name: as it is where it is long enough to mean something, else as a JSON string."""
    data = text.encode()
    yield from of_bytes(kind, data if len(data) >= SHORTEST else json.dumps(text).encode())


def of_tensor(kind: str, tensor: Array, *, most: int) -> Iterator[Needle]:
    """Needles for a tensor: up to ``most`` fragments of its bytes, and runs of its numbers as JSON text."""
    for fragment in fragments(tensor.tobytes(), most):
        yield from of_bytes(kind, fragment)
    numbers = [number.item() for number in tensor.ravel()]
    # A run of zeros or of round numbers stands in many files; one with many different digits in none.
    starts = range(max(1, len(numbers) - VALUES + 1))
    start = max(starts, key=lambda index: len(set(numbers[index : index + VALUES]) - {0.0, 1.0}))
    run = numbers[start : start + VALUES]
    if len(set(run) - {0.0, 1.0}) >= min(3, len(run)):
        for separator in (", ", ","):
            yield Needle(kind, "json", separator.join(map(json.dumps, run)).encode())


def fragments(data: bytes, most: int) -> list[bytes]:
    """Up to ``most`` disjoint pieces with enough different bytes in them to occur nowhere by chance."""
    size, at, pieces = min(FRAGMENT, len(data)), 0, []
    while at + size <= len(data):
        piece = data[at : at + size]
        if len(set(piece[:_PREFIX])) == 1:  # a run of zeros: too many places begin like it
            at += 1
            continue
        pieces.append(piece)
        at += size
    telling = [piece for piece in pieces if len(set(piece)) >= 5]
    return sorted(telling, key=lambda piece: len(set(piece)), reverse=True)[:most]


class Search:
    """A set of needles, ready to be looked for."""

    def __init__(self, needles: Iterable[Needle]) -> None:
        self._by_start: defaultdict[bytes, set[Needle]] = defaultdict(set)
        for needle in needles:
            if len(needle.data) >= SHORTEST:
                self._by_start[needle.data[:SHORTEST]].add(needle)
        self._candidates = np.zeros(1 << (8 * _PREFIX), dtype=np.bool_)
        for start in self._by_start:
            self._candidates[int.from_bytes(start[:_PREFIX], "little")] = True

    @property
    def needles(self) -> list[Needle]:
        """Every needle."""
        return [needle for group in self._by_start.values() for needle in group]

    def counts(self) -> Counter[tuple[str, str]]:
        """How many needles there are of each kind and encoding."""
        return Counter((needle.kind, needle.encoding) for needle in self.needles)

    def find(self, data: bytes) -> set[Needle]:
        """The needles that occur in ``data``."""
        found: set[Needle] = set()
        octets = np.frombuffer(data, dtype=np.uint8)
        for begin in range(0, len(data), _BLOCK):
            block = octets[begin : begin + _BLOCK + _PREFIX - 1].astype(np.uint32)
            keys = block[: -_PREFIX + 1] | block[1:-1] << 8 | block[2:] << 16
            for offset in np.flatnonzero(self._candidates[keys]):
                at = begin + int(offset)
                for needle in self._by_start.get(data[at : at + SHORTEST], ()):
                    if data.startswith(needle.data, at):
                        found.add(needle)
        return found


def files_below(folder: Path) -> list[Path]:
    """Regular files in a folder, links left out: they lead to the source that everybody has."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _base64_forms(data: bytes) -> Iterator[bytes]:
    """The characters that depend on ``data`` alone, whatever stands before and after it."""
    for before in range(3):
        text = base64.b64encode(bytes(before) + data)
        first = -(-before * 8 // 6)
        last = (before + len(data)) * 8 // 6
        yield text[first:last]
