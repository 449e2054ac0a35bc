"""Intel DCAP quotes (SGX ECDSA, version 3): bytes to frozen values and back.

Layout, little-endian (Intel, "SGX ECDSA QuoteLibReference", appendix A.4)::

    header 48 B | enclave report 384 B | u32 length | signature data | zero padding

Signature data: quote signature 64, attestation key 64, report of the quoting enclave 384, its signature 64,
u16-length authentication data, u16 type and u32-length certification data. No trust decision is taken here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cloister.errors import EvidenceError

HEADER_SIZE: Final = 48  # bytes
SGX_BODY_SIZE: Final = 384  # bytes
SIGNATURE_SIZE: Final = 64  # bytes; raw r || s on P-256
KEY_SIZE: Final = 64  # bytes; raw x || y on P-256
MAX_QUOTE: Final = 16 << 10  # bytes, padding included
MAX_AUTH_DATA: Final = 1 << 10  # bytes

TEE_SGX: Final = 0x00
KEY_TYPE_ECDSA_P256: Final = 2
CERTIFICATION_PEM_CHAIN: Final = 5  # certification data is a PEM chain: PCK leaf, PCK CA, root

_FIXED_SIGNATURE_DATA: Final = SIGNATURE_SIZE + KEY_SIZE + SGX_BODY_SIZE + SIGNATURE_SIZE
# Ranges of an SGX report that the processor leaves zero; what lies between them has a name below.
_RESERVED: Final = ((20, 32), (96, 128), (160, 192), (262, 304))


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Quote header, 48 B.

    Attributes:
        version: Quote format; 3 here.
        attestation_key_type: 2 is ECDSA on P-256.
        tee_type: 0 is SGX.
        qe_svn: Security version of the quoting enclave.
        pce_svn: Security version of the provisioning certification enclave.
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
        _require_size("qe_vendor_id", self.qe_vendor_id, 16)
        _require_size("user_data", self.user_data, 20)

    @classmethod
    def from_bytes(cls, data: bytes) -> Header:
        """Parse exactly 48 bytes.

        Raises:
            EvidenceError: another length, version, key type or TEE.
        """
        _require_size("quote header", data, HEADER_SIZE)
        header = cls(
            version=_u16(data, 0),
            attestation_key_type=_u16(data, 2),
            tee_type=int.from_bytes(data[4:8], "little"),
            qe_svn=_u16(data, 8),
            pce_svn=_u16(data, 10),
            qe_vendor_id=data[12:28],
            user_data=data[28:48],
        )
        _require("quote version", header.version, 3)
        _require("attestation key type", header.attestation_key_type, KEY_TYPE_ECDSA_P256)
        _require("TEE type", header.tee_type, TEE_SGX)
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
class SgxReportBody:
    """Body of an SGX enclave report, 384 B (Intel SDM volume 3D, REPORT structure); the vendor's names."""

    cpu_svn: bytes  # 16
    misc_select: int  # u32
    isv_ext_prod_id: bytes  # 16
    attributes: bytes  # 16: flags 8, XFRM 8
    mr_enclave: bytes  # 32
    mr_signer: bytes  # 32
    config_id: bytes  # 64
    isv_prod_id: int  # u16
    isv_svn: int  # u16
    config_svn: int  # u16
    isv_family_id: bytes  # 16
    report_data: bytes  # 64

    def __post_init__(self) -> None:
        for name, size in _BODY_SIZES:
            _require_size(name, getattr(self, name), size)

    @property
    def debug(self) -> bool:
        """Whether the enclave's memory is open to a debugger (ATTRIBUTES bit 1)."""
        return bool(self.attributes[0] & 0x02)

    @classmethod
    def from_bytes(cls, data: bytes) -> SgxReportBody:
        """Parse exactly 384 bytes.

        Raises:
            EvidenceError: another length, or a reserved byte that isn't zero.
        """
        _require_size("SGX report", data, SGX_BODY_SIZE)
        for start, end in _RESERVED:
            if any(data[start:end]):
                raise EvidenceError(
                    "a reserved range of the SGX report is not zero",
                    claim=f"reserved bytes {start} to {end - 1}",
                    expected="zero",
                    actual=data[start:end].hex(),
                )
        return cls(
            cpu_svn=data[0:16],
            misc_select=int.from_bytes(data[16:20], "little"),
            isv_ext_prod_id=data[32:48],
            attributes=data[48:64],
            mr_enclave=data[64:96],
            mr_signer=data[128:160],
            config_id=data[192:256],
            isv_prod_id=_u16(data, 256),
            isv_svn=_u16(data, 258),
            config_svn=_u16(data, 260),
            isv_family_id=data[304:320],
            report_data=data[320:384],
        )

    def to_bytes(self) -> bytes:
        """The 384 bytes that `from_bytes` reads."""
        return b"".join(
            (
                self.cpu_svn,
                self.misc_select.to_bytes(4, "little"),
                bytes(12),
                self.isv_ext_prod_id,
                self.attributes,
                self.mr_enclave,
                bytes(32),
                self.mr_signer,
                bytes(32),
                self.config_id,
                self.isv_prod_id.to_bytes(2, "little"),
                self.isv_svn.to_bytes(2, "little"),
                self.config_svn.to_bytes(2, "little"),
                bytes(42),
                self.isv_family_id,
                self.report_data,
            )
        )


