"""Seal small records for a store that the host runs: AES-256-GCM-SIV (RFC 8452), bound to where each belongs.

A sealed record is a 12-byte random nonce, the ciphertext and a 16-byte tag. The associated data is the
deterministic CBOR of the format, service, table, key and version, so a record opens only where, and as the
version that, it was written. Which version is the newest one is not for this module to know: the caller asks
for the version it expects.

GCM-SIV and not GCM, because one state key seals records for years in several replicas: a nonce that repeats
tells the host whether two records are equal, and nothing more.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from cloister.core.encoding import encode
from cloister.core.sealing.keys import require_key
from cloister.core.secret import Secret
from cloister.errors import Tampered, UsageError

FORMAT: Final = "cloister/sealed-record/v1"
NONCE_SIZE: Final = 12  # bytes
TAG_SIZE: Final = 16  # bytes
OVERHEAD: Final = NONCE_SIZE + TAG_SIZE  # bytes
MAX_RECORD: Final = 16 << 20  # bytes of plaintext
MAX_VERSION: Final = (1 << 63) - 1


def seal_record(
    key: Secret,
    *,
    service: bytes | str,
    table: str,
    record_key: bytes | str,
    version: int,
    plaintext: bytes | memoryview,
) -> bytes:
    """Seal one record.

    Args:
        key: 32 bytes.
        service: Id of the service whose state this is.
        table: Name of the table.
        record_key: The record's key in that table.
        version: Of the record, 0 to 2^63 - 1.
        plaintext: At most 16 MiB.

    Raises:
        UsageError: a key, name, version or plaintext out of bounds (codes ``sealing.key-size``,
            ``sealing.record-name``, ``sealing.record-version``, ``sealing.record-size``).
    """
    require_key(key)
    if len(plaintext) > MAX_RECORD:
        raise UsageError(
            "a record that is too long to seal",
            code="sealing.record-size",
            claim="record size",
            expected=f"at most {MAX_RECORD} B",
            actual=f"{len(plaintext)} B",
        )
    nonce = os.urandom(NONCE_SIZE)
    aad = _associated_data(service, table, record_key, version)
    return nonce + AESGCMSIV(key.reveal()).encrypt(nonce, plaintext, aad)


def open_record(
    key: Secret,
    *,
    service: bytes | str,
    table: str,
    record_key: bytes | str,
    version: int,
    sealed: bytes | memoryview,
) -> bytes:
    """Open one record, as the one of that service, table, key and version.

    Raises:
        UsageError: a key, name or version out of bounds (codes as `seal_record`).
        Tampered: the record is altered, cut, moved, another version, or under another key (code
            ``sealing.record``).
    """
    require_key(key)
    aad = _associated_data(service, table, record_key, version)
    if not OVERHEAD <= len(sealed) <= OVERHEAD + MAX_RECORD:
        raise _tampered(table, f"{OVERHEAD} to {OVERHEAD + MAX_RECORD} B", f"{len(sealed)} B")
    view = memoryview(sealed)
    try:
        return AESGCMSIV(key.reveal()).decrypt(view[:NONCE_SIZE], view[NONCE_SIZE:], aad)
    except InvalidTag:
        raise _tampered(table, f"version {version} as it was sealed", "another record") from None


def _associated_data(service: bytes | str, table: str, record_key: bytes | str, version: int) -> bytes:
    if type(version) is not int or not 0 <= version <= MAX_VERSION:
        raise UsageError(
            "not a version of a record",
            code="sealing.record-version",
            claim="version",
            expected=f"0 to {MAX_VERSION}",
            actual=version,
        )
    try:
        return encode([FORMAT, service, table, record_key, version])
    except ValueError:  # text that UTF-8 has no bytes for
        raise UsageError(
            "not the name of a record", code="sealing.record-name", claim="name", expected="text"
        ) from None


def _tampered(table: str, expected: str, actual: str) -> Tampered:
    return Tampered(
        "a sealed record was altered, or belongs elsewhere",
        code="sealing.record",
        claim=f"record of table {table!r}",
        expected=expected,
        actual=actual,
    )
