"""The certificate table that a host hands to an SNP guest: bytes to frozen values and back.

Linux shows it as configfs-tsm's ``auxblob`` and in extended reports. 24-byte entries (GUID in textual byte
order, u32 offset, u32 length, little-endian) are ended by a zero entry; what they point to follows. Source:
AMD 56421, "SEV-ES Guest-Hypervisor Communication Block Standardization", SNP extended guest request. The host
wrote it: nothing in it is believed here.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final
from uuid import UUID

from cloister.core.evidence.bundle import AmdCollateral
from cloister.core.evidence.pem import to_pem
from cloister.errors import EvidenceError

MAX_TABLE: Final = 32 << 10  # bytes; KVM's hosts give at most 16 KiB
MAX_ENTRIES: Final = 16

GUIDS: Final[Mapping[str, UUID]] = {
    "ARK": UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"),
    "ASK": UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"),  # stands for the ASVK, too: that one has none
    "VCEK": UUID("63da758d-e664-4564-adc5-f4b93be8accd"),
    "VLEK": UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"),
    "CRL": UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea"),
}

_ENTRY: Final = 24  # bytes
_PEM: Final = re.compile(
    rb"-----BEGIN (CERTIFICATE|X509 CRL)-----\s([A-Za-z0-9+/=\s]+)-----END \1-----\s*", re.ASCII
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """What lies at ``offset`` of a table: ``data``, of the kind that ``guid`` names."""

    guid: UUID
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateTable:
    """A certificate table of ``size`` bytes; what its entries don't cover is zero."""

    entries: tuple[TableEntry, ...]
    size: int

    def __post_init__(self) -> None:
        if not 0 < self.size <= MAX_TABLE:
            raise _malformed("size", f"1 to {MAX_TABLE} B", f"{self.size} B")
        if len(self.entries) > MAX_ENTRIES:
            raise _malformed("entries", f"at most {MAX_ENTRIES}", len(self.entries))
        if len({entry.guid for entry in self.entries}) != len(self.entries):
            raise _malformed("entries", "one of each kind", "a kind occurs twice")
        ends = [(0, _ENTRY * (len(self.entries) + 1))]
        ends += [(entry.offset, entry.offset + len(entry.data)) for entry in self.entries]
        for (start, end), (following, _) in pairwise([*sorted(ends), (self.size, self.size)]):
            if not start < end <= following:
                raise _malformed("entries", "disjoint and inside", f"{start} to {end}, then {following}")

    @classmethod
    def pack(cls, certificates: Mapping[str, bytes]) -> CertificateTable:
        """Lay out one entry after the other.

        Args:
            certificates: What the table holds, by its name in `GUIDS`.

        Raises:
            EvidenceError: too many, too long, or an empty one.
        """
        entries = []
        offset = _ENTRY * (len(certificates) + 1)
        for name, data in certificates.items():
            entries.append(TableEntry(guid=GUIDS[name], offset=offset, data=data))
            offset += len(data)
        return cls(entries=tuple(entries), size=offset)

    @classmethod
    def from_bytes(cls, data: bytes) -> CertificateTable:
        """Parse a table that fills ``data``; ``to_bytes`` gives it back.

        Raises:
            EvidenceError: too long, without an end, or with an entry that is empty, overlaps another, lies
                outside, or comes twice; or with bytes that belong to no entry.
        """
        if len(data) > MAX_TABLE:
            raise _malformed("size", f"at most {MAX_TABLE} B", f"{len(data)} B")
        entries: list[TableEntry] = []
        for start in range(0, _ENTRY * (MAX_ENTRIES + 1), _ENTRY):
            raw = data[start : start + _ENTRY]
            if len(raw) != _ENTRY:
                raise _malformed("entries", "ended by a zero entry", "the table ends before")
            if not any(raw):
                break
            offset, size = int.from_bytes(raw[16:20], "little"), int.from_bytes(raw[20:], "little")
            if offset + size > len(data):
                raise _malformed("entries", f"inside {len(data)} B", f"{offset} to {offset + size}")
            entries.append(
                TableEntry(guid=UUID(bytes=raw[:16]), offset=offset, data=data[offset : offset + size])
            )
        else:
            raise _malformed("entries", f"at most {MAX_ENTRIES}", "more")
        table = cls(entries=tuple(entries), size=len(data))
        if table.to_bytes() != data:
            raise _malformed("bytes that belong to no entry", "zero", "other")
        return table

    def to_bytes(self) -> bytes:
        """The bytes that `from_bytes` reads."""
        data = bytearray(self.size)
        for index, entry in enumerate(self.entries):
            numbers = entry.offset.to_bytes(4, "little") + len(entry.data).to_bytes(4, "little")
            data[_ENTRY * index : _ENTRY * (index + 1)] = entry.guid.bytes + numbers
            data[entry.offset : entry.offset + len(entry.data)] = entry.data
        return bytes(data)

    def find(self, name: str) -> bytes:
        """The entry that `GUIDS` calls ``name``, as it came; empty where there is none."""
        return next((entry.data for entry in self.entries if entry.guid == GUIDS[name]), b"")

    def to_collateral(self, signer: str) -> AmdCollateral:
        """The certificates of the key that signed a report.

        Args:
            signer: ``"VCEK"`` or ``"VLEK"``, as `SnpReport.signer` says.

        Raises:
            EvidenceError: one is missing, or is neither DER nor PEM.
        """
        return make_collateral(
            vek=self.find(signer), ask=self.find("ASK"), ark=self.find("ARK"), crl=self.find("CRL")
        )


def make_collateral(*, vek: bytes, ask: bytes, ark: bytes, crl: bytes = b"") -> AmdCollateral:
    """Collateral out of parts in DER or PEM.

    Args:
        vek: The VCEK or VLEK.
        ask: The ASK, or the ASVK for a VLEK.
        ark: The root.
        crl: The root's revocation list; empty for none.

    Raises:
        EvidenceError: one is missing, or is neither DER nor PEM.
    """
    certificates = [_der(name, part) for name, part in (("VCEK or VLEK", vek), ("ASK", ask), ("ARK", ark))]
    return AmdCollateral(
        certificates="".join(map(to_pem, certificates)).encode(), crl=_der("CRL", crl) if crl else b""
    )


def _der(name: str, data: bytes) -> bytes:
    """The DER form of one certificate or list; only how it is wrapped is looked at."""
    if data[:1] == b"\x30":
        return data
    match = _PEM.fullmatch(data)
    try:
        if match is not None:
            return base64.b64decode(b"".join(match[2].split()), validate=True)
    except ValueError:  # refused below, as what isn't PEM at all
        pass
    raise _malformed(name, "DER or PEM", "nothing" if not data else "something else")


def _malformed(claim: str, expected: str, actual: object) -> EvidenceError:
    return EvidenceError(
        "the certificate table is malformed",
        claim=f"certificate table: {claim}",
        expected=expected,
        actual=actual,
    )
