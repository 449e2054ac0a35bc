"""The SGX extension of a PCK certificate (1.2.840.113741.1.13.1): DER to a frozen value.

It names the platform: its family (FMSPC), the security versions it was certified at, and its PCE. Source:
Intel, "SGX PCK Certificate and Certificate Revocation List Profile Specification", section 1.3.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cloister.errors import EvidenceError

EXTENSION_OID: Final = "1.2.840.113741.1.13.1"
MAX_EXTENSION: Final = 2048  # bytes
COMPONENTS: Final = 16  # security version numbers of a TCB level

_PREFIX: Final = bytes.fromhex("2a864886f84d010d01")  # DER content of EXTENSION_OID
_SEQUENCE, _OID, _OCTETS, _INTEGER, _ENUMERATED = 0x30, 0x06, 0x04, 0x02, 0x0A
_PCE_SVN_ARC, _CPU_SVN_ARC = 17, 18


@dataclass(frozen=True, slots=True, kw_only=True)
class PckExtension:
    """What a PCK certificate says about its platform.

    Attributes:
        ppid: 16 B identifier of the processor.
        tcb_components: 16 security version numbers, each 0 to 255.
        pce_svn: Security version of the PCE, 0 to 65535.
        cpu_svn: 16 B raw CPUSVN.
        pce_id: 2 B.
        fmspc: 6 B family-model-stepping-platform-custom SKU.
        sgx_type: 0 standard, 1 scalable, 2 scalable with integrity.
        platform_instance_id: 16 B on multi-package platforms, else empty.
    """

    ppid: bytes
    tcb_components: tuple[int, ...]
    pce_svn: int
    cpu_svn: bytes
    pce_id: bytes
    fmspc: bytes
    sgx_type: int
    platform_instance_id: bytes = b""

    @classmethod
    def from_bytes(cls, data: bytes) -> PckExtension:
        """Parse the extension's DER value.

        Raises:
            EvidenceError: not DER, a field is missing, doubled, of a wrong type or size.
        """
        return _parse(data)


@lru_cache(maxsize=64)
def _parse(data: bytes) -> PckExtension:
    if len(data) > MAX_EXTENSION:
        raise EvidenceError(
            "the SGX extension is too long", expected=f"at most {MAX_EXTENSION} B", actual=len(data)
        )
    fields = _read_fields(_whole(data, _SEQUENCE), _PREFIX)
    tcb = _read_fields(_field(fields, 2, _SEQUENCE), _PREFIX + b"\x02")
    return PckExtension(
        ppid=_octets(fields, 1, 16),
        tcb_components=tuple(_integer(tcb, arc, 0xFF) for arc in range(1, COMPONENTS + 1)),
        pce_svn=_integer(tcb, _PCE_SVN_ARC, 0xFFFF),
        cpu_svn=_octets(tcb, _CPU_SVN_ARC, 16),
        pce_id=_octets(fields, 3, 2),
        fmspc=_octets(fields, 4, 6),
        sgx_type=_integer(fields, 5, 2, tag=_ENUMERATED),
        platform_instance_id=_octets(fields, 6, 16) if 6 in fields else b"",
    )


def _read(data: bytes, offset: int) -> tuple[int, bytes, int]:
    """One DER element at ``offset``: its tag, its content and the offset after it."""
    if len(data) < offset + 2:
        raise _malformed("truncated")
    tag, length, start = data[offset], data[offset + 1], offset + 2
    if length >= 0x80:
        size = length & 0x7F
        if size not in (1, 2) or len(data) < start + size:
            raise _malformed("length")
        length, start = int.from_bytes(data[start : start + size], "big"), start + size
        if length < (0x80 if size == 1 else 0x100):
            raise _malformed("length is not minimal")
    if len(data) < start + length:
        raise _malformed("truncated")
    return tag, data[start : start + length], start + length


def _whole(data: bytes, tag: int) -> bytes:
    found, content, end = _read(data, 0)
    if found != tag or end != len(data):
        raise _malformed("not one element of the expected type")
    return content


def _read_fields(content: bytes, prefix: bytes) -> dict[int, tuple[int, bytes]]:
    """A sequence of (object identifier under ``prefix``, value) pairs, by last arc."""
    fields: dict[int, tuple[int, bytes]] = {}
    offset = 0
    while offset < len(content):
        tag, pair, offset = _read(content, offset)
        if tag != _SEQUENCE:
            raise _malformed("a field is no sequence")
        tag, oid, end = _read(pair, 0)
        value_tag, value, end = _read(pair, end)
        if tag != _OID or oid[:-1] != prefix or end != len(pair) or oid[-1] >= 0x80:
            raise _malformed("a field's name or end")
        if oid[-1] in fields:
            raise _malformed("a field occurs twice")
        fields[oid[-1]] = (value_tag, value)
    return fields


def _field(fields: dict[int, tuple[int, bytes]], arc: int, tag: int) -> bytes:
    found, value = fields.get(arc, (None, b""))
    if found != tag:
        raise _malformed(f"field {arc} is missing or of another type")
    return value


def _octets(fields: dict[int, tuple[int, bytes]], arc: int, size: int) -> bytes:
    value = _field(fields, arc, _OCTETS)
    if len(value) != size:
        raise _malformed(f"field {arc} must have {size} B")
    return value


def _integer(fields: dict[int, tuple[int, bytes]], arc: int, most: int, *, tag: int = _INTEGER) -> int:
    value = _field(fields, arc, tag)
    number = int.from_bytes(value, "big", signed=True)
    # Intel encodes numbers from 128 on in their unsigned form in some certificates; DER wants a leading zero.
    if number < 0 and len(value) <= 2:
        number = int.from_bytes(value, "big")
    if not value or len(value) > 3 or not 0 <= number <= most:
        raise _malformed(f"field {arc} must be 0 to {most}")
    return number


def _malformed(detail: str) -> EvidenceError:
    return EvidenceError(
        f"the SGX extension of the PCK certificate is malformed: {detail}", claim="SGX extension"
    )
