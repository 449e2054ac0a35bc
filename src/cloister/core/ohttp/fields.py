"""Field lines and control data of binary HTTP (RFC 9292, sections 3.4 to 3.6).

What HTTP allows in them is checked when a message is made, whether from values or from bytes.
"""

from __future__ import annotations

import re
from typing import Final, TypeAlias

from cloister.core.ohttp.reader import Reader, encode_varint
from cloister.errors import FormatError

Fields: TypeAlias = tuple[tuple[bytes, bytes], ...]

CODE: Final = "bhttp"

MAX_SECTION: Final = 64 << 10  # bytes of one field section, encoded
MAX_FIELDS: Final = 256  # lines of one field section

# RFC 9110, section 5.6.2, without capitals: as in HTTP/2, so that one name has one spelling.
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
# RFC 9110, section 5.5: no control character but a tab, and no white space at either end.
_VALUE: Final = re.compile(rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")
_METHOD: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SCHEME: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*")
_AUTHORITY: Final = re.compile(rb"[\x21-\x7e]*")
_PATH: Final = re.compile(rb"/[\x21-\x7e]*|\*")


def refusal(claim: str, *, expected: object, actual: object) -> FormatError:
    """The error for a part of a message that HTTP does not allow; ``actual`` never shows a value."""
    return FormatError(
        f"{claim} is not allowed in an HTTP message", code=CODE, claim=claim, expected=expected, actual=actual
    )


def require_control(method: bytes, scheme: bytes, authority: bytes, path: bytes) -> None:
    """Refuse control data that HTTP does not allow."""
    if not _METHOD.fullmatch(method):
        raise refusal("method", expected="a token", actual="other octets")
    if not _SCHEME.fullmatch(scheme):
        raise refusal("scheme", expected="a URI scheme", actual="other octets")
    if not _AUTHORITY.fullmatch(authority):
        raise refusal("authority", expected="visible ASCII", actual="other octets")
    if not _PATH.fullmatch(path):
        raise refusal("path", expected="visible ASCII from a / on, or *", actual="other octets")


def require_fields(lines: Fields) -> None:
    """Refuse field lines that HTTP does not allow, or too many of them."""
    if len(lines) > MAX_FIELDS:
        raise refusal("field section", expected=f"at most {MAX_FIELDS} lines", actual=f"{len(lines)} lines")
    for name, value in lines:
        if name.startswith(b":"):
            raise refusal("field name", expected="no pseudo-field", actual="a name that starts with a colon")
        if not _NAME.fullmatch(name):
            raise refusal("field name", expected="a token in lower case", actual="other octets")
        if not _VALUE.fullmatch(value):
            raise refusal(
                "field value", expected="no control characters, no white space at its ends", actual="some"
            )


def lookup(lines: Fields, name: bytes) -> bytes | None:
    """The combined value of the lines called ``name`` (RFC 9110, section 5.3), or None."""
    values = [value for line_name, value in lines if line_name == name]
    return b", ".join(values) if values else None


def encode_section(lines: Fields, *, indeterminate: bool) -> bytes:
    """A field section, with its length before it or a terminator after it.

    Raises:
        FormatError: longer than `MAX_SECTION` (code ``bhttp``).
    """
    section = b"".join(encode_varint(len(part)) + part for line in lines for part in line)
    if len(section) > MAX_SECTION:
        raise refusal("field section", expected=f"at most {MAX_SECTION} B", actual=f"{len(section)} B")
    return section + b"\x00" if indeterminate else encode_varint(len(section)) + section


def read_section(reader: Reader, *, indeterminate: bool, required: bool = False) -> Fields:
    """Read a field section; an absent one is empty unless it is ``required``.

    Raises:
        FormatError: malformed, truncated, or too long (code ``bhttp``).
    """
    if not reader.remaining and not required:
        return ()
    if indeterminate:
        return _read_terminated(reader)
    length = reader.varint("field section")
    section = Reader(reader.take(length, "field section", limit=MAX_SECTION), code=CODE)
    lines: list[tuple[bytes, bytes]] = []
    while section.remaining:
        lines.append(_read_line(section, section.varint("field name"), len(lines)))
    return tuple(lines)


def _read_terminated(reader: Reader) -> Fields:
    start = reader.offset
    lines: list[tuple[bytes, bytes]] = []
    while length := reader.varint("field name"):
        lines.append(_read_line(reader, length, len(lines)))
        if reader.offset - start > MAX_SECTION:
            raise refusal("field section", expected=f"at most {MAX_SECTION} B", actual="more")
    return tuple(lines)


def _read_line(reader: Reader, name_length: int, count: int) -> tuple[bytes, bytes]:
    """The next line; its characters are checked when the message is made."""
    if count == MAX_FIELDS:
        raise refusal("field section", expected=f"at most {MAX_FIELDS} lines", actual="more")
    name = bytes(reader.take(name_length, "field name", limit=MAX_SECTION))
    value = bytes(reader.take(reader.varint("field value"), "field value", limit=MAX_SECTION))
    return name, value
