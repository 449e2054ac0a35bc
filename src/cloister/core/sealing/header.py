"""The header of a sealed model: what it is, how it is cut, and what commits to it.

A container is a header, then chunks. The header is magic (8 bytes), version and body length (big-endian, 4
bytes each), and a body in deterministic CBOR. The plaintext is the sections in order, each at the next page,
zeros between; it is cut into chunks of ``chunk_size`` bytes, the last shorter. Each chunk is its AES-256-GCM
ciphertext and tag:

* nonce: chunk index (11 bytes, big-endian) and final flag (1 byte), as in the STREAM construction (Hoang,
  Reyhanitabar, Rogaway, Vizár: "Online authenticated-encryption and its nonce-reuse misuse-resistance",
  2015);
* associated data: SHA-256 of the header, chunk index (8 bytes, big-endian);
* key: derived from the model key, the header's salt and the whole header (`keys`).

So every chunk has a place that can be computed, opens by itself, and only at its index of this very
container.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cloister.core.encoding import decode, encode
from cloister.errors import FormatError, Tampered

MAGIC: Final = b"CLSTSEAL"
VERSION: Final = 1
PREFIX: Final = struct.Struct(">8sII")  # magic, version, length of the CBOR body
PREFIX_SIZE: Final = PREFIX.size  # bytes
MAX_BODY: Final = 64 << 10  # bytes of CBOR
FORMAT: Final = "cloister/sealed-model/v1"

CHUNK_SIZE: Final = 1 << 20  # bytes of plaintext in every chunk but the last
MIN_CHUNK_SIZE: Final = 4 << 10  # bytes
MAX_CHUNK_SIZE: Final = 16 << 20  # bytes
TAG_SIZE: Final = 16  # bytes
DIGEST_SIZE: Final = 32  # bytes; salt, commitment and root have this length too
MAX_SIZE: Final = 1 << 40  # bytes of plaintext
MAX_SECTIONS: Final = 16
MAX_NAME: Final = 64  # characters of a section's name
MAX_MODEL_ID: Final = 512  # characters
SECTION_ALIGNMENT: Final = 4096  # bytes: a page, so that a section in a mapped file can be mapped by itself

_FIELDS: Final = ("format", "model", "size", "chunk_size", "salt", "commitment", "root", "sections")


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionRange:
    """Where one section lies in the plaintext.

    Attributes:
        name: ``"graph"``, ``"weights"``, ...
        offset: First byte, a multiple of `SECTION_ALIGNMENT`.
        length: In bytes; zero is allowed.
    """

    name: str
    offset: int
    length: int

    @property
    def stop(self) -> int:
        """The byte after the last one."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpan:
    """The part of one chunk that a byte range of the plaintext needs.

    Attributes:
        index: Of the chunk.
        start: First byte of its ciphertext in the container.
        stop: The byte after its ciphertext (tag included) in the container.
        skip: Bytes of the opened chunk that precede the range.
        take: Bytes of the opened chunk that belong to the range.
    """

    index: int
    start: int
    stop: int
    skip: int
    take: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedHeader:
    """What stands in clear before the chunks of a sealed model.

    The host reads it, so it holds nothing about the plaintext but names and sizes: ``root`` is over keyed
    leaves and ``commitment`` is the output of a key derivation, so neither confirms a guess of the weights.

    Attributes:
        model_id: ``<owner>/<name>``, or any printable text without spaces at its ends.
        size: Of the plaintext, in bytes, gaps between sections included.
        chunk_size: Plaintext bytes of every chunk but the last; a power of two.
        salt: 32 random bytes, new for each sealing.
        commitment: 32 bytes that only one model key gives with this salt.
        root: Merkle root over the plaintext's chunks, 32 bytes.
        sections: In the order of the plaintext.

    Raises:
        FormatError: a field is not what it must be (code ``sealing.format``).
    """

    model_id: str
    size: int
    chunk_size: int
    salt: bytes
    commitment: bytes
    root: bytes
    sections: tuple[SectionRange, ...]

    def __post_init__(self) -> None:
        check_model_id(self.model_id)
        check_chunk_size(self.chunk_size)
        for claim, value in (("salt", self.salt), ("commitment", self.commitment), ("root", self.root)):
            if type(value) is not bytes or len(value) != DIGEST_SIZE:
                raise _malformed(claim, f"{DIGEST_SIZE} bytes", _size_of(value))
        if not all(type(number) is int for number in (self.size, *(part.offset for part in self.sections))):
            raise _malformed("sizes and offsets", "integers", "other values")
        expected = lay_out([(part.name, part.length) for part in self.sections])
        if self.sections != expected:
            raise _malformed("sections", "each at the next page after the one before", "other offsets")
        if self.size != expected[-1].stop:
            raise _malformed("size", expected[-1].stop, self.size)

    @property
    def digest(self) -> bytes:
        """SHA-256 of `to_bytes`: what the owner's statement signs."""
        return hashlib.sha256(self.to_bytes()).digest()

    @property
    def chunks(self) -> int:
        """How many chunks follow; an empty plaintext has one, empty."""
        return max(1, -(-self.size // self.chunk_size))

    @property
    def container_size(self) -> int:
        """Of the whole container in bytes: header, chunks and their tags."""
        return len(self.to_bytes()) + self.size + self.chunks * TAG_SIZE

    def to_bytes(self) -> bytes:
        """Magic, version and length, then the fields as deterministic CBOR."""
        body = encode(
            {
                "format": FORMAT,
                "model": self.model_id,
                "size": self.size,
                "chunk_size": self.chunk_size,
                "salt": self.salt,
                "commitment": self.commitment,
                "root": self.root,
                "sections": [[part.name, part.offset, part.length] for part in self.sections],
            }
        )
        return PREFIX.pack(MAGIC, VERSION, len(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> SealedHeader:
        """Parse a header that fills ``data``; `header_size` says how many bytes to read for it.

        Raises:
            FormatError: not a header of this format and version (code ``sealing.format``).
        """
        if header_size(data) != len(data):
            raise _malformed("length", header_size(data), len(data))
        fields = decode(data[PREFIX_SIZE:], what="the header of a sealed model", limit=MAX_BODY)
        if type(fields) is not dict or set(fields) != set(_FIELDS) or fields["format"] != FORMAT:
            raise _malformed("fields", f"those of {FORMAT}", "others")
        return cls(
            model_id=fields["model"],
            size=fields["size"],
            chunk_size=fields["chunk_size"],
            salt=fields["salt"],
            commitment=fields["commitment"],
            root=fields["root"],
            sections=_parse_sections(fields["sections"]),
        )

    def require(self, digest: bytes) -> None:
        """Refuse a header other than the one that a statement signs.

        Raises:
            Tampered: `digest` differs (code ``sealing.header``).
        """
        if not hmac.compare_digest(self.digest, digest):
            raise Tampered(
                "the sealed model is not the one that its owner's statement names",
                code="sealing.header",
                claim="header digest",
                expected=digest.hex(),
                actual=self.digest.hex(),
            )

    def section(self, name: str) -> SectionRange:
        """The section of that name.

        Raises:
            FormatError: there is none (code ``sealing.section``).
        """
        for part in self.sections:
            if part.name == name:
                return part
        names = ", ".join(part.name for part in self.sections)
        raise FormatError(
            "no such section", code="sealing.section", claim="section", expected=names, actual=name
        )

    def chunk_length(self, index: int) -> int:
        """Plaintext bytes of chunk ``index``.

        Raises:
            FormatError: there is no such chunk (code ``sealing.range``).
        """
        if not 0 <= index < self.chunks:
            raise FormatError(
                "no such chunk",
                code="sealing.range",
                claim="chunk",
                expected=f"below {self.chunks}",
                actual=index,
            )
        return min(self.chunk_size, self.size - index * self.chunk_size)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """Where chunk ``index`` lies in the container, tag included: (start, stop).

        Raises:
            FormatError: there is no such chunk (code ``sealing.range``).
        """
        length = self.chunk_length(index)
        start = len(self.to_bytes()) + index * (self.chunk_size + TAG_SIZE)
        return start, start + length + TAG_SIZE

    def spans(self, offset: int, length: int) -> Iterator[ChunkSpan]:
        """The chunks that ``length`` plaintext bytes from ``offset`` need, in order.

        Raises:
            FormatError: the range leaves the plaintext (code ``sealing.range``).
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                "a range outside the sealed model",
                code="sealing.range",
                claim="range",
                expected=f"within {self.size} B",
                actual=f"{length} B at {offset}",
            )
        base, step = len(self.to_bytes()), self.chunk_size + TAG_SIZE
        position, stop = offset, offset + length
        while position < stop:
            index, skip = divmod(position, self.chunk_size)
            take = min(self.chunk_size - skip, stop - position)
            start = base + index * step
            end = start + self.chunk_length(index) + TAG_SIZE
            yield ChunkSpan(index=index, start=start, stop=end, skip=skip, take=take)
            position += take


def header_size(prefix: bytes | memoryview) -> int:
    """Bytes of the whole header, from its first `PREFIX_SIZE` bytes.

    Raises:
        FormatError: not a sealed model of this version, or a header longer than allowed (code
            ``sealing.format``).
    """
    if len(prefix) < PREFIX_SIZE:
        raise _malformed("length", f"at least {PREFIX_SIZE}", len(prefix))
    magic, version, length = PREFIX.unpack_from(prefix)
    if magic != MAGIC:
        raise _malformed("magic", MAGIC.decode(), "another")
    if version != VERSION:
        raise _malformed("version", VERSION, version)
    if length > MAX_BODY:
        raise _malformed("header length", f"at most {MAX_BODY} B", length)
    return PREFIX_SIZE + int(length)


def lay_out(parts: Sequence[tuple[str, int]]) -> tuple[SectionRange, ...]:
    """Place named lengths one after the other, each at the next page.

    Raises:
        FormatError: no section or too many, a name twice or not a name, a length out of bounds
            (``sealing.format``).
    """
    if not 1 <= len(parts) <= MAX_SECTIONS:
        raise _malformed("sections", f"1 to {MAX_SECTIONS}", len(parts))
    ranges: list[SectionRange] = []
    offset = 0
    for name, length in parts:
        if (
            type(name) is not str
            or not 1 <= len(name) <= MAX_NAME
            or not name.isascii()
            or not name.isprintable()
        ):
            raise _malformed("section name", f"1 to {MAX_NAME} printable ASCII characters", "another")
        if type(length) is not int or not 0 <= length <= MAX_SIZE - offset:
            raise _malformed("section length", f"0 to {MAX_SIZE} B in all", length)
        ranges.append(SectionRange(name=name, offset=offset, length=length))
        offset = -(-(offset + length) // SECTION_ALIGNMENT) * SECTION_ALIGNMENT
    if len({part.name for part in ranges}) != len(ranges):
        raise _malformed("section name", "each once", "one twice")
    return tuple(ranges)


def check_model_id(model_id: object) -> None:
    """Refuse what can't name a model.

    Raises:
        FormatError: not text, empty, too long, not printable, or with a space at an end (code
            ``sealing.format``).
    """
    if type(model_id) is not str or not 1 <= len(model_id) <= MAX_MODEL_ID:
        raise _malformed("model id", f"1 to {MAX_MODEL_ID} characters", "another value")
    if not model_id.isprintable() or model_id != model_id.strip():
        raise _malformed("model id", "printable characters, no space at its ends", "others")


def check_chunk_size(chunk_size: object) -> None:
    """Refuse a chunk size that no container has.

    Raises:
        FormatError: not a power of two within the bounds (code ``sealing.format``).
    """
    if (
        type(chunk_size) is not int
        or not MIN_CHUNK_SIZE <= chunk_size <= MAX_CHUNK_SIZE
        or chunk_size & (chunk_size - 1)
    ):
        raise _malformed("chunk size", f"a power of two, {MIN_CHUNK_SIZE} to {MAX_CHUNK_SIZE} B", chunk_size)


def _parse_sections(value: Any) -> tuple[SectionRange, ...]:
    if type(value) is not list or not all(type(item) is list and len(item) == 3 for item in value):
        raise _malformed("sections", "a list of [name, offset, length]", "another value")
    return tuple(SectionRange(name=name, offset=offset, length=length) for name, offset, length in value)


def _size_of(value: object) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__


def _malformed(claim: str, expected: object, actual: object) -> FormatError:
    return FormatError(
        "not a header of a sealed model", code="sealing.format", claim=claim, expected=expected, actual=actual
    )
