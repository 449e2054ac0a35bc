"""Seal a model: two passes over its sections, then a header and chunks to write one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.core.sealing.header import (
    CHUNK_SIZE,
    DIGEST_SIZE,
    SealedHeader,
    SectionRange,
    check_chunk_size,
    check_model_id,
    lay_out,
)
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
from cloister.errors import UsageError

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One named part of a model, as its sealer reads it.

    Attributes:
        name: At most 64 printable ASCII characters.
        length: In bytes.
        read: Gives the section's bytes in order, in buffers of any size. It is called twice (once for the
            Merkle root, once to encrypt) and must give the same bytes both times; a container of bytes that
            changed in between opens nowhere. A buffer must keep its content until the next one is asked for.
    """

    name: str
    length: int
    read: Callable[[], Iterable[Buffer]]

    @classmethod
    def of(cls, name: str, *buffers: Buffer) -> Section:
        """A section that lies in memory, in one buffer or several."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        return cls(name=name, length=sum(view.nbytes for view in views), read=lambda: views)


class Sealing:
    """A model being sealed: its header, known before anything is written, and its container in pieces.

    Iterate, once, to get the container: the header, then each chunk's ciphertext as new `bytes`. Who has to
    start over seals again: a source that changed since would be encrypted under nonces that were used before.

    Attributes:
        header: What the container starts with; its ``digest`` is what the owner's statement signs.
    """

    __slots__ = ("_cipher", "_sections", "_used", "header")

    def __init__(self, header: SealedHeader, sections: Sequence[Section], cipher: AESGCM) -> None:
        self.header = header
        self._sections = sections
        self._cipher = cipher
        self._used = False

    def __iter__(self) -> Iterator[bytes]:
        """Yield the container's pieces in order.

        Raises:
            UsageError: this was begun before (code ``sealing.used``), or a section gave another number of
                bytes than it declared (``sealing.source``).
        """
        if self._used:
            raise UsageError("a container is written once; to start over, seal again", code="sealing.used")
        self._used = True
        yield self.header.to_bytes()
        digest, last = self.header.digest, self.header.chunks - 1
        runs = _cut(self._sections, self.header.sections, self.header.chunk_size)
        for index, chunk in enumerate(chain.from_iterable(runs)):
            yield self._cipher.encrypt(
                chunk_nonce(index, last=index == last), chunk, chunk_aad(digest, index)
            )


def seal(sections: Sequence[Section], *, model_id: str, key: Secret, chunk_size: int = CHUNK_SIZE) -> Sealing:
    """Seal ``sections`` under the model key.

    This makes the first pass (SHA-256, in two threads that end with it); iterating over the result makes the
    second (AES-256-GCM). A key may seal any number of models: each has its own salt and so its own file key.

    Args:
        sections: In the order of the plaintext; each starts at a page of it, with zeros in between.
        model_id: ``<owner>/<name>``.
        key: The model key, 32 bytes.
        chunk_size: Plaintext bytes per chunk, a power of two from 4 KiB to 16 MiB.

    Raises:
        FormatError: names, sizes or the model id are out of bounds (code ``sealing.format``).
        UsageError: the key is not 32 bytes (``sealing.key-size``), or a section gave another number of bytes
            than it declared (``sealing.source``).
    """
    require_key(key)
    check_model_id(model_id)
    check_chunk_size(chunk_size)
    layout = lay_out([(section.name, section.length) for section in sections])
    salt = os.urandom(DIGEST_SIZE)
    with ThreadPoolExecutor(2, thread_name_prefix="seal") as hashers:
        tree = ChunkTree(derive_leaf_key(key, salt), hashers)
        for run in _cut(sections, layout, chunk_size):
            for chunk in run:
                tree.append(chunk)
            tree.settle()
        root = tree.root()
    header = SealedHeader(
        model_id=model_id,
        size=layout[-1].stop,
        chunk_size=chunk_size,
        salt=salt,
        commitment=derive_commitment(key, salt),
        root=root,
        sections=layout,
    )
    return Sealing(header, tuple(sections), chunk_cipher(key, header))


def _cut(
    sections: Sequence[Section], layout: Sequence[SectionRange], chunk_size: int
) -> Iterator[Iterable[memoryview]]:
    """Cut the plaintext into chunks, given in runs; a chunk keeps its content until the next run.

    A chunk that lies in one of the caller's buffers is not copied.
    """
    scratch = memoryview(bytearray(chunk_size))
    fill, empty = 0, True
    for piece in _pieces(sections, layout):
        rest = piece
        if fill:
            taken = min(chunk_size - fill, len(rest))
            scratch[fill : fill + taken] = rest[:taken]
            fill, rest = fill + taken, rest[taken:]
            if fill < chunk_size:
                continue
            yield (scratch,)
            fill, empty = 0, False
        whole = len(rest) - len(rest) % chunk_size
        if whole:
            yield [rest[start : start + chunk_size] for start in range(0, whole, chunk_size)]
            empty = False
        fill = len(rest) - whole
        scratch[:fill] = rest[whole:]
    if fill or empty:
        yield (scratch[:fill],)


def _pieces(sections: Sequence[Section], layout: Sequence[SectionRange]) -> Iterator[memoryview]:
    """The plaintext in order, gaps included; every section is held to its declared length."""
    position = 0
    for section, place in zip(sections, layout, strict=True):
        yield memoryview(bytes(place.offset - position))
        length = 0
        for buffer in section.read():
            view = memoryview(buffer).cast("B")
            length += view.nbytes
            if length > section.length:
                raise _wrong_length(section, f"more than {section.length} B")
            yield view
        if length != section.length:
            raise _wrong_length(section, f"{length} B")
        position = place.stop


def _wrong_length(section: Section, actual: str) -> UsageError:
    return UsageError(
        "a section has another length than it declared",
        code="sealing.source",
        claim=f"length of section {section.name!r}",
        expected=f"{section.length} B",
        actual=actual,
    )
