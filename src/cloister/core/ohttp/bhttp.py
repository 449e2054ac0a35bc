"""Binary HTTP messages (RFC 9292): requests and responses as the plaintext of an encapsulation.

A decoded message's content is a view into the bytes it was decoded from; nothing large is copied. Encoding
copies it once, into the array that is then encrypted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final, TypeAlias

from cloister.core.ohttp import fields as field_lines
from cloister.core.ohttp.fields import Fields
from cloister.core.ohttp.reader import Bytes, Reader, encode_varint, octets

MEDIA_TYPE: Final = "message/bhttp"

MAX_CONTENT: Final = 64 << 20  # bytes, unless the caller says otherwise
MAX_CONTROL: Final = 8 << 10  # bytes; method, scheme, authority, path: each
MAX_CHUNKS: Final = 1 << 12  # of content of indeterminate length
MAX_INFORMATIONAL: Final = 16  # responses before the final one

_CODE: Final = field_lines.CODE
_KNOWN_REQUEST: Final = 0
_KNOWN_RESPONSE: Final = 1
_INDETERMINATE_REQUEST: Final = 2
_INDETERMINATE_RESPONSE: Final = 3

Informational: TypeAlias = tuple[tuple[int, Fields], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request; ``CONNECT`` has no place here, so a path is always there.

    Attributes:
        method: For example ``b"POST"``.
        scheme: ``b"https"`` unless said otherwise.
        authority: Host and port, or empty where the fields or the service itself say it.
        path: Path and query, from the first ``/``; or ``*``.
        fields: Header fields in order, names in lower case.
        content: The body; after decoding, a view into the message.
        trailers: Trailer fields.
        more: What the body goes on with, of a request to be encoded: nobody has to join it.

    Raises:
        FormatError: a part that HTTP does not allow (code ``bhttp``).
    """

    method: bytes
    path: bytes
    scheme: bytes = b"https"
    authority: bytes = b""
    fields: Fields = dataclasses.field(default=(), repr=False)
    content: Bytes = dataclasses.field(default=b"", repr=False)
    trailers: Fields = dataclasses.field(default=(), repr=False)
    more: tuple[Bytes, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("method", "scheme", "authority", "path"):
            value: bytes = getattr(self, name)
            if len(value) > MAX_CONTROL:
                raise field_lines.refusal(name, expected=f"at most {MAX_CONTROL} B", actual=f"{len(value)} B")
        field_lines.require_control(self.method, self.scheme, self.authority, self.path)
        field_lines.require_fields(self.fields)
        field_lines.require_fields(self.trailers)

    def field(self, name: bytes) -> bytes | None:
        """The value of the header field ``name`` (lower case), or None; several are joined by commas."""
        return field_lines.lookup(self.fields, name)

    def to_bytes(self, *, pad: bool, indeterminate: bool = False) -> bytearray:
        """Encode the request.

        Args:
            pad: Whether to fill up with zeros to `padded_size`.
            indeterminate: Whether to end sections by terminators instead of prefixing their lengths.
        """
        return bytearray().join(self.to_parts(pad=pad, indeterminate=indeterminate))

    def to_parts(self, *, pad: bool, indeterminate: bool = False) -> list[memoryview]:
        """The same in parts, to be sealed one after the other; none of the body is copied."""
        control = (self.method, self.scheme, self.authority, self.path)
        head = bytearray([_INDETERMINATE_REQUEST if indeterminate else _KNOWN_REQUEST])
        for part in control:
            head += encode_varint(len(part)) + part
        head += field_lines.encode_section(self.fields, indeterminate=indeterminate)
        body = (self.content, *self.more)
        return _parts(head, body, self.trailers, pad=pad, indeterminate=indeterminate)

    @classmethod
    def from_bytes(cls, data: Bytes, *, max_content: int = MAX_CONTENT) -> Request:
        """Decode a request of either form.

        Raises:
            FormatError: malformed, truncated, too long, or followed by anything but zeros (code ``bhttp``).
        """
        reader = Reader(data, code=_CODE)
        framing = reader.varint("framing indicator")
        if framing not in (_KNOWN_REQUEST, _INDETERMINATE_REQUEST):
            raise reader.refusal("framing indicator", expected="a request (0 or 2)", actual=framing)
        indeterminate = framing == _INDETERMINATE_REQUEST
        method, scheme, authority, path = (
            bytes(reader.take(reader.varint(name), name, limit=MAX_CONTROL))
            for name in ("method", "scheme", "authority", "path")
        )
        headers = field_lines.read_section(reader, indeterminate=indeterminate)
        content, trailers = _read_end(reader, indeterminate=indeterminate, max_content=max_content)
        return cls(
            method=method,
            scheme=scheme,
            authority=authority,
            path=path,
            fields=headers,
            content=content,
            trailers=trailers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A final response, with the informational ones before it.

    Attributes:
        status: 200..599.
        fields: Header fields in order, names in lower case.
        content: The body; after decoding, a view into the message.
        trailers: Trailer fields.
        informational: Pairs of status (100..199) and fields.
        more: What the body goes on with, of a response to be encoded: nobody has to join it.

    Raises:
        FormatError: a part that HTTP does not allow (code ``bhttp``).
    """

    status: int
    fields: Fields = dataclasses.field(default=(), repr=False)
    content: Bytes = dataclasses.field(default=b"", repr=False)
    trailers: Fields = dataclasses.field(default=(), repr=False)
    informational: Informational = dataclasses.field(default=(), repr=False)
    more: tuple[Bytes, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        _require_status(self.status, 200, 599)
        if len(self.informational) > MAX_INFORMATIONAL:
            expected = f"at most {MAX_INFORMATIONAL}"
            raise field_lines.refusal(
                "informational responses", expected=expected, actual=len(self.informational)
            )
        for status, lines in self.informational:
            _require_status(status, 100, 199)
            field_lines.require_fields(lines)
        field_lines.require_fields(self.fields)
        field_lines.require_fields(self.trailers)

    def field(self, name: bytes) -> bytes | None:
        """The value of the header field ``name`` (lower case), or None; several are joined by commas."""
        return field_lines.lookup(self.fields, name)

    def to_bytes(self, *, pad: bool, indeterminate: bool = False) -> bytearray:
        """Encode the response; the arguments are those of `Request.to_bytes`."""
        return bytearray().join(self.to_parts(pad=pad, indeterminate=indeterminate))

    def to_parts(self, *, pad: bool, indeterminate: bool = False) -> list[memoryview]:
        """The same in parts, to be sealed one after the other; none of the body is copied."""
        head = bytearray([_INDETERMINATE_RESPONSE if indeterminate else _KNOWN_RESPONSE])
        for status, lines in (*self.informational, (self.status, self.fields)):
            head += encode_varint(status) + field_lines.encode_section(lines, indeterminate=indeterminate)
        body = (self.content, *self.more)
        return _parts(head, body, self.trailers, pad=pad, indeterminate=indeterminate)

    @classmethod
    def from_bytes(cls, data: Bytes, *, max_content: int = MAX_CONTENT) -> Response:
        """Decode a response of either form.

        Raises:
            FormatError: malformed, truncated, too long, or followed by anything but zeros (code ``bhttp``).
        """
        reader = Reader(data, code=_CODE)
        framing = reader.varint("framing indicator")
        if framing not in (_KNOWN_RESPONSE, _INDETERMINATE_RESPONSE):
            raise reader.refusal("framing indicator", expected="a response (1 or 3)", actual=framing)
        indeterminate = framing == _INDETERMINATE_RESPONSE
        informational: list[tuple[int, Fields]] = []
        status = reader.varint("status")
        while 100 <= status <= 199:
            if len(informational) == MAX_INFORMATIONAL:
                raise reader.refusal(
                    "informational responses", expected=f"at most {MAX_INFORMATIONAL}", actual="more"
                )
            # Only the end of a message may be cut off, so the section after an informational status is there.
            lines = field_lines.read_section(reader, indeterminate=indeterminate, required=True)
            informational.append((status, lines))
            status = reader.varint("status")
        headers = field_lines.read_section(reader, indeterminate=indeterminate)
        content, trailers = _read_end(reader, indeterminate=indeterminate, max_content=max_content)
        return cls(
            status=status,
            fields=headers,
            content=content,
            trailers=trailers,
            informational=tuple(informational),
        )


def padded_size(size: int) -> int:
    """The bucket of a message of ``size`` bytes: the least Padmé length that holds it.

    Padmé (Nikitin et al., https://arxiv.org/abs/1806.03160, section 4) keeps only as many leading bits of a
    length as its exponent has. It adds at most 12 % and lets O(log log n) bits of the length be seen.
    """
    if size < 2:
        return size
    exponent = size.bit_length() - 1
    free_bits = exponent - exponent.bit_length()
    mask = (1 << free_bits) - 1
    return (size + mask) & ~mask


def _parts(
    head: bytearray, content: tuple[Bytes, ...], trailers: Fields, *, pad: bool, indeterminate: bool
) -> list[memoryview]:
    """Head, body, end and padding; the body's parts are those that were given."""
    body = [view for view in map(octets, content) if view.nbytes]
    length = sum(view.nbytes for view in body)
    if length or not indeterminate:
        head += encode_varint(length)
    tail = b"\x00" if indeterminate else b""  # ends the one chunk, or says that there is none
    tail += field_lines.encode_section(trailers, indeterminate=indeterminate)
    size = len(head) + length + len(tail)
    tail += bytes(padded_size(size) - size if pad else 0)
    return [memoryview(head), *body, memoryview(tail)]


def _read_end(reader: Reader, *, indeterminate: bool, max_content: int) -> tuple[memoryview, Fields]:
    """Read content, trailers and padding; RFC 9292, section 3.8, lets an empty end be cut off."""
    read = _read_chunks if indeterminate else _read_content
    content = read(reader, max_content)
    trailers = field_lines.read_section(reader, indeterminate=indeterminate)
    padding = reader.rest()
    if padding.tobytes() != bytes(len(padding)):
        raise reader.refusal("padding", expected="zeros", actual="other octets")
    return content, trailers


def _read_content(reader: Reader, max_content: int) -> memoryview:
    length = reader.varint("content") if reader.remaining else 0
    return reader.take(length, "content", limit=max_content)


def _read_chunks(reader: Reader, max_content: int) -> memoryview:
    if not reader.remaining:
        return reader.rest()
    chunks: list[memoryview] = []
    total = 0
    while length := reader.varint("content chunk"):
        if len(chunks) == MAX_CHUNKS:
            raise reader.refusal("content chunks", expected=f"at most {MAX_CHUNKS}", actual="more")
        total += length
        if total > max_content:
            raise reader.refusal("content", expected=f"at most {max_content} B", actual=f"{total} B")
        chunks.append(reader.take(length, "content chunk"))
    return chunks[0] if len(chunks) == 1 else memoryview(b"".join(chunks))


def _require_status(status: int, least: int, most: int) -> None:
    if not least <= status <= most:
        raise field_lines.refusal("status", expected=f"{least}..{most}", actual=status)
