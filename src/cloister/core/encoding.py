"""Deterministic CBOR (RFC 8949, section 4.2.1): one value, one encoding.

Everything that is signed or hashed goes through `encode`, and everything that arrives through `decode`, which
refuses any other encoding of the same value. So a digest names exactly one message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final, NoReturn

import cbor2

from cloister.errors import FormatError

MAX_MESSAGE: Final = 8 << 20  # bytes; the largest message that is decoded as a whole
MAX_ITEMS: Final = 1 << 18  # in one message, counted flat; a document of 8192 models has 140,000
MAX_DEPTH: Final = 32  # nesting of arrays and maps


class _NoTags(dict[int, Callable[..., Any]]):
    """A decoder for every tag: none is plain data.

    Shared references (tags 28 and 29) would make a list that holds itself, or a few bytes that stand for
    gigabytes; big integers (tags 2 and 3) would pass for integers.
    """

    def __missing__(self, tag: int) -> Callable[..., Any]:
        return _refuse_tag


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("no message has tags")


_NO_TAGS: Final = _NoTags()


def encode(value: Any, *, foreign: bool = False) -> bytes:
    """Encode plain data (None, bool, int, float, bytes, str, list, tuple, dict) deterministically.

    Args:
        value: What to encode.
        foreign: For a format of others: each map keeps its order.
    """
    return cbor2.dumps(value, canonical=not foreign)


def decode(
    data: bytes | bytearray | memoryview,
    *,
    what: str,
    limit: int = MAX_MESSAGE,
    items: int = MAX_ITEMS,
    foreign: bool = False,
) -> Any:
    """Decode one value that is encoded deterministically and fills ``data``.

    Args:
        data: The encoded bytes.
        what: Name of the message, for the error.
        limit: Longest accepted encoding, in bytes.
        items: Most items, counted flat; each costs the reader about a microsecond, whatever its length.
        foreign: For a format of others: a map's keys may be numbers and come in any order, which the value
            keeps. Every other rule stands (but a float takes 8 bytes, not as few as it can), so `encode` with
            the same setting gives ``data`` back.

    Raises:
        FormatError: too long, too deep, not CBOR, not plain data (a map's keys are text or bytes), trailing
            bytes, or not deterministic.
    """
    raw = bytes(data)
    if len(raw) > limit:
        raise FormatError(
            f"{what} is too long", claim="length", expected=f"at most {limit} B", actual=len(raw)
        )
    if len(raw) > items:  # each item takes a byte at least
        _require_few(raw, what, items)
    try:
        value = cbor2.loads(
            raw,
            max_depth=MAX_DEPTH,
            semantic_decoders=_NO_TAGS,
            tag_hook=_refuse_tag,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=not foreign,
        )
    except Exception as error:
        raise FormatError(f"{what} is not CBOR", code="format.cbor") from error
    _require_plain(value, what)
    if encode(value, foreign=foreign) != raw:
        raise FormatError(f"{what} is not in deterministic encoding", code="format.cbor")
    return value


def _require_few(raw: bytes, what: str, most: int) -> None:
    """Refuse more items than any message has, before anything is made of them: an item may take one byte."""
    offset, items = 0, 0
    while offset < len(raw):
        items += 1
        if items > most:
            raise FormatError(f"{what} has too many items", claim="items", expected=f"at most {most}")
        major, extra = raw[offset] >> 5, raw[offset] & 0x1F
        width = 1 << extra - 24 if 24 <= extra <= 27 else 0
        if major in (2, 3):  # bytes and text: passed over by their length
            offset += int.from_bytes(raw[offset + 1 : offset + 1 + width]) if width else extra
        offset += 1 + width


def digest(value: Any) -> bytes:
    """SHA-256 (32 bytes) of the deterministic encoding of ``value``."""
    return hashlib.sha256(encode(value)).digest()


def _require_plain(value: Any, what: str) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if item is None or type(item) in (bool, int, float, bytes, str):
            continue
        if type(item) is list:
            pending.extend(item)
        elif type(item) is dict:
            pending.extend(item.keys())
            pending.extend(item.values())
        else:
            raise FormatError(f"{what} holds a value that no message has", code="format.cbor")


def unpack(value: Any, what: str, /, **shape: type | tuple[type, ...] | int) -> dict[str, Any]:
    """Check that ``value`` is a map with exactly these fields.

    Args:
        value: What `decode` returned, or a part of it.
        what: Name of the message, for the error.
        **shape: For each field its type, a tuple of types, or an int: bytes of exactly that length.

    Raises:
        FormatError: a field is missing, unknown, of another type or of another length.
    """
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a map", claim="type", expected="map", actual=type(value).__name__)
    if value.keys() != shape.keys():
        names = sorted(map(str, value.keys() ^ shape.keys()))
        raise FormatError(
            f"{what} has other fields", claim="fields", expected=sorted(shape), actual=f"differs in {names}"
        )
    for name, wanted in shape.items():
        _require_type(value[name], f"{what}.{name}", wanted)
    return value


def _require_type(item: Any, what: str, wanted: type | tuple[type, ...] | int) -> None:
    if isinstance(wanted, int):
        if type(item) is not bytes or len(item) != wanted:
            raise FormatError(
                f"{what} has another length", claim=what, expected=f"{wanted} B", actual=type(item).__name__
            )
        return
    types = wanted if isinstance(wanted, tuple) else (wanted,)
    if type(item) not in types:
        expected = " or ".join(sorted(kind.__name__ for kind in types))
        raise FormatError(
            f"{what} has another type", claim=what, expected=expected, actual=type(item).__name__
        )
