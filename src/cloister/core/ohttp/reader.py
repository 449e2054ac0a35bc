"""Exact reading of wire formats: each length is checked against what is there before anything is copied."""

from __future__ import annotations

from typing import Final, TypeAlias

from cloister.errors import FormatError

Bytes: TypeAlias = bytes | bytearray | memoryview  # whatever holds octets; large bodies stay where they are

VARINT_MAX: Final = (1 << 62) - 1


def octets(data: Bytes) -> memoryview:
    """A flat view of single octets over ``data``, without a copy.

    Raises:
        FormatError: a view with gaps (code ``format.buffer``).
    """
    view = memoryview(data)
    if not view.c_contiguous:
        raise FormatError("a message must be contiguous in memory", code="format.buffer")
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


class Reader:
    """A cursor over octets that never reads past their end.

    Every refusal is a `FormatError` with the code of the format that is read.
    """

    __slots__ = ("_code", "_end", "_view", "offset")

    def __init__(self, data: Bytes, *, code: str) -> None:
        self._view: Final = octets(data)
        self._end: Final = len(self._view)
        self._code: Final = code
        self.offset = 0

    @property
    def remaining(self) -> int:
        """How many octets are left."""
        return self._end - self.offset

    def refusal(self, claim: str, *, expected: object, actual: object) -> FormatError:
        """The error for a value that the format does not allow here."""
        return FormatError(
            f"{claim} is malformed", code=self._code, claim=claim, expected=expected, actual=actual
        )

    def take(self, length: int, claim: str, *, limit: int | None = None) -> memoryview:
        """The next ``length`` octets, as a view.

        Raises:
            FormatError: longer than ``limit``, or than what is left.
        """
        start = self.offset
        end = start + length
        if limit is not None and length > limit:
            raise self.refusal(claim, expected=f"at most {limit} B", actual=f"{length} B")
        if end > self._end:
            raise self.refusal(claim, expected=f"{length} B", actual=f"{self.remaining} B")
        self.offset = end
        return self._view[start:end]

    def rest(self) -> memoryview:
        """All that is left."""
        return self.take(self.remaining, "rest")

    def integer(self, length: int, claim: str) -> int:
        """An unsigned integer of ``length`` octets in network byte order."""
        return int.from_bytes(self.take(length, claim), "big")

    def varint(self, claim: str) -> int:
        """A variable-length integer (RFC 9000, section 16); it need not be in its shortest form."""
        if self.offset >= self._end:
            raise self.refusal(claim, expected="a variable-length integer", actual="the end")
        first = self._view[self.offset]
        if first < 1 << 6:  # most are short, and each request has dozens
            self.offset += 1
            return first
        length = 1 << (first >> 6)
        value = self.integer(length, claim)
        return value & ((1 << (8 * length - 2)) - 1)

    def require_end(self, claim: str) -> None:
        """Refuse octets after the last part."""
        if self.remaining:
            raise self.refusal(claim, expected="no further octets", actual=f"{self.remaining} B")


def encode_varint(value: int) -> bytes:
    """The shortest variable-length integer (RFC 9000, section 16) of ``value``, which is in 0..2**62-1."""
    if 0 <= value < 1 << 6:
        return value.to_bytes(1, "big")
    if 0 <= value < 1 << 14:
        return (value | 1 << 14).to_bytes(2, "big")
    if 0 <= value < 1 << 30:
        return (value | 2 << 30).to_bytes(4, "big")
    if 0 <= value <= VARINT_MAX:
        return (value | 3 << 62).to_bytes(8, "big")
    raise FormatError("not a variable-length integer", claim="value", expected="0..2**62-1", actual=value)
