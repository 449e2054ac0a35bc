"""Authenticated containers: sealed models (chunked, seekable) and sealed records."""

from __future__ import annotations

from cloister.core.sealing.header import (
    CHUNK_SIZE,
    PREFIX_SIZE,
    ChunkSpan,
    SealedHeader,
    SectionRange,
    header_size,
)
from cloister.core.sealing.keys import KEY_SIZE
from cloister.core.sealing.records import open_record, seal_record
from cloister.core.sealing.seal import Sealing, Section, seal
from cloister.core.sealing.unseal import Opener, Unsealer, read_sections

__all__ = [
    "CHUNK_SIZE",
    "KEY_SIZE",
    "PREFIX_SIZE",
    "ChunkSpan",
    "Opener",
    "SealedHeader",
    "Sealing",
    "Section",
    "SectionRange",
    "Unsealer",
    "header_size",
    "open_record",
    "read_sections",
    "seal",
    "seal_record",
]
