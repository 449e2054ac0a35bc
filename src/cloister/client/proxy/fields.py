"""How many fields a protocol buffer has, counted before a parser makes an object of each.

An empty field takes two bytes on the wire and dozens as an object, so bytes alone bound nothing.
Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from typing import Any, Final

from cloister.core.oip import MAX_ELEMENTS
from cloister.errors import FormatError, InvalidRequest

MAX_FIELDS: Final = MAX_ELEMENTS + 4096  # a tensor of the most text elements, and what describes it
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTH: Final = {_FIXED64: 8, _FIXED32: 4}


def require_few(raw: bytes, descriptor: Any) -> None:
    """Refuse a message with more fields, in itself and in the messages inside it, than any request has.

    Args:
        raw: The message.
        descriptor: Of its type, which says what fields hold messages.

    Raises:
        FormatError: not a protocol buffer.
        InvalidRequest: more than `MAX_FIELDS` (code ``request.elements``).
    """
    view, count = memoryview(raw), 0
    pending = [(0, len(view), descriptor)]
    while pending:
        offset, end, kind = pending.pop()
        while offset < end:
            count += 1
            if count > MAX_FIELDS:
                raise InvalidRequest(
                    code="request.elements",
                    claim="fields of the message",
                    expected=f"at most {MAX_FIELDS}",
                    actual="more",
                    hint="Send numbers in raw_input_contents, and text in several requests",
                )
            tag, offset = _varint(view, offset, end)
            wire = tag & 7
            if wire == _VARINT:
                _, offset = _varint(view, offset, end)
            elif wire == _BYTES:
                length, offset = _varint(view, offset, end)
                field = kind.fields_by_number.get(tag >> 3)
                if field is not None and field.message_type is not None:
                    pending.append((offset, min(offset + length, end), field.message_type))
                offset += length
            elif wire in _WIDTH:
                offset += _WIDTH[wire]
            else:
                raise _no_message()
        if offset != end:
            raise _no_message()


def _varint(view: memoryview, offset: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if offset >= end:
            break
        byte = view[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise _no_message()


def _no_message() -> FormatError:
    return FormatError("not a protocol buffer", claim="message", expected="a protocol buffer")
