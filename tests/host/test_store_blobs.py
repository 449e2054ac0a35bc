from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from cloister.core.encoding import decode, encode
from cloister.errors import FormatError, NotFound, Tampered, Unavailable, UsageError
from cloister.host.store.app import store_routes
from cloister.host.store.blobs import BlobStore
from cloister.host.store.sqlite import SqliteRecords

DATA = os.urandom(100_000)
DIGEST = hashlib.sha256(DATA).digest()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs", 1_000_000)


def files(blobs: BlobStore) -> list[Path]:
    return [path for path in blobs._directory.rglob("*") if path.is_file()]


def write(blobs: BlobStore, data: bytes = DATA, digest: bytes = DIGEST) -> None:
    with blobs.writer(digest) as writer:
        writer.write(data)
        writer.commit()


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


def test_a_blob_with_another_digest_leaves_nothing(blobs: BlobStore) -> None:
    with pytest.raises(Tampered) as caught:
        write(blobs, DATA + b"x")
    assert caught.value.code == "blob.digest"
    assert files(blobs) == []
    assert blobs.used == 0
    with pytest.raises(Tampered):
        asyncio.run(blobs.put(DIGEST, pieces(DATA, b"x")))
    assert files(blobs) == []


def test_over_the_quota_nothing_is_left(blobs: BlobStore) -> None:
    write(blobs)
    with pytest.raises(Unavailable) as caught:
        asyncio.run(blobs.put(bytes(32), pieces(bytes(500_000), bytes(500_000))))
    assert caught.value.code == "blob.quota"
    assert len(files(blobs)) == 1
    assert blobs.used == len(DATA)


def test_a_stream_that_breaks_leaves_nothing(blobs: BlobStore) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(2 << 18)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        asyncio.run(blobs.put(bytes(32), broken()))
    assert files(blobs) == []
    assert blobs.used == 0


def test_what_a_crash_left_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "half").write_bytes(bytes(10))
    assert BlobStore(tmp_path, 100).used == 0
    assert list((tmp_path / "partial").iterdir()) == []


@pytest.mark.parametrize("digest", [b"", bytes(31), bytes(33)])
def test_refused_address(blobs: BlobStore, digest: bytes) -> None:
    for call in (blobs.has, blobs.size, blobs.open, blobs.writer):
        with pytest.raises(FormatError):
            call(digest)  # type: ignore[operator]


def test_a_blob_that_is_not_there(blobs: BlobStore) -> None:
    assert not blobs.has(DIGEST)
    for call in (blobs.size, blobs.open, blobs.delete):
        with pytest.raises(NotFound):
            call(DIGEST)  # type: ignore[operator]


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 100_001), (100_001, 0), (99_999, 2), (5, -1)])
def test_refused_part(blobs: BlobStore, offset: int, length: int) -> None:
    write(blobs)
    with pytest.raises(UsageError):
        blobs.open(DIGEST, offset, length)


def test_a_blob_that_was_cut_on_disk_is_an_error(blobs: BlobStore) -> None:
    write(blobs)
    with blobs.open(DIGEST) as reader:
        os.truncate(blobs._path(DIGEST), 10)
        with pytest.raises(Unavailable):
            reader.read(100_000)


def test_write_read_and_count(blobs: BlobStore, tmp_path: Path) -> None:
    asyncio.run(blobs.put(DIGEST, pieces(DATA[:10], b"", DATA[10:])))
    write(blobs)  # once more is harmless
    assert blobs.has(DIGEST)
    assert (blobs.size(DIGEST), blobs.used) == (len(DATA), len(DATA))
    with blobs.open(DIGEST) as reader:
        assert reader.read(1 << 20) == DATA
        assert reader.read(1) == b""
    with blobs.open(DIGEST, 5, 7) as reader:
        assert (reader.left, reader.read(100)) == (7, DATA[5:12])
    assert BlobStore(tmp_path / "blobs", 1_000_000).used == len(DATA)
    blobs.delete(DIGEST)
    assert (blobs.used, files(blobs)) == (0, [])


# --- over HTTP ---


