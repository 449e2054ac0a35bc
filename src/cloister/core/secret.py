"""A type for bytes that must not be seen: its ``repr`` hides them, and it refuses to be pickled."""

from __future__ import annotations

import hmac
from typing import Final, NoReturn


class Secret:
    """Secret bytes. Only `reveal` gives them out; comparison takes constant time.

    CPython can't promise that no copy of them is left in memory (see LIMITATIONS.md); `wipe` overwrites ours.
    """

    __slots__ = ("_data",)

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data: Final = bytearray(data)

    def reveal(self) -> bytes:
        """The bytes themselves, for the one call that needs them."""
        return bytes(self._data)

    def wipe(self) -> None:
        """Overwrite the bytes with zeros."""
        self._data[:] = bytes(len(self._data))

    def __len__(self) -> int:
        return len(self._data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._data, other._data)

    def __hash__(self) -> NoReturn:
        raise TypeError("a Secret is not hashable")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is never pickled")

    def __repr__(self) -> str:
        return f"<Secret, {len(self._data)} B>"

    __str__ = __repr__