_BODY_SIZES: Final = (
    ("cpu_svn", 16),
    ("isv_ext_prod_id", 16),
    ("attributes", 16),
    ("mr_enclave", 32),
    ("mr_signer", 32),
    ("config_id", 64),
    ("isv_family_id", 16),
    ("report_data", 64),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoteSignature:
    """Signature data of a version 3 quote.

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
        _require_size("quote signature", self.signature, SIGNATURE_SIZE)
        _require_size("attestation key", self.attestation_key, KEY_SIZE)
        _require_size("QE report signature", self.qe_report_signature, SIGNATURE_SIZE)
        if len(self.qe_auth_data) > MAX_AUTH_DATA:
            raise _length_error(
                "QE authentication data", f"at most {MAX_AUTH_DATA} B", len(self.qe_auth_data)
            )

    @classmethod
    def from_bytes(cls, data: bytes) -> QuoteSignature:
        """Parse signature data that fills ``data``.

        Raises:
            EvidenceError: truncated, overlong, or with trailing bytes.
        """
        if len(data) < _FIXED_SIGNATURE_DATA + 2:
            raise _length_error("quote signature data", f"at least {_FIXED_SIGNATURE_DATA + 2} B", len(data))
        auth_end = _FIXED_SIGNATURE_DATA + 2 + _u16(data, _FIXED_SIGNATURE_DATA)
        if len(data) < auth_end + 6:
            raise _length_error("quote signature data", f"at least {auth_end + 6} B", len(data))
        size = int.from_bytes(data[auth_end + 2 : auth_end + 6], "little")
        if len(data) != auth_end + 6 + size:
            raise _length_error("certification data", f"{size} B", len(data) - auth_end - 6)
        return cls(
            signature=data[0:64],
            attestation_key=data[64:128],
            qe_report=SgxReportBody.from_bytes(data[128:512]),
            qe_report_signature=data[512:576],
            qe_auth_data=data[_FIXED_SIGNATURE_DATA + 2 : auth_end],
            certification_type=_u16(data, auth_end),
            certification_data=data[auth_end + 6 :],
        )

    def to_bytes(self) -> bytes:
        """The bytes that `from_bytes` reads."""
        return b"".join(
            (
                self.signature,
                self.attestation_key,
                self.qe_report.to_bytes(),
                self.qe_report_signature,
                len(self.qe_auth_data).to_bytes(2, "little"),
                self.qe_auth_data,
                self.certification_type.to_bytes(2, "little"),
                len(self.certification_data).to_bytes(4, "little"),
                self.certification_data,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """A whole quote. ``padding`` counts the zero bytes that follow it in its buffer."""

    header: Header
    body: SgxReportBody
    signature: QuoteSignature
    padding: int = 0

    @property
    def signed_bytes(self) -> bytes:
        """What the attestation key signed: header and body."""
        return self.header.to_bytes() + self.body.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Quote:
        """Parse a quote and the zero bytes that may follow it; ``to_bytes`` gives ``data`` back.

        Raises:
            EvidenceError: any other bytes.
        """
        raw = bytes(data)
        start = HEADER_SIZE + SGX_BODY_SIZE + 4
        if not start <= len(raw) <= MAX_QUOTE:
            raise _length_error("quote", f"{start} to {MAX_QUOTE} B", len(raw))
        header = Header.from_bytes(raw[:HEADER_SIZE])
        body = SgxReportBody.from_bytes(raw[HEADER_SIZE : start - 4])
        end = start + int.from_bytes(raw[start - 4 : start], "little")
        if len(raw) < end:
            raise _length_error("quote", f"at least {end} B", len(raw))
        if any(raw[end:]):
            raise EvidenceError("the quote is followed by bytes that are not zero", claim="padding")
        signature = QuoteSignature.from_bytes(raw[start:end])
        return cls(header=header, body=body, signature=signature, padding=len(raw) - end)

    def to_bytes(self) -> bytes:
        """The bytes that `from_bytes` reads."""
        signature = self.signature.to_bytes()
        return self.signed_bytes + len(signature).to_bytes(4, "little") + signature + bytes(self.padding)


def _u16(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "little")


def _require(claim: str, actual: int, expected: int) -> None:
    if actual != expected:
        raise EvidenceError(f"unsupported {claim}", claim=claim, expected=expected, actual=actual)


def _require_size(claim: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise _length_error(claim, f"{size} B", len(data))


def _length_error(claim: str, expected: str, actual: int) -> EvidenceError:
    return EvidenceError(f"{claim} has a wrong length", claim=claim, expected=expected, actual=f"{actual} B")
