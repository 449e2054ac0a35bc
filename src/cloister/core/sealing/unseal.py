"""Open a sealed model: by chunk, at random, or as a stream that gives nothing out before its end verified."""

from __future__ import annotations

import hmac
from concurrent.futures import Executor, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

from cryptography.exceptions import InvalidTag

from cloister.core.sealing.header import TAG_SIZE, SealedHeader, header_size
from cloister.core.sealing.keys import (
    ChunkTree,
    chunk_aad,
    chunk_cipher,
    chunk_nonce,
    derive_commitment,
    derive_leaf_key,
    require_key,
)
from cloister.core.secret import Secret
from cloister.errors import Tampered, UsageError

Buffer = bytes | bytearray | memoryview
_HASHED_BESIDE: Final = 4 << 20  # bytes of plaintext from which a thread of its own hashes


class Opener:
    """Opens the chunks of one sealed model.

    Ciphertext is read in place. A caller whose ciphertext lies in memory that the host can write (a shared
    mapping, host buffers inside an SGX process) copies each chunk inside first; bytes read from a socket are
    the caller's own. `Unsealer` always copies. Not safe for use by several threads at once.

    Attributes:
        header: Of the container.

    Args:
        key: The model key, 32 bytes.
        header: As it was read from the host.
        digest: SHA-256 of the header that the owner's statement names, 32 bytes. Who sealed the container
            itself, and holds it still, passes ``header.digest``.
        hashers: As `ChunkTree`: what `open_into` fills must then keep its content until `finish` returns.

    Raises:
        UsageError: the key is not 32 bytes (code ``sealing.key-size``).
        Tampered: another header (code ``sealing.header``) or another key (code ``sealing.key``).
    """

    __slots__ = ("_cipher", "_digest", "_opened", "_tree", "header")

    def __init__(
        self, key: Secret, header: SealedHeader, *, digest: bytes, hashers: Executor | None = None
    ) -> None:
        require_key(key)
        header.require(digest)
        if not hmac.compare_digest(derive_commitment(key, header.salt), header.commitment):
            raise Tampered(
                "the sealed model was sealed under another key, or its key commitment was altered",
                code="sealing.key",
                claim="key commitment",
                expected="the key that sealed the model",
                actual="another key",
            )
        self.header = header
        self._digest = digest
        self._cipher = chunk_cipher(key, header)
        self._tree = ChunkTree(derive_leaf_key(key, header.salt), hashers)
        self._opened = 0

    @property
    def opened(self) -> int:
        """How many chunks `open_into` has opened: the index of the next."""
        return self._opened

    def open_into(self, ciphertext: Buffer, out: bytearray | memoryview) -> int:
        """Open the next chunk in order into the front of ``out``, and say how many bytes it has.

        Where a chunk is refused nothing of it is left in ``out``, and the same chunk may be tried again.

        Raises:
            Tampered: the chunk is altered, or another one (code ``sealing.chunk``); shorter
                (``sealing.truncated``) or longer (``sealing.extended``) than it was; or there is none left
                (``sealing.extended``).
            UsageError: ``out`` is too small (code ``sealing.buffer``).
        """
        index = self._opened
        if index >= self.header.chunks:
            raise _extended(f"{self.header.chunks} chunks", "more")
        length = self.header.chunk_length(index)
        view = memoryview(out)
        if view.nbytes < length or view.readonly:
            raise UsageError(
                "no room for the chunk",
                code="sealing.buffer",
                claim="buffer",
                expected=f"at least {length} B to write to",
                actual=f"{view.nbytes} B",
            )
        target = view.cast("B")[:length]
        self._decrypt(index, ciphertext, target)
        self._tree.append(target)
        self._opened += 1
        return length

    def open_chunk(self, index: int, ciphertext: Buffer) -> bytes:
        """Open any chunk by itself, as often as needed; `finish` doesn't count it.

        The chunk is authenticated under the file key and this header. Only the whole model (`finish`) is held
        to the Merkle root too, which matters against someone who has the model key.

        Raises:
            FormatError: there is no such chunk (code ``sealing.range``).
            Tampered: as `open_into`.
        """
        out = bytearray(self.header.chunk_length(index))
        self._decrypt(index, ciphertext, memoryview(out))
        return bytes(out)

    def finish(self) -> None:
        """Accept the model, after the last chunk of `open_into`.

        Raises:
            Tampered: chunks are missing (code ``sealing.truncated``), or all are genuine under the key but
                not the model that the owner signed (code ``sealing.root``).
        """
        if self._opened != self.header.chunks:
            raise _truncated(f"{self.header.chunks} chunks", f"{self._opened} chunks")
        if not hmac.compare_digest(self._tree.root(), self.header.root):
            raise Tampered(
                "the sealed model's plaintext is not the one that its header commits to",
                code="sealing.root",
                claim="Merkle root",
                expected=self.header.root.hex(),
                actual=self._tree.root().hex(),
            )

    def _decrypt(self, index: int, ciphertext: Buffer, target: memoryview) -> None:
        expected = len(target) + TAG_SIZE
        actual = memoryview(ciphertext).nbytes
        if actual < expected:
            raise _truncated(f"{expected} B in chunk {index}", f"{actual} B")
        if actual > expected:
            raise _extended(f"{expected} B in chunk {index}", f"{actual} B")
        nonce = chunk_nonce(index, last=index == self.header.chunks - 1)
        try:
            self._cipher.decrypt_into(nonce, ciphertext, chunk_aad(self._digest, index), target)
        except InvalidTag:
            target[:] = bytes(len(target))  # GCM decrypts before it verifies
            raise Tampered(
                "a chunk of the sealed model was altered, or belongs elsewhere",
                code="sealing.chunk",
                claim=f"chunk {index}",
                expected="the chunk that was sealed there",
                actual="another",
            ) from None


