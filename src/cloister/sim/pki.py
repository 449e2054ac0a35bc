"""Certificates and revocation lists of the simulated platform, in the shape that Intel gives its own.

What the other simulated vendors need as well is here, too: identities, key usages, raw signatures.

Every subject says "Cloister Simulated", so that nobody takes one for the vendor's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Generic, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from cloister.core.evidence.pck import EXTENSION_OID, PckExtension
from cloister.errors import UsageError

ROOT_NAME: Final = "Cloister Simulated SGX Root CA"
PCK_CA_NAME: Final = "Cloister Simulated SGX PCK Processor CA"
PCK_NAME: Final = "Cloister Simulated SGX PCK Certificate"
TCB_SIGNING_NAME: Final = "Cloister Simulated SGX TCB Signing"

_SGX_ARC: Final = bytes.fromhex("2a864886f84d010d01")  # DER content of EXTENSION_OID
_USES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)
_CA: Final = ("key_cert_sign", "crl_sign")
_END_ENTITY: Final = ("digital_signature", "content_commitment")
_SEQUENCE, _OID, _OCTETS, _INTEGER, _ENUMERATED = 0x30, 0x06, 0x04, 0x02, 0x0A

Key = TypeVar("Key", rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Identity(Generic[Key]):
    """One principal, with its private key: never printed."""

    key: Key
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        """Its certificate."""
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def common_name(self) -> str:
        """Its name."""
        names = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return "".join(str(name.value) for name in names)

    def to_pem(self) -> tuple[bytes, bytes]:
        """Private key (PKCS 8) and certificate."""
        key = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return key, self.certificate.public_bytes(Encoding.PEM)


def restore(key_pem: bytes, certificate_pem: bytes) -> Identity[ec.EllipticCurvePrivateKey]:
    """What `Identity.to_pem` was called on, with a key on a curve; raises ValueError for anything damaged."""
    key, certificate = load_pair(key_pem, certificate_pem)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not a key on a curve")  # noqa: TRY004
    return Identity(key=key, certificate=certificate)


def load_pair(key_pem: bytes, certificate_pem: bytes) -> tuple[PrivateKeyTypes, x509.Certificate]:
    """A private key and its own certificate; raises ValueError, without a cause that could quote the key."""
    try:
        key = load_pem_private_key(key_pem, password=None)
        certificate = x509.load_pem_x509_certificate(certificate_pem)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        raise ValueError("damaged") from None
    if key.public_key() != certificate.public_key():
        raise ValueError("the key isn't the certificate's")
    return key, certificate


def require_valid(certificate: x509.Certificate, now: int) -> None:
    """Refuse to vouch with a certificate that has expired; raises UsageError."""
    if now > certificate.not_valid_after_utc.timestamp():
        raise UsageError(
            "the simulated platform's certificates have expired",
            code="sim.authority",
            hint="Make a new data directory.",
        )


def key_usage(*uses: str) -> x509.KeyUsage:
    """What a certificate says that its key is for: these uses, by their names in `x509.KeyUsage`."""
    return x509.KeyUsage(**{name: name in uses for name in _USES})


def raw_sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """ECDSA as raw r || s: on P-256 with SHA-256 64 B, on P-384 with SHA-384 96 B."""
    half = key.curve.key_size // 8
    algorithm = hashes.SHA256() if half == 32 else hashes.SHA384()
    r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(algorithm)))
    return r.to_bytes(half, "big") + s.to_bytes(half, "big")


def issue(
    common_name: str,
    key: ec.EllipticCurvePublicKey,
    *,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
    not_before: int,
    not_after: int,
    path_length: int | None = None,
    sgx: bytes | None = None,
) -> x509.Certificate:
    """Issue one certificate.

    Args:
        common_name: The subject's name.
        key: The subject's key.
        issuer: ``None`` for a self-signed root.
        issuer_key: Signs.
        not_before: Unix seconds.
        not_after: Unix seconds.
        path_length: How many CAs may follow; ``None`` for an end entity.
        sgx: DER of the SGX extension, for a PCK leaf.
    """
    subject = _name(common_name)
    is_ca = path_length is not None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(not_before))
        .not_valid_after(_time(not_after))
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(key_usage(*(_CA if is_ca else _END_ENTITY)), critical=True)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=path_length), critical=True)
    )
    if sgx is not None:
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(EXTENSION_OID), sgx)
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def revoke(
    serials: Iterable[int],
    *,
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    issued: int,
    next_update: int,
    number: int,
) -> bytes:
    """A revocation list in DER that names ``serials``; times in unix seconds."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(_time(issued))
        .next_update(_time(next_update))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_time(issued)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.DER)


def sgx_extension(platform: PckExtension) -> bytes:
    """The SGX extension in DER that `PckExtension.from_bytes` reads."""
    components = [
        _pair(b"\x02" + bytes([arc]), _integer(svn))
        for arc, svn in enumerate(platform.tcb_components, start=1)
    ]
    tcb = (
        *components,
        _pair(b"\x02\x11", _integer(platform.pce_svn)),
        _pair(b"\x02\x12", _tlv(_OCTETS, platform.cpu_svn)),
    )
    return _tlv(
        _SEQUENCE,
        b"".join(
            (
                _pair(b"\x01", _tlv(_OCTETS, platform.ppid)),
                _pair(b"\x02", _tlv(_SEQUENCE, b"".join(tcb))),
                _pair(b"\x03", _tlv(_OCTETS, platform.pce_id)),
                _pair(b"\x04", _tlv(_OCTETS, platform.fmspc)),
                _pair(b"\x05", _tlv(_ENUMERATED, bytes([platform.sgx_type]))),
            )
        ),
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Cloister Simulated Platform"),
        ]
    )


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _pair(arcs: bytes, value: bytes) -> bytes:
    return _tlv(_SEQUENCE, _tlv(_OID, _SGX_ARC + arcs) + value)


def _integer(number: int) -> bytes:
    return _tlv(_INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _tlv(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content
