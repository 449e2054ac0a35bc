"""What a sealed model's key gives: a key commitment, a key for Merkle leaves and a key for chunks.

Three derivations (HKDF-SHA256, RFC 5869) from one model key and the container's 32-byte salt:

1. the **commitment** and the **leaf key** depend on model key and salt alone, because the header holds what
   they make;
2. the **file key** depends on the complete header too, so that chunks open under no other header.

AES-GCM by itself does not commit to its key; the commitment does, as HKDF-SHA256 is collision-resistant for
keys of one length.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import deque
from concurrent.futures import Executor, Future
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.core.encoding import encode
from cloister.core.sealing.header import FORMAT, SealedHeader
from cloister.core.secret import Secret
from cloister.errors import UsageError

KEY_SIZE: Final = 32  # bytes
_MAX_WAITING: Final = 4  # chunks that wait for a hasher


def require_key(key: Secret) -> None:
    """Refuse a key of the wrong length.

    Raises:
        UsageError: not 32 bytes (code ``sealing.key-size``).
    """
    if len(key) != KEY_SIZE:
        raise UsageError(
            "a sealing key of the wrong length",
            code="sealing.key-size",
            claim="key size",
            expected=f"{KEY_SIZE} B",
            actual=f"{len(key)} B",
        )


def derive_commitment(key: Secret, salt: bytes) -> bytes:
    """32 bytes that tell this model key from every other, and nothing else about it."""
    return _derive(key, salt, "commitment")


def derive_leaf_key(key: Secret, salt: bytes) -> bytes:
    """The 32-byte key of the Merkle leaves.

    It keeps the host from confirming a guess: without it, the root of a public model would be a public value.
    """
    return _derive(key, salt, "leaf")


def chunk_cipher(key: Secret, header: SealedHeader) -> AESGCM:
    """AES-256-GCM under the file key, which only this header and this model key give."""
    return AESGCM(_derive(key, header.salt, "file", header.digest))


def chunk_nonce(index: int, *, last: bool) -> bytes:
    """Counter and final flag (STREAM), 12 bytes: a truncated or extended container has no chunk that fits."""
    return index.to_bytes(11, "big") + (b"\x01" if last else b"\x00")


def chunk_aad(header_digest: bytes, index: int) -> bytes:
    """Header digest (32 bytes) and index (8 bytes)."""
    return header_digest + index.to_bytes(8, "big")


class ChunkTree:
    """Merkle root over the plaintext's chunks, one pass, memory for one hash per level.

    The tree has RFC 9162's shape (section 2.1.1). Leaf: HMAC-SHA256 of the chunk under the leaf key; node:
    SHA-256 of 0x01, left, right. The number of leaves is fixed by the header, so leaves and nodes can't be
    taken for each other.

    Args:
        leaf_key: 32 bytes.
        hashers: Threads, the caller's, that hash leaves while the caller goes on: SHA-256 is the slowest part
            of sealing. A chunk must then keep its content until `settle` or `root` returns.
    """

    __slots__ = ("_count", "_hashers", "_leaf_key", "_pending", "_waiting")

    def __init__(self, leaf_key: bytes, hashers: Executor | None = None) -> None:
        self._leaf_key = leaf_key
        self._hashers = hashers
        self._count = 0
        self._pending: list[bytes] = []  # roots of complete subtrees, the largest first
        self._waiting: deque[Future[bytes]] = deque()

    def append(self, chunk: bytes | memoryview) -> None:
        """Add the next chunk of plaintext."""
        if self._hashers is None:
            self._add(self._hash_leaf(chunk))
            return
        if len(self._waiting) == _MAX_WAITING:
            self._add(self._waiting.popleft().result())
        self._waiting.append(self._hashers.submit(self._hash_leaf, chunk))

    def settle(self) -> None:
        """Wait until every chunk was read."""
        while self._waiting:
            self._add(self._waiting.popleft().result())

    def root(self) -> bytes:
        """The root over the chunks added so far; at least one."""
        self.settle()
        node = self._pending[-1]
        for left in reversed(self._pending[:-1]):
            node = _join(left, node)
        return node

    def _hash_leaf(self, chunk: bytes | memoryview) -> bytes:
        return hmac.digest(self._leaf_key, chunk, "sha256")

    def _add(self, node: bytes) -> None:
        merges = self._count
        while merges & 1:
            node = _join(self._pending.pop(), node)
            merges >>= 1
        self._pending.append(node)
        self._count += 1


def _join(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _derive(key: Secret, salt: bytes, label: str, *context: bytes) -> bytes:
    info = encode([FORMAT, label, *context])
    return HKDF(algorithm=SHA256(), length=KEY_SIZE, salt=salt, info=info).derive(key.reveal())
