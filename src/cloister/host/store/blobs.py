"""Ciphertext blobs in a directory, addressed by their SHA-256.

A blob is written to a temporary file while it is hashed, flushed to disk, and only then renamed to its
address; so a name that exists holds what it says, whatever crashed, and anyone may upload without harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import AsyncIterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

from cloister.errors import FormatError, NotFound, Tampered, Unavailable, UsageError

DIGEST_SIZE: Final = 32  # bytes
_BATCH: Final = 1 << 20  # bytes that an upload collects before it goes to the disk
_PARTIAL: Final = "partial"


class BlobStore:
    """Blobs under one directory. Safe to use from several threads.

    Args:
        directory: Made (mode 0700) when it is first used.
        max_bytes: Bytes that all blobs together may take.
        max_blob: Bytes that one blob may take; as many as all by default.
    """

    def __init__(self, directory: Path, max_bytes: int, *, max_blob: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.max_blob = min(max_bytes, max_blob if max_blob is not None else max_bytes)
        self._directory = directory
        self._lock = threading.Lock()
        self._used: int | None = None  # bytes, written and being written; None until counted

    def has(self, digest: bytes) -> bool:
        """Whether the blob is here."""
        return self._path(digest).is_file()

    def size(self, digest: bytes) -> int:
        """Bytes of the blob.

        Raises:
            NotFound: it isn't here.
        """
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            raise _missing(digest) from None

    def open(self, digest: bytes, offset: int = 0, length: int | None = None) -> BlobReader:
        """Open a blob, or ``length`` bytes of it from ``offset`` on.

        Raises:
            NotFound: it isn't here.
            UsageError: it has no such part.
        """
        try:
            file = self._path(digest).open("rb")
        except FileNotFoundError:
            raise _missing(digest) from None
        size = os.fstat(file.fileno()).st_size
        end = size if length is None else offset + length
        if not 0 <= offset <= end <= size:
            file.close()
            raise UsageError("the blob has no such part", code="blob.range", expected=f"within {size} B")
        file.seek(offset)
        return BlobReader(file, end - offset)

    def writer(self, digest: bytes) -> BlobWriter:
        """Start to write the blob with this digest; see `BlobWriter`."""
        path = self._path(digest)
        try:
            self._prepare()
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._directory / _PARTIAL)
        except OSError as error:
            raise Unavailable("can't write blobs", code="blob.disk") from error
        return BlobWriter(self, digest, path, os.fdopen(descriptor, "wb", buffering=0), Path(name))

    async def put(self, digest: bytes, stream: AsyncIterable[bytes]) -> None:
        """Store what ``stream`` yields as the blob with this digest; disk work happens in threads.

        Raises:
            Tampered: code ``blob.digest``; the bytes have another digest, and nothing is left of them.
            Unavailable: code ``blob.quota`` or ``blob.disk``; nothing is left.
        """
        writer = await asyncio.to_thread(self.writer, digest)
        try:
            batch = bytearray()
            async for piece in stream:
                batch += piece
                if len(batch) >= _BATCH:
                    await asyncio.to_thread(writer.write, batch)
                    batch = bytearray()
            await asyncio.to_thread(writer.write, batch)
            await asyncio.to_thread(writer.commit)
        finally:
            writer.discard()

    def delete(self, digest: bytes) -> None:
        """Remove a blob; readers that have it open read on.

        Raises:
            NotFound: it isn't here.
        """
        self._prepare()
        path = self._path(digest)
        with self._lock:
            try:
                size = path.stat().st_size
                path.unlink()
            except FileNotFoundError:
                raise _missing(digest) from None
            self._used = (self._used or 0) - size

    @property
    def used(self) -> int:
        """Bytes that blobs take, those that are being written included."""
        self._prepare()
        return self._used or 0

    def _path(self, digest: bytes) -> Path:
        if len(digest) != DIGEST_SIZE:
            raise FormatError("not a SHA-256", code="blob.address", expected="32 B", actual=len(digest))
        name = digest.hex()
        return self._directory / name[:2] / name

    def _prepare(self) -> None:
        """Make the directory, drop what a crash left half-written, and count what is there; once."""
        with self._lock:
            if self._used is not None:
                return
            partial = self._directory / _PARTIAL
            partial.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in partial.iterdir():
                left.unlink()
            self._used = sum(
                path.stat().st_size
                for shelf in self._directory.iterdir()
                if shelf.is_dir()
                for path in shelf.iterdir()
            )

    def _reserve(self, count: int) -> None:
        with self._lock:
            if (self._used or 0) + count > self.max_bytes:
                raise Unavailable(
                    "the blob store is full",
                    code="blob.quota",
                    claim="stored bytes",
                    expected=f"at most {self.max_bytes}",
                    actual=(self._used or 0) + count,
                )
            self._used = (self._used or 0) + count

    def _return(self, count: int) -> None:
        with self._lock:
            self._used = (self._used or 0) - count


class BlobReader:
    """A part of a blob, read in order. A context manager.

    Attributes:
        left: Bytes that are still to be read.
    """

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.left = length
        self._file = file

    def read(self, count: int) -> bytes:
        """The next bytes, ``count`` at most; empty at the end.

        Raises:
            Unavailable: the disk failed or the file was cut.
        """
        wanted = min(count, self.left)
        try:
            data = self._file.read(wanted)
        except OSError as error:
            raise Unavailable("can't read a blob", code="blob.disk") from error
        if len(data) != wanted:
            raise Unavailable("a blob was cut", code="blob.disk", expected=wanted, actual=len(data))
        self.left -= wanted
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> BlobReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class BlobWriter:
    """A blob being written: `write` as often as needed, then `commit`; leaving without it discards all."""

    def __init__(self, store: BlobStore, digest: bytes, path: Path, file: BinaryIO, temporary: Path) -> None:
        self._store = store
        self._digest = digest
        self._path = path
        self._file = file
        self._temporary = temporary
        self._hash = hashlib.sha256()
        self._count = 0  # bytes written
        self._lock = threading.Lock()  # a cancelled upload discards while a thread may still write
        self._done = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes.

        Raises:
            Unavailable: code ``blob.quota`` or ``blob.disk``.
        """
        with self._lock:
            if self._done:
                raise Unavailable("the upload was given up", code="blob.closed")
            if self._count + len(data) > self._store.max_blob:
                expected = f"at most {self._store.max_blob} B"
                raise Unavailable("the blob is too large", code="blob.quota", claim="size", expected=expected)
            self._store._reserve(len(data))
            self._count += len(data)
            try:
                view = memoryview(data)
                while view:
                    view = view[self._file.write(view) :]
            except OSError as error:
                raise Unavailable("can't write a blob", code="blob.disk") from error
            self._hash.update(data)

    def commit(self) -> None:
        """Put the blob at its address, for good.

        Raises:
            Tampered: code ``blob.digest``; the bytes have another digest.
            Unavailable: code ``blob.disk``.
        """
        with self._lock:
            if self._done:
                raise Unavailable("the upload was given up", code="blob.closed")
            found = self._hash.digest()
            if found != self._digest:
                raise Tampered(
                    "the blob is not what its address says",
                    code="blob.digest",
                    claim="SHA-256",
                    expected=self._digest.hex(),
                    actual=found.hex(),
                )
            try:
                os.fsync(self._file.fileno())
                self._file.close()
                with self._store._lock:
                    known = self._path.exists()
                    self._temporary.rename(self._path)
                _sync_directory(self._path.parent)
            except OSError as error:
                raise Unavailable("can't write a blob", code="blob.disk") from error
            self._done = True
            if known:
                self._store._return(self._count)

    def discard(self) -> None:
        """Leave nothing behind, unless the blob was committed."""
        with self._lock:
            if self._done:
                return
            self._done = True
            self._file.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            self._store._return(self._count)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _sync_directory(path: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _missing(digest: bytes) -> NotFound:
    return NotFound("no such blob", code="blob.missing", expected=digest.hex())