class Unsealer:
    """Opens a container's chunks as they arrive, in pieces of any size; gives the sections out at the end.

    Feed it what follows the header. Either `feed` pieces, or read straight into `room` and say how much with
    `filled`; the ciphertext is this object's own copy in both cases. Holds the plaintext and one chunk.

    A context manager: from 4 MiB on, a thread hashes each chunk while the next is decrypted, and leaving ends
    it.

    Attributes:
        header: Of the container.

    Args:
        key: As `Opener`.
        header: As `Opener`. Check its ``size`` against the memory there is: this allocates it, after the
            header's digest and the key were verified.
        digest: As `Opener`.
        into: Where the plaintext goes (``header.size`` bytes or more, for example a mapped private file)
            instead of a new buffer. It holds unverified chunks until `finish` returns.

    Raises:
        UsageError: a key or ``into`` of the wrong size (codes ``sealing.key-size``, ``sealing.buffer``).
        Tampered: as `Opener`.
    """

    __slots__ = ("_fill", "_hasher", "_opener", "_plaintext", "_position", "_scratch", "header")

    def __init__(
        self, key: Secret, header: SealedHeader, *, digest: bytes, into: bytearray | memoryview | None = None
    ) -> None:
        self._hasher = ThreadPoolExecutor(1, "unseal") if header.size >= _HASHED_BESIDE else None
        self._opener = Opener(key, header, digest=digest, hashers=self._hasher)
        self.header = header
        plaintext = memoryview(bytearray(header.size) if into is None else into).cast("B")
        if plaintext.nbytes < header.size or plaintext.readonly:
            raise UsageError(
                "no room for the sealed model",
                code="sealing.buffer",
                claim="buffer",
                expected=f"at least {header.size} B to write to",
                actual=f"{plaintext.nbytes} B",
            )
        self._plaintext = plaintext[: header.size]
        self._scratch = memoryview(bytearray(min(header.chunk_size, header.size) + TAG_SIZE))
        self._fill = 0
        self._position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; what `finish` gave stays."""
        if self._hasher is not None:
            self._hasher.shutdown(cancel_futures=True)

    def room(self) -> memoryview:
        """Where the next bytes of ciphertext go; empty once the last chunk is open."""
        return self._scratch[self._fill : self._wanted()]

    def filled(self, count: int) -> None:
        """Take the first ``count`` bytes of `room` as read.

        Raises:
            UsageError: more than there was room for (code ``sealing.buffer``).
            Tampered: as `Opener.open_into`.
        """
        wanted = self._wanted()
        if not 0 <= count <= wanted - self._fill:
            raise UsageError(
                "more than there was room for",
                code="sealing.buffer",
                claim="count",
                expected=f"at most {wanted - self._fill}",
                actual=count,
            )
        self._fill += count
        if wanted and self._fill == wanted:
            self._fill = 0
            self._position += self._opener.open_into(
                self._scratch[:wanted], self._plaintext[self._position :]
            )

    def feed(self, piece: Buffer) -> None:
        """Take the next bytes of ciphertext.

        Raises:
            Tampered: as `Opener.open_into`; bytes after the last chunk: code ``sealing.extended``.
        """
        rest = memoryview(piece).cast("B")
        while rest.nbytes:
            room = self.room()
            if not room.nbytes:
                raise _extended(f"{self.header.container_size} B", "more")
            count = min(room.nbytes, rest.nbytes)
            room[:count] = rest[:count]
            rest = rest[count:]
            self.filled(count)

    def finish(self) -> dict[str, memoryview]:
        """The sections by name, read-only, once every chunk and the whole verified.

        Raises:
            Tampered: as `Opener.finish`.
        """
        if self._fill:
            raise _truncated(f"{self._wanted()} B in the next chunk", f"{self._fill} B")
        self._opener.finish()
        plaintext = self._plaintext.toreadonly()
        return {part.name: plaintext[part.offset : part.stop] for part in self.header.sections}

    def _wanted(self) -> int:
        index = self._opener.opened
        return self.header.chunk_length(index) + TAG_SIZE if index < self.header.chunks else 0


def read_sections(container: Buffer, *, key: Secret, digest: bytes) -> dict[str, memoryview]:
    """Open a container that lies in memory as a whole: its sections by name.

    Raises:
        FormatError: the header does not parse (code ``sealing.format``).
        Tampered: as `Unsealer`.
    """
    view = memoryview(container).cast("B")
    size = header_size(view)
    if view.nbytes < size:
        raise _truncated(f"{size} B of header", f"{view.nbytes} B")
    with Unsealer(key, SealedHeader.from_bytes(view[:size]), digest=digest) as unsealer:
        unsealer.feed(view[size:])
        return unsealer.finish()


def _truncated(expected: str, actual: str) -> Tampered:
    return Tampered(
        "the sealed model was cut short",
        code="sealing.truncated",
        claim="length",
        expected=expected,
        actual=actual,
    )


def _extended(expected: str, actual: str) -> Tampered:
    return Tampered(
        "the sealed model goes on after its end",
        code="sealing.extended",
        claim="length",
        expected=expected,
        actual=actual,
    )
