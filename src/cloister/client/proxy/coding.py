"""Content codings of HTTP (RFC 9110, section 8.4.1) that Open Inference Protocol clients use: gzip, deflate.

Piece by piece, so that neither a bomb fills memory nor a large body holds up the event loop.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Final

from cloister.client.proxy.room import Place
from cloister.errors import FormatError

_WINDOW: Final = {b"gzip": 31, b"deflate": 15}  # zlib's wbits; deflate means the zlib format (RFC 1950)
_PIECE: Final = 256 << 10  # bytes between two looks at the event loop
_SLICE: Final = 64 << 10  # bytes of input at a time: what zlib leaves over is copied each time
_LEVEL: Final = 1  # on one machine, bytes are cheaper than time


def coding_of(field: bytes | None) -> bytes | None:
    """The one coding of a ``Content-Encoding``; None for none.

    Raises:
        FormatError: ``proxy.encoding``: a coding that isn't known, or several.
    """
    name = (field or b"identity").strip().lower()
    if name == b"identity":
        return None
    if name not in _WINDOW:
        raise FormatError(
            "the body's coding isn't known",
            code="proxy.encoding",
            claim="Content-Encoding",
            expected="gzip, deflate or none",
            actual=name[:40].decode("latin-1"),
        )
    return name


def wanted(field: bytes | None) -> bytes | None:
    """The coding that an ``Accept-Encoding`` asks for; None where it asks for none.

    A field that names one coding asks for it, as tritonclient does. A list of several is what libraries and
    browsers send of their own accord: it allows, and compressing costs more than it saves on one machine.
    """
    names = [part.strip().lower() for part in (field or b"").split(b",")]
    return names[0] if len(names) == 1 and names[0] in _WINDOW else None


async def decode(body: bytes | bytearray, coding: bytes, place: Place) -> bytearray:
    """Decompress a body; every piece is counted in ``place`` before the next is made.

    Raises:
        FormatError: ``proxy.encoding``: not one whole stream of this coding.
        InvalidRequest, Overloaded: as `Place.hold`.
    """
    place.next_body()
    stream = zlib.decompressobj(_WINDOW[coding])
    out = bytearray()
    try:
        for start in range(0, len(body), _SLICE):
            rest = bytes(body[start : start + _SLICE])
            while rest and not stream.eof:
                piece = stream.decompress(rest, _PIECE)
                rest = stream.unconsumed_tail
                place.hold(len(piece))
                out += piece
                await asyncio.sleep(0)
            if stream.eof and (rest or stream.unused_data or start + _SLICE < len(body)):
                raise _broken(coding)
        while not stream.eof and (piece := stream.decompress(b"", _PIECE)):
            place.hold(len(piece))
            out += piece
            await asyncio.sleep(0)
    except zlib.error as error:
        raise _broken(coding) from error
    if not stream.eof:
        raise _broken(coding)
    return out


async def encode(body: memoryview, coding: bytes) -> bytes:
    """Compress a body."""
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW[coding])
    parts = []
    for start in range(0, len(body), _PIECE):
        parts.append(stream.compress(body[start : start + _PIECE]))
        await asyncio.sleep(0)
    parts.append(stream.flush())
    return b"".join(parts)


def _broken(coding: bytes) -> FormatError:
    return FormatError(
        "the body can't be decompressed",
        code="proxy.encoding",
        claim="body",
        expected=f"one whole {coding.decode()} stream",
        actual="another",
    )