class Client:
    """Calls an app in this process."""

    def __init__(self, app: Starlette) -> None:
        self.app = app

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://store") as client:
                return await client.request(method, url, **options)

        return asyncio.run(main())

    get = partialmethod(request, "GET")
    head = partialmethod(request, "HEAD")
    put = partialmethod(request, "PUT")
    post = partialmethod(request, "POST")


@pytest.fixture
def client(blobs: BlobStore, tmp_path: Path) -> Iterator[Client]:
    records = SqliteRecords.open(tmp_path / "records")
    yield Client(Starlette(routes=store_routes(blobs, records)))
    records.close()


URL = f"/blobs/{DIGEST.hex()}"


def test_http_blob(client: Client) -> None:
    assert client.get(URL).status_code == 404
    assert client.put(URL, content=DATA).status_code == 201
    assert client.get(URL).content == DATA
    head = client.head(URL)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "100000", b"")


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("bytes=0-0", 0, 1), ("bytes=10-19", 10, 20), ("bytes=99990-", 99_990, 100_000),
     ("bytes=-7", 99_993, 100_000), ("bytes=99999-200000", 99_999, 100_000)],
)  # fmt: skip
def test_http_range(client: Client, asked: str, start: int, end: int) -> None:
    client.put(URL, content=DATA)
    found = client.get(URL, headers={"range": asked})
    assert (found.status_code, found.content) == (206, DATA[start:end])
    assert found.headers["content-range"] == f"bytes {start}-{end - 1}/100000"


def test_http_range_outside(client: Client) -> None:
    client.put(URL, content=DATA)
    found = client.get(URL, headers={"range": "bytes=100000-"})
    assert (found.status_code, found.headers["content-range"]) == (416, "bytes */100000")
    assert client.get(URL, headers={"range": "bytes=0-1,5-6"}).content == DATA


def test_http_refusals(client: Client, blobs: BlobStore) -> None:
    wrong = client.put(URL, content=DATA + b"x")
    assert (wrong.status_code, wrong.json()["code"]) == (422, "blob.digest")
    assert wrong.headers["content-type"] == "application/problem+json"
    assert client.put(URL, content=bytes(1_000_001)).status_code == 413
    assert client.put("/blobs/" + "A" * 64, content=b"").status_code == 400
    assert client.put("/blobs/00", content=b"").status_code == 400
    assert files(blobs) == []


def test_http_records(client: Client) -> None:
    batch = [["t", b"a", 0, b"1"], ["t", b"b", 0, b"2"]]
    assert client.post("/records", content=encode(batch)).status_code == 204
    again = client.post("/records", content=encode(batch))
    assert (again.status_code, again.json()["code"]) == (409, "store.conflict")
    assert decode(client.get("/records/t").content, what="x") == [[b"a", 1, b"1"], [b"b", 1, b"2"]]
    assert decode(client.get("/records/t?after=61&limit=5").content, what="x") == [[b"b", 1, b"2"]]
    assert decode(client.get("/records/t/61").content, what="x") == [1, b"1"]
    assert client.get("/records/t/63").status_code == 404
    assert client.post("/records", content=encode([["t", b"a", 1, None]])).status_code == 204
    assert client.get("/records/t/61").status_code == 404


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xff", encode({}), encode([[]]), encode([["t", b"a", 0]]), encode([["t", b"a", True, b""]]),
     encode([["t", "a", 0, b""]]), encode([["t", b"a", -1, b""]]), encode([["T", b"a", 0, b""]]),
     encode([["t", b"a", 0, "text"]]), encode([["t", b"a", 0, b"", 1]]), encode([]) + b"\0"],
)  # fmt: skip
def test_http_refused_batch(client: Client, raw: bytes) -> None:
    assert client.post("/records", content=raw).status_code == 400
    assert decode(client.get("/records/t").content, what="x") == []


@pytest.mark.parametrize("query", ["after=zz", "after=6", "limit=0", "limit=-1", "limit=x", "limit=99999"])
def test_http_refused_scan(client: Client, query: str) -> None:
    assert client.get(f"/records/t?{query}").status_code == 400
