"""What every record store must do. A new implementation joins by a line in ``STORES``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloister.errors import FormatError, StoreConflict, Unavailable, UsageError
from cloister.host.store.records import MAX_KEY, MAX_VALUE, Record, RecordStore, Write
from cloister.host.store.sqlite import SqliteRecords

STORES: dict[str, Callable[[Path], RecordStore]] = {
    "sqlite": lambda path: SqliteRecords.open(path / "records")
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RecordStore]:
    made = STORES[request.param](tmp_path)
    yield made
    made.close()


def put(key: bytes, expected: int, value: bytes | None, table: str = "t") -> Write:
    return Write(table=table, key=key, expected_version=expected, value=value)


@pytest.mark.parametrize(
    ("write", "before"),
    [
        (put(b"k", 0, b"x"), 1),
        (put(b"k", 2, b"x"), 1),
        (put(b"k", 1, b"x"), 0),
        (put(b"k", 1, None), 0),
        (put(b"k", 2, None), 1),
    ],
    ids=["exists", "newer expected", "none to change", "none to delete", "newer to delete"],
)
def test_conflict_changes_nothing(store: RecordStore, write: Write, before: int) -> None:
    if before:
        store.apply([put(b"k", 0, b"old")])
    with pytest.raises(StoreConflict) as caught:
        store.apply([put(b"first", 0, b"1"), write, put(b"last", 0, b"1")])
    assert caught.value.code == "store.conflict"
    assert store.get("t", b"first") is None
    assert store.get("t", b"last") is None
    found = store.get("t", b"k")
    assert found == (Record(table="t", key=b"k", version=1, value=b"old") if before else None)


@pytest.mark.parametrize("table", ["", "T", "a b", "a;drop", "1a", "a" * 33, "ä"])
def test_refused_table(store: RecordStore, table: str) -> None:
    with pytest.raises(FormatError):
        put(b"k", 0, b"v", table)
    with pytest.raises(FormatError):
        store.get(table, b"k")
    with pytest.raises(FormatError):
        store.scan(table, b"", 1)


@pytest.mark.parametrize("key", [b"", b"k" * (MAX_KEY + 1)])
def test_refused_key(store: RecordStore, key: bytes) -> None:
    with pytest.raises(FormatError):
        put(key, 0, b"v")
    with pytest.raises(FormatError):
        store.get("t", key)


@pytest.mark.parametrize(
    ("expected", "value"), [(-1, b"v"), ((1 << 63) - 1, b"v"), (0, None), (0, bytes(MAX_VALUE + 1))]
)
def test_refused_write(expected: int, value: bytes | None) -> None:
    with pytest.raises(FormatError):
        put(b"k", expected, value)


def test_refused_batch(store: RecordStore) -> None:
    for batch in (
        [put(b"k", 0, b"1"), put(b"k", 1, b"2")],
        [put(b"%d" % n, 0, b"") for n in range(257)],
        [put(b"%d" % n, 0, bytes(MAX_VALUE)) for n in range(3)],
    ):
        with pytest.raises(FormatError):
            store.apply(batch)
    assert store.scan("t", b"", 10) == []


@pytest.mark.parametrize("limit", [0, -1, 1025])
def test_refused_scan(store: RecordStore, limit: int) -> None:
    with pytest.raises(FormatError):
        store.scan("t", b"", limit)


def test_a_closed_store_is_our_error(store: RecordStore) -> None:
    store.close()
    with pytest.raises(Unavailable):
        store.get("t", b"k")


def test_life_of_a_record(store: RecordStore) -> None:
    assert store.get("t", b"k") is None
    store.apply([put(b"k", 0, b"one")])
    store.apply([put(b"k", 1, b"two"), put(b"k", 0, b"other table", "u")])
    assert store.get("t", b"k") == Record(table="t", key=b"k", version=2, value=b"two")
    assert store.get("u", b"k") == Record(table="u", key=b"k", version=1, value=b"other table")
    store.apply([put(b"k", 2, None)])
    assert store.get("t", b"k") is None
    store.apply([put(b"k", 0, b"")])
    assert store.get("t", b"k") == Record(table="t", key=b"k", version=1, value=b"")


def test_scan_pages_in_the_order_of_bytes(store: RecordStore) -> None:
    keys = [b"\x00", b"\x00\x01", b"a", b"ab", b"b", b"\xff", b"\xff\xff"]
    store.apply([put(key, 0, key) for key in reversed(keys)])
    store.apply([put(b"x", 0, b"x", "u")])
    found: list[bytes] = []
    while page := store.scan("t", found[-1] if found else b"", 3):
        assert len(page) <= 3
        found += [each.key for each in page]
    assert found == keys


def test_scan_stops_at_its_size_and_goes_on(store: RecordStore) -> None:
    for n in range(4):
        store.apply([put(b"%d" % n, 0, bytes(MAX_VALUE - 100))])
    found: list[bytes] = []
    pages = 0
    while page := store.scan("t", found[-1] if found else b"", 100):
        pages += 1
        found += [each.key for each in page]
    assert (found, pages) == ([b"0", b"1", b"2", b"3"], 4)


def test_of_all_who_write_one_version_one_wins(store: RecordStore) -> None:
    store.apply([put(b"k", 0, b"")])
    won: list[int] = []

    def race(n: int) -> None:
        try:
            store.apply([put(b"k", 1, b"%d" % n)])
            won.append(n)
        except StoreConflict:
            pass

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.get("t", b"k")
    assert found is not None
    assert (found.version, [found.value]) == (2, [b"%d" % n for n in won])


# --- SQLite's own ---


def test_sqlite_refuses_another_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(UsageError) as caught:
        SqliteRecords.open(path)
    assert caught.value.code == "store.file"
    with pytest.raises(UsageError):
        SqliteRecords.open(tmp_path / "no" / "directory")


def test_sqlite_keeps_records_over_a_restart_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "f"
    first = SqliteRecords.open(path)
    first.apply([put(b"k", 0, b"v")])
    first.close()
    assert path.stat().st_mode & 0o777 == 0o600
    second = SqliteRecords.open(path)
    assert second.get("t", b"k") == Record(table="t", key=b"k", version=1, value=b"v")
    assert second._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert second._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    second.close()


def test_sqlite_that_another_process_locks_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.host.store.sqlite._BUSY", 0.05)
    one, other = SqliteRecords.open(tmp_path / "f"), SqliteRecords.open(tmp_path / "f")
    one._connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable) as caught:
        other.apply([put(b"k", 0, b"v")])
    assert caught.value.code == "store.unavailable"
    one._connection.execute("ROLLBACK")
    other.apply([put(b"k", 0, b"v")])
    one.close()
    other.close()
