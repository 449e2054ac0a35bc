"""Records in one SQLite file: the embedded default."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cloister.errors import StoreConflict, Unavailable, UsageError
from cloister.host.store.records import (
    MAX_BATCH_BYTES,
    SCAN_BYTES,
    Record,
    Write,
    check_batch,
    check_key,
    check_scan,
    check_table,
)

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS records (
    tbl TEXT NOT NULL,
    key BLOB NOT NULL,
    version INTEGER NOT NULL CHECK (version > 0),
    value BLOB NOT NULL,
    PRIMARY KEY (tbl, key)
) STRICT
"""
_SCHEMA_VERSION: Final = 1
_BUSY: Final = 5.0  # seconds to wait for another process's write


class SqliteRecords:
    """A `RecordStore` in one file. One connection behind one lock: writes are short and the disk orders them.

    Durable means durable: write-ahead log, and every commit is flushed before `apply` returns.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> SqliteRecords:
        """Open the file, making it if it isn't there.

        Raises:
            UsageError: it can't be opened, or is something else.
        """
        try:
            path.touch(mode=0o600, exist_ok=True)
            connection = sqlite3.connect(path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"can't open {path}", code="store.file") from error
        try:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BATCH_BYTES)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _SCHEMA_VERSION):
                raise UsageError(
                    f"{path} is of another version",
                    code="store.file",
                    expected=_SCHEMA_VERSION,
                    actual=version,
                )
            connection.execute(_SCHEMA)
            connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        except sqlite3.Error as error:
            connection.close()
            raise UsageError(f"{path} is not a record store", code="store.file") from error
        except UsageError:
            connection.close()
            raise
        return cls(connection)

    def get(self, table: str, key: bytes) -> Record | None:
        """See `RecordStore`."""
        check_table(table)
        check_key(key)
        with self._cursor() as cursor:
            row = cursor.execute(
                "SELECT version, value FROM records WHERE tbl = ? AND key = ?", (table, key)
            ).fetchone()
        return Record(table=table, key=key, version=row[0], value=row[1]) if row else None

    def scan(self, table: str, after_key: bytes, limit: int) -> list[Record]:
        """See `RecordStore`."""
        check_scan(table, after_key, limit)
        records: list[Record] = []
        total = 0
        with self._cursor() as cursor:
            rows = cursor.execute(
                "SELECT key, version, value FROM records WHERE tbl = ? AND key > ? ORDER BY key LIMIT ?",
                (table, after_key, limit),
            )
            for key, version, value in rows:
                total += len(key) + len(value)
                if records and total > SCAN_BYTES:
                    break
                records.append(Record(table=table, key=key, version=version, value=value))
        return records

    def apply(self, writes: Sequence[Write]) -> None:
        """See `RecordStore`."""
        check_batch(writes)
        with self._cursor() as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            try:
                for write in writes:
                    _apply(cursor, write)
                cursor.execute("COMMIT")
            except BaseException:
                cursor.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """See `RecordStore`."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _cursor(self) -> Iterator[sqlite3.Cursor]:
        """The connection's one user at a time."""
        with self._lock:
            cursor = None
            try:
                cursor = self._connection.cursor()
                yield cursor
            except sqlite3.Error as error:
                raise Unavailable("the record store failed", code="store.unavailable") from error
            finally:
                if cursor is not None:
                    cursor.close()


def _apply(cursor: sqlite3.Cursor, write: Write) -> None:
    """Compare and set, in one statement each."""
    where = (write.table, write.key, write.expected_version)
    if write.value is None:
        cursor.execute("DELETE FROM records WHERE tbl = ? AND key = ? AND version = ?", where)
    elif write.expected_version == 0:
        cursor.execute(
            "INSERT INTO records (tbl, key, version, value) VALUES (?, ?, 1, ?) ON CONFLICT DO NOTHING",
            (write.table, write.key, write.value),
        )
    else:
        cursor.execute(
            "UPDATE records SET version = version + 1, value = ? WHERE tbl = ? AND key = ? AND version = ?",
            (write.value, *where),
        )
    if cursor.rowcount != 1:
        raise StoreConflict(
            "the record changed",
            code="store.conflict",
            claim=f"version in {write.table}",
            expected=write.expected_version or "no record",
            actual="another",
        )
