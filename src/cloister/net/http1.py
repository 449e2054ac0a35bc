"""HTTP/1.1 message heads (RFC 9110, RFC 9112), strictly: one reading of every byte, or none.

Two servers that read one request differently are what request smuggling lives on. So whatever RFC 9112 lets
a recipient repair is refused here: folded fields, bare CR or LF, space around a name, repeated fields, more
than one statement of the body's length, absolute and authority targets.

Requests of one client for one model, and their answers, have the same heads: what was read or written lately
is remembered by its bytes. Both directions are functions of these alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from types import MappingProxyType
from typing import Final

from cloister.errors import FormatError, UsageError
from cloister.net.messages import Answer, Buffer, Fields, Head, Limits

END: Final = b"\r\n\r\n"
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE: Final = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]*) HTTP/1\.([01])")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
_FIELD: Final = re.compile(rb"(" + _TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")
_DIGITS: Final = re.compile(rb"[0-9]{1,15}")
_TARGET: Final = re.compile(rb"/[\x21-\x7e]*")

# Fields whose repetition is one list by definition and decides nothing here; proxies on the way repeat them.
_LISTS: Final = frozenset(
    b"accept accept-encoding accept-language cache-control forwarded pragma vary via"
    b" x-forwarded-for x-forwarded-host x-forwarded-proto".split()
)
_BODYLESS: Final = frozenset({204, 304})
_OWN: Final = frozenset({b"content-length", b"transfer-encoding", b"connection"})
_REMEMBERED: Final = 128  # heads of each kind
_SHORT: Final = 2 << 10  # bytes of a head that is remembered at most


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """The head of an HTTP/1.1 response.

    Attributes:
        status: Its status.
        fields: Values by name in lower case.
        length: Value of Content-Length; None where the response has none.
        keep_alive: Whether the connection stays open.
        content_type: Empty where the response has none.
        further: The fields that say nothing about the framing or the type of the body.
    """

    status: int
    fields: Mapping[bytes, bytes]
    length: int | None
    keep_alive: bool
    content_type: bytes
    further: Fields


def parse_request(raw: Buffer, limits: Limits) -> Head:
    """Read a request head.

    Args:
        raw: The head with its empty line.
        limits: Sizes that are accepted.

    Raises:
        FormatError: with the code ``http.<reason>``; `status_of` names the answer.
    """
    data = bytes(raw)
    parse = _parse_request if len(data) <= _SHORT else _parse_request.__wrapped__
    return parse(data, limits.max_head, limits.max_fields)


@lru_cache(_REMEMBERED)
def _parse_request(data: bytes, max_head: int, max_fields: int) -> Head:
    lines = _lines(data, max_head)
    match = _REQUEST_LINE.fullmatch(lines[0])
    if match is None:
        raise FormatError("not a request line of HTTP/1.1", code="http.request-line")
    fields = _fields(lines[1:], max_fields)
    if b"host" not in fields and match[3] == b"1":
        raise FormatError("a request without Host", code="http.host")
    length, chunked = _framing(fields)
    if chunked and match[3] == b"0":
        raise FormatError("Transfer-Encoding in HTTP/1.0", code="http.transfer-encoding")
    return Head(
        method=match[1],
        target=match[2],
        fields=MappingProxyType(fields),
        length=length,
        chunked=chunked,
        keep_alive=match[3] == b"1" and not _closes(fields),
    )


def parse_response(raw: Buffer, limits: Limits) -> ResponseHead:
    """Read a response head. A response whose length isn't stated is refused where a body may follow.

    Raises:
        FormatError: with the code ``http.<reason>``.
    """
    data = bytes(raw)
    parse = _parse_response if len(data) <= _SHORT else _parse_response.__wrapped__
    return parse(data, limits.max_head, limits.max_fields)


@lru_cache(_REMEMBERED)
def _parse_response(data: bytes, max_head: int, max_fields: int) -> ResponseHead:
    lines = _lines(data, max_head)
    match = _STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise FormatError("not a status line of HTTP/1.1", code="http.status-line")
    fields = _fields(lines[1:], max_fields)
    length, chunked = _framing(fields)
    if chunked:
        raise FormatError("a response in chunks", code="http.transfer-encoding")
    return ResponseHead(
        status=int(match[2]),
        fields=MappingProxyType(fields),
        length=length,
        keep_alive=match[1] == b"1" and not _closes(fields),
        content_type=fields.get(b"content-type", b""),
        further=tuple(each for each in fields.items() if each[0] not in _OWN and each[0] != b"content-type"),
    )


def format_request(method: bytes, target: bytes, fields: Fields, length: int | None) -> bytes:
    """Write a request head; ``length`` None leaves Content-Length out.

    Raises:
        UsageError: a method, target or field that can't stand in a head.
    """
    return _format_request(method, target, tuple(fields), length)


@lru_cache(_REMEMBERED)
def _format_request(
    method: bytes, target: bytes, fields: tuple[tuple[bytes, bytes], ...], length: int | None
) -> bytes:
    if not (re.fullmatch(rb"[A-Z]{1,16}", method) and _TARGET.fullmatch(target)):
        raise UsageError("not a method and a target of HTTP", code="http.request-line")
    parts = [method, b" ", target, b" HTTP/1.1\r\n"]
    if not any(name.lower() == b"host" for name, _ in fields):
        parts.append(b"host: cloister\r\n")
    _append_fields(parts, fields)
    if length is not None:
        parts.append(b"content-length: %d\r\n" % length)
    parts.append(b"\r\n")
    return b"".join(parts)


def format_answer(answer: Answer, *, keep_alive: bool) -> bytes:
    """Write a response head.

    Raises:
        UsageError: a status or field that can't stand in a head.
    """
    return _format_answer(
        answer.status, answer.content_type, tuple(answer.fields), len(answer.body), keep_alive
    )


@lru_cache(_REMEMBERED)
def _format_answer(
    status: int, content_type: bytes, fields: tuple[tuple[bytes, bytes], ...], length: int, keep_alive: bool
) -> bytes:
    if not 200 <= status <= 599:
        raise UsageError("not a final status", code="http.status", expected="200..599", actual=status)
    parts = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
    if content_type:
        _append_fields(parts, ((b"content-type", content_type),))
    _append_fields(parts, fields)
    if status not in _BODYLESS:
        parts.append(b"content-length: %d\r\n" % length)
    parts.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
    return b"".join(parts)


def has_body(status: int, method: bytes) -> bool:
    """Whether a response carries a body (RFC 9112, section 6.3)."""
    return method != b"HEAD" and status not in _BODYLESS


def status_of(error: FormatError) -> int:
    """The status that answers a request which `parse_request` refused."""
    return _STATUS_OF.get(error.code, 400)


def _lines(data: bytes, max_head: int) -> list[bytes]:
    if len(data) > max_head:
        raise FormatError("head too large", code="http.head-size", expected=f"at most {max_head} B")
    if not data.endswith(END) or data.find(END) != len(data) - len(END):
        raise FormatError("not exactly one head", code="http.head")
    # A CR or LF that is left inside a line is refused there: no pattern above admits one.
    return data[: -len(END)].split(b"\r\n")


def _fields(lines: list[bytes], max_fields: int) -> dict[bytes, bytes]:
    if len(lines) > max_fields:
        raise FormatError("too many fields", code="http.fields", expected=max_fields, actual=len(lines))
    fields: dict[bytes, bytes] = {}
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise FormatError("not a header field", code="http.field")
        name, value = match[1].lower(), match[2].strip(b" \t")
        if name not in fields:
            fields[name] = value
        elif name in _LISTS:
            fields[name] += b", " + value
        else:
            raise FormatError("a header field stands twice", code="http.repeated", actual=name.decode()[:64])
    return fields


def _framing(fields: dict[bytes, bytes]) -> tuple[int | None, bool]:
    """The stated length of the body, and whether it comes in chunks; never both (RFC 9112, section 6.1)."""
    declared, encoding = fields.get(b"content-length"), fields.get(b"transfer-encoding")
    if encoding is not None:
        if declared is not None:
            raise FormatError("Content-Length beside Transfer-Encoding", code="http.framing")
        if encoding.lower() != b"chunked":
            raise FormatError("an unknown Transfer-Encoding", code="http.transfer-encoding")
        return None, True
    if declared is None:
        return None, False
    if _DIGITS.fullmatch(declared) is None:
        raise FormatError("Content-Length is not a number", code="http.content-length")
    return int(declared), False


def _closes(fields: dict[bytes, bytes]) -> bool:
    return b"close" in (token.strip() for token in fields.get(b"connection", b"").lower().split(b","))


def _append_fields(parts: list[bytes], fields: Fields) -> None:
    for name, value in fields:
        line = name + b": " + value
        if _FIELD.fullmatch(line) is None:
            raise UsageError("not a header field", code="http.field", claim="field")
        if name.lower() in _OWN:
            raise UsageError("the connection writes this field", code="http.field", actual=name.decode())
        parts += (line, b"\r\n")


_STATUS_LINES: Final = {
    status.value: b"HTTP/1.1 %d %s\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus
}
_STATUS_OF: Final = {
    "http.head-size": 431,
    "http.fields": 431,
    "http.length-required": 411,
    "http.too-large": 413,
}
