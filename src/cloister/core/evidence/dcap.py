"""Intel DCAP quotes of SGX enclaves and TDX trust domains, versions 3 to 5: bytes to frozen values and back.

Layout, little-endian (Intel, "SGX ECDSA QuoteLibReference", appendix A.4, and "TDX DCAP Quoting Library API",
appendix A.3 and A.4)::

    header 48 B | body descriptor | body | u32 length | signature data | padding

Only version 5 has a body descriptor: u16 type and u32 size of the body. Signature data: quote signature 64,
attestation key 64, then the certification of that key: report of the quoting enclave 384, its signature 64,
u16-length authentication data, u16 type and u32-length certification data. Versions 4 and 5 wrap that part in
certification data of its own: u16 type 6, u32 length. No trust decision is taken here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

from cloister.core.evidence.layout import length_error, require_size, require_zero, u16, u32
from cloister.core.evidence.sgx import SIZE as SGX_SIZE
from cloister.core.evidence.sgx import SgxReportBody
from cloister.core.evidence.tdx import TdReport, TdReport15
from cloister.errors import EvidenceError

HEADER_SIZE: Final = 48  # bytes
DESCRIPTOR_SIZE: Final = 6  # bytes, in version 5
SIGNATURE_SIZE: Final = 64  # bytes; raw r || s on P-256
KEY_SIZE: Final = 64  # bytes; raw x || y on P-256
MAX_QUOTE: Final = 16 << 10  # bytes, padding included
MAX_AUTH_DATA: Final = 1 << 10  # bytes

TEE_SGX: Final = 0x00
TEE_TDX: Final = 0x81
TEES: Final[Mapping[int, str]] = MappingProxyType({TEE_SGX: "sgx", TEE_TDX: "tdx"})  # names by type
KEY_TYPE_ECDSA_P256: Final = 2
CERTIFICATION_PEM_CHAIN: Final = 5  # certification data is a PEM chain: PCK leaf, PCK CA, root
CERTIFICATION_QE_REPORT: Final = 6  # certification data is a quoting enclave's report and its certification
BODY_SGX: Final = 1
BODY_TD10: Final = 2
BODY_TD15: Final = 3

Body: TypeAlias = SgxReportBody | TdReport
_VERSIONS: Final = (3, 4, 5)
_TEE_TYPES: Final = tuple(TEES)
# Also the first that nests the certification, and whose header has a reserved part.
_FIRST_WITH_TDX: Final = 4
_FIRST_WITH_DESCRIPTOR: Final = 5
_SIZES: Final = {BODY_SGX: SGX_SIZE, BODY_TD10: TdReport.SIZE, BODY_TD15: TdReport15.SIZE}
_FIXED_CERTIFICATION: Final = SGX_SIZE + SIGNATURE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Quote header, 48 B.

    Attributes:
        version: Quote format: 3, 4 or 5.
        attestation_key_type: 2 is ECDSA on P-256.
        tee_type: 0 is SGX, 0x81 is TDX.
        qe_svn: Security version of the quoting enclave; zero from version 4 on.
        pce_svn: Security version of the provisioning certification enclave; likewise.
        qe_vendor_id: 16 B UUID of the quoting enclave's vendor.
        user_data: 20 B that the quoting enclave chose.
    """

    version: int
    attestation_key_type: int
    tee_type: int
    qe_svn: int
    pce_svn: int
    qe_vendor_id: bytes
    user_data: bytes

    def __post_init__(self) -> None:
        require_size("qe_vendor_id", self.qe_vendor_id, 16)
        require_size("user_data", self.user_data, 20)

    @classmethod
    def from_bytes(cls, data: bytes) -> Header:
        """Parse exactly 48 bytes.

        Raises:
            EvidenceError: another length, version, key type or TEE, or a reserved byte that isn't zero.
        """
        require_size("quote header", data, HEADER_SIZE)
        header = cls(
            version=u16(data, 0),
            attestation_key_type=u16(data, 2),
            tee_type=u32(data, 4),
            qe_svn=u16(data, 8),
            pce_svn=u16(data, 10),
            qe_vendor_id=data[12:28],
            user_data=data[28:48],
        )
        _require("quote version", header.version, _VERSIONS)
        _require("attestation key type", header.attestation_key_type, (KEY_TYPE_ECDSA_P256,))
        if header.version < _FIRST_WITH_TDX:
            _require("TEE type", header.tee_type, (TEE_SGX,))
        else:
            _require("TEE type", header.tee_type, _TEE_TYPES)
            require_zero("the quote header", data, 8, 12)
        return header

    def to_bytes(self) -> bytes:
        """The 48 bytes that `from_bytes` reads."""
        return (
            self.version.to_bytes(2, "little")
            + self.attestation_key_type.to_bytes(2, "little")
            + self.tee_type.to_bytes(4, "little")
            + self.qe_svn.to_bytes(2, "little")
            + self.pce_svn.to_bytes(2, "little")
            + self.qe_vendor_id
            + self.user_data
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoteSignature:
    """Signature data of a quote.

    Attributes:
        signature: 64 B over header and body, by the attestation key.
        attestation_key: 64 B point of the attestation key.
        qe_report: The quoting enclave's own report, which binds the attestation key.
        qe_report_signature: 64 B over ``qe_report``, by the platform's PCK.
        qe_auth_data: At most 1 KiB that the quoting enclave binds along with the key.
        certification_type: 5 is a PEM chain.
        certification_data: The PCK leaf, the PCK CA and the root, as PEM, possibly ended by a NUL.
    """

    signature: bytes
    attestation_key: bytes
    qe_report: SgxReportBody
    qe_report_signature: bytes
    qe_auth_data: bytes
    certification_type: int
    certification_data: bytes

    def __post_init__(self) -> None:
        require_size("quote signature", self.signature, SIGNATURE_SIZE)
        require_size("attestation key", self.attestation_key, KEY_SIZE)
        require_size("QE report signature", self.qe_report_signature, SIGNATURE_SIZE)
        if len(self.qe_auth_data) > MAX_AUTH_DATA:
            raise length_error("QE authentication data", f"at most {MAX_AUTH_DATA} B", len(self.qe_auth_data))

    @classmethod
    def from_bytes(cls, data: bytes, *, nested: bool = False) -> QuoteSignature:
        """Parse signature data that fills ``data``.

        Args:
            data: All of it.
            nested: Whether the key's certification is wrapped, as in versions 4 and 5.

        Raises:
            EvidenceError: truncated, overlong, with trailing bytes, or wrapped in another way.
        """
        start = SIGNATURE_SIZE + KEY_SIZE
        signature, key, rest = data[:SIGNATURE_SIZE], data[SIGNATURE_SIZE:start], data[start:]
        if nested:
            kind, rest = _certification(rest)
            _require("certification of the attestation key", kind, (CERTIFICATION_QE_REPORT,))
        if len(rest) < _FIXED_CERTIFICATION + 2:
            raise length_error("quote signature data", f"at least {_FIXED_CERTIFICATION + 2} B", len(rest))
        auth_end = _FIXED_CERTIFICATION + 2 + u16(rest, _FIXED_CERTIFICATION)
        certification_type, certification_data = _certification(rest[auth_end:])
        return cls(
            signature=signature,
            attestation_key=key,
            qe_report=SgxReportBody.from_bytes(rest[:SGX_SIZE]),
            qe_report_signature=rest[SGX_SIZE:_FIXED_CERTIFICATION],
            qe_auth_data=rest[_FIXED_CERTIFICATION + 2 : auth_end],
            certification_type=certification_type,
            certification_data=certification_data,
        )

    def to_bytes(self, *, nested: bool = False) -> bytes:
        """The bytes that `from_bytes` reads."""
        certification = b"".join(
            (
                self.qe_report.to_bytes(),
                self.qe_report_signature,
                len(self.qe_auth_data).to_bytes(2, "little"),
                self.qe_auth_data,
                self.certification_type.to_bytes(2, "little"),
                len(self.certification_data).to_bytes(4, "little"),
                self.certification_data,
            )
        )
        if nested:
            kind = CERTIFICATION_QE_REPORT.to_bytes(2, "little")
            certification = kind + len(certification).to_bytes(4, "little") + certification
        return self.signature + self.attestation_key + certification


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """A whole quote. ``padding`` is what follows it in its buffer, zeros as a rule; nobody signed it."""

    header: Header
    body: Body
    signature: QuoteSignature
    padding: bytes = b""

    @property
    def signed_bytes(self) -> bytes:
        """What the attestation key signed: header, body descriptor and body."""
        return signed_bytes(self.header, self.body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Quote:
        """Parse a quote and what follows it in its buffer; ``to_bytes`` gives ``data`` back.

        Raises:
            EvidenceError: any other bytes.
        """
        raw = bytes(data)
        if not HEADER_SIZE + DESCRIPTOR_SIZE <= len(raw) <= MAX_QUOTE:
            raise length_error("quote", f"{HEADER_SIZE + DESCRIPTOR_SIZE} to {MAX_QUOTE} B", len(raw))
        header = Header.from_bytes(raw[:HEADER_SIZE])
        kind, at = _body_type(header, raw)
        start = at + _SIZES[kind] + 4
        if len(raw) < start:
            raise length_error("quote", f"at least {start} B", len(raw))
        body = _body(kind, raw[at : start - 4])
        end = start + u32(raw, start - 4)
        if len(raw) < end:
            raise length_error("quote", f"at least {end} B", len(raw))
        signature = QuoteSignature.from_bytes(raw[start:end], nested=header.version >= _FIRST_WITH_TDX)
        return cls(header=header, body=body, signature=signature, padding=raw[end:])

    def to_bytes(self) -> bytes:
        """The bytes that `from_bytes` reads."""
        signature = self.signature.to_bytes(nested=self.header.version >= _FIRST_WITH_TDX)
        return self.signed_bytes + len(signature).to_bytes(4, "little") + signature + self.padding


def signed_bytes(header: Header, body: Body) -> bytes:
    """What the attestation key signs: header, body descriptor (version 5) and body."""
    raw = body.to_bytes()
    descriptor = b""
    if header.version >= _FIRST_WITH_DESCRIPTOR:
        kind = {SGX_SIZE: BODY_SGX, TdReport.SIZE: BODY_TD10, TdReport15.SIZE: BODY_TD15}[len(raw)]
        descriptor = kind.to_bytes(2, "little") + len(raw).to_bytes(4, "little")
    return header.to_bytes() + descriptor + raw


def _body_type(header: Header, raw: bytes) -> tuple[int, int]:
    """What kind of body follows, and where it starts."""
    if header.version < _FIRST_WITH_DESCRIPTOR:
        return BODY_SGX if header.tee_type == TEE_SGX else BODY_TD10, HEADER_SIZE
    kind, size = u16(raw, HEADER_SIZE), u32(raw, HEADER_SIZE + 2)
    _require("body type", kind, (BODY_SGX,) if header.tee_type == TEE_SGX else (BODY_TD10, BODY_TD15))
    _require("body size", size, (_SIZES[kind],))
    return kind, HEADER_SIZE + DESCRIPTOR_SIZE


def _body(kind: int, data: bytes) -> Body:
    if kind == BODY_SGX:
        return SgxReportBody.from_bytes(data)
    return TdReport.from_bytes(data) if kind == BODY_TD10 else TdReport15.from_bytes(data)


def _certification(data: bytes) -> tuple[int, bytes]:
    """Certification data that fills ``data``: its type and its content."""
    if len(data) < 6:
        raise length_error("certification data", "at least 6 B", len(data))
    size = u32(data, 2)
    if len(data) != 6 + size:
        raise length_error("certification data", f"{size} B", len(data) - 6)
    return u16(data, 0), data[6:]


def _require(claim: str, actual: int, allowed: tuple[int, ...]) -> None:
    if actual not in allowed:
        expected = " or ".join(map(str, allowed))
        raise EvidenceError(f"unsupported {claim}", claim=claim, expected=expected, actual=actual)
