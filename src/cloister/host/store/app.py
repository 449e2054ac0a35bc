"""The stores over HTTP: records and blobs for enclaves, blobs for owners' uploads. All of it is ciphertext.

::

    GET  /records/{table}?after=HEX&limit=N   200 CBOR [[key, version, value], ...]; an empty list at the end
    GET  /records/{table}/{key in hex}        200 CBOR [version, value], or 404
    POST /records                             CBOR [[table, key, expected version, value or null], ...];
                                              204, or 409 if a record has another version
    GET, HEAD /blobs/{SHA-256 in hex}         200, or 206 for one Range
    PUT  /blobs/{SHA-256 in hex}              201; 422 if the bytes have another digest
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from cloister.core.encoding import decode, encode
from cloister.errors import CloisterError, FormatError, NotFound
from cloister.host.asgi import read_body
from cloister.host.problems import problem_response, status_of
from cloister.host.store.blobs import BlobStore
from cloister.host.store.records import MAX_BATCH_BYTES, MAX_SCAN, RecordStore, Write

CBOR: Final = "application/cbor"
_SLACK: Final = 64 << 10  # bytes that the encoding adds to a batch
_PIECE: Final = 1 << 20  # bytes read from a blob at a time
_RANGE: Final = re.compile(r"bytes=([0-9]{0,15})-([0-9]{0,15})")
_Endpoint = Callable[[Request], Awaitable[Response]]


def store_routes(blobs: BlobStore, records: RecordStore) -> list[Route]:
    """All routes, for the enclave's own link."""
    return [*record_routes(records), *blob_routes(blobs)]


def record_routes(records: RecordStore) -> list[Route]:
    """Routes to records. They never face the network: whoever reaches them may write."""

    async def scan(request: Request) -> Response:
        after = _hex(request.query_params.get("after", ""))
        limit = _number(request.query_params.get("limit", str(MAX_SCAN)))
        found = await asyncio.to_thread(records.scan, request.path_params["table"], after, limit)
        return Response(encode([[each.key, each.version, each.value] for each in found]), media_type=CBOR)

    async def get(request: Request) -> Response:
        key = _hex(request.path_params["key"])
        record = await asyncio.to_thread(records.get, request.path_params["table"], key)
        if record is None:
            raise NotFound("no such record", code="store.missing")
        return Response(encode([record.version, record.value]), media_type=CBOR)

    async def apply(request: Request) -> Response:
        limit = MAX_BATCH_BYTES + _SLACK
        raw = await read_body(request, limit)
        await asyncio.to_thread(records.apply, _writes(decode(raw, what="a batch of writes", limit=limit)))
        return Response(status_code=204)

    return [
        Route("/records/{table}", _answering(scan), methods=["GET"]),
        Route("/records/{table}/{key}", _answering(get), methods=["GET"]),
        Route("/records", _answering(apply), methods=["POST"]),
    ]


def blob_routes(blobs: BlobStore) -> list[Route]:
    """Routes to blobs. Anyone may write one: it can only ever be what its address says."""

    async def read(request: Request) -> Response:
        digest = _hex(request.path_params["digest"])
        size = await asyncio.to_thread(blobs.size, digest)
        headers = {
            "accept-ranges": "bytes",
            "cache-control": "public, max-age=31536000, immutable",
            "etag": f'"{digest.hex()}"',
        }
        start, end = 0, size
        part = _part(request.headers.get("range", ""), size)
        if part is not None:
            start, end = part
            if start >= end:
                return problem_response(416, "blob.range", {"content-range": f"bytes */{size}"})
            headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
        headers["content-length"] = str(end - start)
        status, media = 206 if part is not None else 200, "application/octet-stream"
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers, media_type=media)
        pieces = _pieces(blobs, digest, start, end - start)
        return StreamingResponse(pieces, status, headers=headers, media_type=media)

    async def write(request: Request) -> Response:
        digest = _hex(request.path_params["digest"])
        declared = request.headers.get("content-length")
        if declared is not None and int(declared) > blobs.max_blob:
            expected = f"at most {blobs.max_blob} B"
            raise FormatError("the blob is too large", code="http.too-large", expected=expected)
        try:
            await blobs.put(digest, request.stream())
        except ClientDisconnect:
            return problem_response(400, "http.truncated")  # nobody reads it; the upload is gone
        return Response(status_code=201)

    return [
        Route("/blobs/{digest}", _answering(read), methods=["GET", "HEAD"]),
        Route("/blobs/{digest}", _answering(write), methods=["PUT"]),
    ]


def _answering(endpoint: _Endpoint) -> _Endpoint:
    """Turn our errors into problems, in whatever app the route stands."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except CloisterError as error:
            return problem_response(status_of(error), error.code)

    return answer


async def _pieces(blobs: BlobStore, digest: bytes, start: int, length: int) -> AsyncIterator[bytes]:
    # Opened here, not by the route: an iterator that is never started would never close it.
    with await asyncio.to_thread(blobs.open, digest, start, length) as reader:
        while reader.left:
            yield await asyncio.to_thread(reader.read, _PIECE)


def _part(text: str, size: int) -> tuple[int, int] | None:
    """Start and end of the one range asked for (RFC 9110, section 14.2); None: the whole.

    Several ranges, or other units, are answered with the whole, as a server may.
    """
    match = _RANGE.fullmatch(text)
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    start = int(match[1])
    return start, min(size, int(match[2]) + 1) if match[2] else size


def _writes(value: Any) -> list[Write]:
    if not isinstance(value, list):
        raise FormatError("a batch is not an array", code="store.format")
    writes = []
    for item in value:
        match item:
            case [str(table), bytes(key), int(version), bytes() | None as data] if type(version) is int:
                writes.append(Write(table=table, key=key, expected_version=version, value=data))
            case _:
                raise FormatError("not a write", code="store.format", expected="[table, key, version, value]")
    return writes


def _hex(text: str) -> bytes:
    if re.fullmatch(r"(?:[0-9a-f]{2}){0,256}", text) is None:
        raise FormatError("not lower-case hexadecimal", code="store.format", claim="key")
    return bytes.fromhex(text)


def _number(text: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise FormatError("not a number", code="store.format", claim="limit")
    return int(text)
