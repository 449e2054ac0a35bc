"""Versioned records: what a store of sealed state must offer, whatever keeps it.

The store is not trusted. It orders nothing and decides nothing; who reads a record opens and checks it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cloister.errors import FormatError

MAX_KEY: Final = 256  # bytes
MAX_VALUE: Final = 4 << 20  # bytes
MAX_BATCH: Final = 256  # writes applied at once
MAX_BATCH_BYTES: Final = 8 << 20  # bytes of keys and values applied at once
MAX_SCAN: Final = 1024  # records
SCAN_BYTES: Final = 4 << 20  # bytes after which a scan stops, once it has one record
MAX_VERSION: Final = (1 << 63) - 1
_TABLE: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record as it is stored. ``version`` counts its writes from 1."""

    table: str
    key: bytes
    version: int
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One change of a batch.

    Attributes:
        table: Lower-case letters, digits and dashes, 32 at most.
        key: 1 to `MAX_KEY` bytes.
        expected_version: Version that the record must have now; 0: it must not exist. It then has the next.
        value: New value, `MAX_VALUE` bytes at most; None deletes the record.
    """

    table: str
    key: bytes
    expected_version: int
    value: bytes | None

    def __post_init__(self) -> None:
        check_table(self.table)
        check_key(self.key)
        _require(0 <= self.expected_version < MAX_VERSION, "version", "0 or more, below 2^63 - 1")
        if self.value is None:
            _require(self.expected_version > 0, "version", "above 0 for a deletion")
        else:
            _require(len(self.value) <= MAX_VALUE, "value", f"at most {MAX_VALUE} B")


class RecordStore(Protocol):
    """Keeps records. Every method may block and may be called from any thread.

    Each raises `Unavailable` with a code below ``store.`` where the store itself fails.
    """

    def get(self, table: str, key: bytes) -> Record | None:
        """The record, or None."""

    def scan(self, table: str, after_key: bytes, limit: int) -> list[Record]:
        """Records of a table in the order of their keys, from the first key above ``after_key``.

        There may be fewer than ``limit`` (1 to `MAX_SCAN`) before the end, but none only at the end.
        """

    def apply(self, writes: Sequence[Write]) -> None:
        """Make all changes durable, or none.

        Raises:
            StoreConflict: code ``store.conflict``; a record has another version than expected.
            FormatError: too many, too large, or one record twice.
        """

    def close(self) -> None:
        """Release what the store holds."""


def check_table(table: str) -> None:
    """Refuse what can't name a table."""
    _require(_TABLE.fullmatch(table) is not None, "table", "lower-case letters, digits and dashes")


def check_key(key: bytes) -> None:
    """Refuse what can't be a key."""
    _require(1 <= len(key) <= MAX_KEY, "key", f"1 to {MAX_KEY} B")


def check_scan(table: str, after_key: bytes, limit: int) -> None:
    """Refuse what can't be scanned."""
    check_table(table)
    _require(len(after_key) <= MAX_KEY, "key", f"at most {MAX_KEY} B")
    _require(1 <= limit <= MAX_SCAN, "limit", f"1 to {MAX_SCAN}")


def check_batch(writes: Sequence[Write]) -> None:
    """Refuse a batch that can't be applied at once."""
    _require(len(writes) <= MAX_BATCH, "batch", f"at most {MAX_BATCH} writes")
    total = sum(len(write.key) + len(write.value or b"") for write in writes)
    _require(total <= MAX_BATCH_BYTES, "batch", f"at most {MAX_BATCH_BYTES} B")
    _require(len({(write.table, write.key) for write in writes}) == len(writes), "batch", "each record once")


def _require(holds: bool, claim: str, expected: str) -> None:
    if not holds:
        raise FormatError("not a record store's call", code="store.format", claim=claim, expected=expected)
